"""What NVIDIA's assembler, which comes with Triton, says of compiled kernels."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers and stack bytes from the machine code's own report."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources: {report!r}")
    return {"registers": int(found[1]), "stack": int(found[2])}


def waits_for_products(ptx: str) -> bool:
    """Return whether the assembler serialises products of the tensor cores, which it tells."""
    if "wgmma" not in ptx:
        return False
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [_tool("ptxas"), "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "are serialized" in told


def _tool(name: str) -> str:
    # Not imported: Triton takes long to load.
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "backends/nvidia/bin" / name)
