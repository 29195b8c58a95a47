"""Timing on a CUDA device, and the JSON lines that a benchmark leaves.

A line's cell is what it was measured of; of several lines of a cell the newest counts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Machine:
    """What a result was measured on; every line carries it.

    `read_tb_per_s` is what reading memory reaches there, 0 where it was not measured.
    """

    card: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str
    read_tb_per_s: float


@dataclass(frozen=True)
class Times:
    """Milliseconds a step: median and 99th percentile of single replays."""

    median_ms: float
    p99_ms: float


def machine() -> Machine:
    """Describe this machine, and measure what its memory can deliver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return Machine(
        card=torch.cuda.get_device_name(),
        driver=_run(query).splitlines()[0],
        torch=torch.__version__,
        triton=triton.__version__,
        commit=_commit(),
        date=time.strftime("%Y-%m-%d"),
        read_tb_per_s=round(read_bandwidth() / 1e12, 2),
    )


def host() -> Machine:
    """Describe this machine without its CUDA device: the processor is the card."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        info = Path("/proc/cpuinfo").read_text()
        model = next(x.split(":")[1].strip() for x in info.splitlines() if "model name" in x)
    return Machine(
        card=f"{model} x {os.cpu_count()}",
        driver="none",
        torch=torch.__version__,
        triton=triton.__version__,
        commit=_commit(),
        date=time.strftime("%Y-%m-%d"),
        read_tb_per_s=0.0,
    )


def read_bandwidth() -> float:
    """Return bytes per second of summing 8 GB, the best of 20 passes."""
    data = torch.randn(2**31, device="cuda")
    for _ in range(3):
        data.sum()
    times = [_elapsed_ms(data.sum) for _ in range(20)]
    size = data.numel() * data.itemsize
    # Other processes may need the memory.
    del data
    torch.cuda.empty_cache()
    return size / (min(times) / 1e3)


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Run `step` once to compile it, then capture it."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def time_replays(
    graph: torch.cuda.CUDAGraph, *, count: int | None = None, budget_s: float = 0.4
) -> Times:
    """Time single replays by events.

    Args:
        graph: what is replayed.
        count: of replays, after ten that are not counted; None takes as many as `budget_s`
            holds, at least 20 and at most 400.
        budget_s: seconds.
    """
    if count is None:
        # What the first replays pay (pages, clocks) must not cut the count.
        first_ms = min(_replays_ms(graph, 3))
        count = max(20, min(400, int(1e3 * budget_s / first_ms)))
    _replays_ms(graph, min(10, count // 2))
    times = sorted(_replays_ms(graph, count))
    return Times(times[count // 2], times[count * 99 // 100])


def _replays_ms(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def write_line(benchmark: str, fields: dict[str, object], on: Machine, folder: Path) -> None:
    """Print one result and append it to `<folder>/<benchmark>.jsonl`."""
    line = json.dumps({"benchmark": benchmark} | fields | asdict(on))
    print(line, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{benchmark}.jsonl").open("a") as file:
        file.write(line + "\n")


def _elapsed_ms(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _commit() -> str:
    """Return the checkout's commit, or MRSS_COMMIT where there is no repository."""
    return os.environ.get("MRSS_COMMIT") or commit_of(Path(__file__).parent)


def commit_of(folder: Path) -> str:
    """Return the commit of the checkout that `folder` is in, or "unknown"."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
