"""Compile every Triton kernel to Hopper machine code without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mrss_kernels
import pytest
from assembler import waits_for_products
from mrss_kernels.linear_cuts import HOPPER_SHARED

SCRIPT = Path(__file__).parent / "compile_kernels.py"

# Bytes of a thread: some words that are stored and read once a layer.
MAY_SPILL = {"persistent7_kernel 4096 fp16 fp32 9": 48}
MAY_SERIALISE: list[str] = []
if version("triton").startswith("3.6."):
    MAY_SPILL |= {
        "persistent7_kernel 4096 fp16 fp32 1": 8,
        "persistent7_kernel 4096 fp16 fp32 9": 72,
        "find_candidates_kernel 65529": 8,
        "draw_token_kernel truncated 262144": 48,
    }
    # That leaves it too few registers for products under way.
    MAY_SERIALISE.append("wkv7_scan_kernel fp16")


def compile_cases(cache: Path, *options: str) -> list[dict[str, object]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Triton keeps what the module has compiled."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def compiled(cache: Path) -> list[dict[str, object]]:
    """Every kernel in the first of its forms, and in the first with inputs in chunks."""
    return compile_cases(cache, "--one-each")


def test_every_kernel_compiles_for_sm_90(compiled: list[dict[str, object]]) -> None:
    sources = Path(mrss_kernels.__file__).parent.glob("*.py")
    names = {
        line.split("(")[0].removeprefix("def ")
        for source in sources
        for line in source.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert names
    assert {str(line["kernel"]).split()[0] for line in compiled} == names


def spilt(lines: list[dict[str, object]]) -> list[str]:
    """Return the kernels that spill more than they may."""
    stacks = {str(line["kernel"]): int(str(line["stack"])) for line in lines}
    return [name for name, stack in stacks.items() if stack > MAY_SPILL.get(name, 0)]


def serialised(lines: list[dict[str, object]]) -> list[str]:
    """Return the kernels whose products wait for each other."""
    return [str(line["kernel"]) for line in lines if line["serialised"]]


def test_no_kernel_spills_registers(compiled: list[dict[str, object]]) -> None:
    assert spilt(compiled) == []


def test_products_of_the_tensor_cores_stay_asynchronous(compiled: list[dict[str, object]]) -> None:
    assert serialised(compiled) == MAY_SERIALISE


@pytest.mark.usefixtures("compiled")
def test_products_behind_a_wait_whose_threads_may_part_are_told_from_these(cache: Path) -> None:
    parting = []
    for file in cache.rglob("persistent7_kernel.ptx"):
        ptx, num_votes = re.subn(r"vote\.sync\.any\.pred [^;]*;", "", file.read_text())
        assert 0 < num_votes == ptx.count("bra.uni THERE")
        parting.append(ptx.replace("bra.uni THERE", "bra THERE"))
    # Not of every form: that is why more than one is compiled.
    assert any(waits_for_products(ptx) for ptx in parting)


def test_every_kernel_fits_the_shared_memory_of_a_program(
    compiled: list[dict[str, object]],
) -> None:
    assert all(0 <= int(str(line["shared"])) <= HOPPER_SHARED for line in compiled)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_form_of_every_kernel_compiles_and_spills_nothing_that_matters(
    tmp_path: Path,
) -> None:
    lines = compile_cases(tmp_path)
    assert len(lines) > len({str(line["kernel"]).split()[0] for line in lines})
    assert spilt(lines) == []
    assert serialised(lines) == MAY_SERIALISE
