"""Replay a decode step as one CUDA graph a row bucket, captured when a bucket is first met.

A step is some 200 launches of a few microseconds each; a replay hands them to the device at once.
Rows are padded to the bucket with slot -1. One graph holds for one pool and fixed weights.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mrss_provider.model.state import StatePool

BUCKETS: tuple[int, ...] = (
    *range(1, 9),
    *range(10, 17, 2),
    *range(20, 33, 4),
    *range(40, 65, 8),
    *range(80, 129, 16),
    *range(160, 257, 32),
    *range(320, 1025, 64),
)
"""Rows that a graph is captured for. A step of more rows runs without a graph."""

Step = Callable[[Tensor, Tensor, StatePool], Tensor]


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    token_ids: Tensor
    slots: Tensor
    hidden: Tensor


class DecodeGraphs:
    """Runs a decode step through CUDA graphs.

    Graphs of a pool are dropped with the pool. All share one memory pool: replays never overlap,
    and what a replay returns is copied out before the next one.
    """

    def __init__(self, step: Step) -> None:
        """Wrap `step(token_ids, slots, pool) -> hidden`, which only launches kernels."""
        self._step = step
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakKeyDictionary[StatePool, dict[tuple[int, bool], _Graph]] = (
            weakref.WeakKeyDictionary()
        )

    def decode(self, token_ids: Tensor, slots: Tensor, pool: StatePool) -> Tensor:
        """Read one token a row; as the wrapped step, but `hidden` is the caller's own copy."""
        rows = token_ids.shape[0]
        if not 0 < rows <= BUCKETS[-1]:
            return self._step(token_ids.contiguous(), slots.contiguous(), pool)
        bucket = row_bucket(rows)
        graphs = self._graphs.setdefault(pool, {})
        # Offsets add loads to every layer, so a pool without any has graphs of its own.
        key = (bucket, pool.has_offsets)
        if key not in graphs:
            graphs[key] = self._capture(bucket, pool)
        graph = graphs[key]
        graph.token_ids[:rows].copy_(token_ids)
        graph.slots[:rows].copy_(slots)
        if rows < bucket:
            graph.slots[rows:].fill_(-1)
        graph.graph.replay()
        return graph.hidden[:rows].clone()

    def _capture(self, bucket: int, pool: StatePool) -> _Graph:
        device = pool.wkv.device
        token_ids = torch.zeros(bucket, dtype=torch.int64, device=device)
        slots = torch.full((bucket,), -1, dtype=torch.int64, device=device)
        # Compiles what is not compiled yet; padding rows leave the pool as it is.
        self._step(token_ids, slots, pool)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            hidden = self._step(token_ids, slots, pool)
        return _Graph(graph, token_ids, slots, hidden)


def row_bucket(rows: int) -> int:
    """Return the smallest bucket that holds `rows` rows, at most the last one."""
    return BUCKETS[bisect.bisect_left(BUCKETS, rows)]
