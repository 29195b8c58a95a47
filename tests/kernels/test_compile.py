"""Compile every Triton kernel to Hopper machine code without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mrss_kernels
import pytest
from mrss_kernels.linear_cuts import HOPPER_SHARED

SCRIPT = Path(__file__).parent / "compile_kernels.py"

# Bytes of a thread: some words that are stored and read once a layer.
MAY_SPILL = {"persistent7_kernel 4096 fp16 fp32 9": 48}


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
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Every kernel in the first of its forms."""
    return compile_cases(tmp_path_factory.mktemp("triton"), "--one-each")


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


def test_no_kernel_spills_registers(compiled: list[dict[str, object]]) -> None:
    assert [line["kernel"] for line in compiled if line["stack"] != 0] == []


def test_products_of_the_tensor_cores_stay_asynchronous(compiled: list[dict[str, object]]) -> None:
    assert [line["kernel"] for line in compiled if line["serialised"]] == []


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
    spilt = {str(line["kernel"]): int(str(line["stack"])) for line in lines}
    assert [name for name, stack in spilt.items() if stack > MAY_SPILL.get(name, 0)] == []
    assert [line["kernel"] for line in lines if line["serialised"]] == []
