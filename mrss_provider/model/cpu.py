"""What a CPU process sets once for fast decoding: threads and the allocator."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def configure_cpu(threads: int) -> int:
    """Set torch's intra-op threads and keep freed memory in the process; return the threads.

    Args:
        threads: as `set_threads` takes them.
    """
    count = set_threads(threads)
    keep_freed_memory()
    return count


def set_threads(threads: int) -> int:
    """Set torch's intra-op threads; return how many there are.

    Args:
        threads: 0 takes physical cores - 1, at least 1: with as many OpenMP threads as cores,
            anything else that runs makes a step wait for the slowest thread (37 -> 180 ms seen).
    """
    count = threads if threads > 0 else max(1, physical_cores() - 1)
    torch.set_num_threads(count)
    return count


def physical_cores() -> int:
    """Return the number of physical cores that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, len(cores))


def _siblings(cpu: int) -> str:
    """Return what names the physical core of a logical CPU; the CPU itself if unknown."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def keep_freed_memory() -> None:
    """Give back what is free now, and tell glibc to keep what is freed from now on.

    Otherwise each step maps and faults the same pages in again: 34 -> 17 ms a step at 4 rows.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
