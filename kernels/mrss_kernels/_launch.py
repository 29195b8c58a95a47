"""What every launch needs to know: the device's abilities, and the sizes that Triton accepts."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

# Multiply-add contraction is what the error bounds were measured with; Triton 3.9 warns when this
# is left unsaid, because 3.10 will turn it off.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

MIN_HEAD_SIZE, MAX_HEAD_SIZE = 16, 256


def is_interpreted() -> bool:
    """Tell whether Triton runs its kernels in Python on CPU tensors (`TRITON_INTERPRET=1`)."""
    # Here and not above: the reference ops run where there is no Triton.
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _has_dependent_launch(index: int | None) -> bool:
    # ROCm counts its capabilities otherwise.
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (9, 0)


def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Return the launch options of a kernel that may start before the last one has ended.

    On compute capability 9.0 and above that is programmatic dependent launch: the kernel's `PDL`
    flag is set and it waits by itself before it touches what earlier kernels write.
    """
    if device.type == "cuda" and _has_dependent_launch(device.index):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may have on a CUDA device; else 0."""
    if device.type != "cuda":
        return 0
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least `n` (n >= 1)."""
    return 1 << (n - 1).bit_length()
