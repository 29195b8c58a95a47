"""Memory of a model that is gone, given back before the next one needs it."""

from __future__ import annotations

import gc

import torch


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes that this process holds of a CUDA device, and those it has; else zeros."""
    if device.type != "cuda":
        return 0, 0
    held = torch.cuda.memory_reserved(device)
    return held, torch.cuda.get_device_properties(device).total_memory


def release_memory() -> None:
    """Give back what nothing refers to any more, on the CUDA device too."""
    # A server keeps what it has loaded out of collections.
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
