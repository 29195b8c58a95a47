"""Compile every Triton kernel to Hopper machine code without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mrss_kernels
import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


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
