"""Memory of a device: how much is held, whether it was too little, and giving it back."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator

import torch

# What CUDA, Triton and cuBLAS say where they had no memory and torch did not ask for it: for a
# kernel's code, a graph, a workspace, pinned memory; and what torch says of a CPU's.
_SHORTAGE = re.compile(r"CUDA.*out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory")


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes that this process holds of a CUDA device, and those it has; else zeros."""
    if device.type != "cuda":
        return 0, 0
    held = torch.cuda.memory_reserved(device)
    return held, torch.cuda.get_device_properties(device).total_memory


def takes_work(device: torch.device) -> bool:
    """Tell whether a device still computes; waits for what it is at.

    After an access out of bounds, say, a CUDA device does nothing more for the process, which has
    to be started again.
    """
    if device.type != "cuda":
        return True
    # The first one may tell of a failure that is over.
    return _is_in_step(device) or _is_in_step(device)


def _is_in_step(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def release_memory() -> None:
    """Give back what nothing refers to any more, on the CUDA device too."""
    # A server keeps what it has loaded out of collections.
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release_pinned_memory() -> None:
    """Give back the pinned memory of the host that torch keeps and nothing refers to."""
    if torch.cuda.is_available():
        torch._C._host_emptyCache()


def lacked_memory(error: BaseException) -> bool:
    """Tell whether `error`, or one that it came of, says that memory was short."""
    return any(_is_shortage(each) for each in _chain(error))


def forget_frames(error: BaseException) -> None:
    """Let go of the frames of `error` and of those it came of, and of what these had allocated."""
    for each in _chain(error):
        each.__traceback__ = None


def _is_shortage(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _SHORTAGE.search(str(error)) is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
