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


def run_checks(name: str, **variables: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(CHECKS), str(CHECKS.parents[1]), env.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-o", "python_files=check_*.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(CHECKS / name)],
        env=env | variables,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted(path.name for path in CHECKS.glob("check_*.py")))
def test_kernels_equal_their_reference_in_the_interpreter(name: str) -> None:
    run_checks(name, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(path.name for path in CHECKS.glob("check_*.py")))
def test_kernels_equal_their_reference_on_a_gpu(name: str) -> None:
    run_checks(name)
