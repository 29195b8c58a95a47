"""Run every Triton kernel against its oracle: in Triton's interpreter here, on a GPU as `gpu`.

The variable that selects the interpreter must be set before Triton is imported, so the checks
under `interpreted/` run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "interpreted"

# All of them, the slow ones too, in two processes, so that each one's time is bounded.
PREFILL = ("check_ragged", "check_wkv6_chunk.py", "check_wkv_chunk.py", "check_fla.py")
FILES = sorted(CHECKS.glob("check_*.py"))
PARTS = {
    "decode": [path for path in FILES if not path.name.startswith(PREFILL)],
    "prefill": [path for path in FILES if path.name.startswith(PREFILL)],
}


def run_checks(files: list[Path], *, everything: bool, **variables: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(CHECKS), str(CHECKS.parents[1]), env.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-o", "python_files=check_*.py"]
    options += ["-m", ""] if everything else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, files)],
        env=env | variables,
        capture_output=True,
        text=True,
        timeout=580 if everything else 280,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_kernels_equal_their_reference_in_the_interpreter() -> None:
    run_checks(FILES, everything=False, TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", PARTS)
def test_every_check_passes_in_the_interpreter(part: str) -> None:
    run_checks(PARTS[part], everything=True, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", PARTS)
def test_kernels_equal_their_reference_on_a_gpu(part: str) -> None:
    run_checks(PARTS[part], everything=True)
