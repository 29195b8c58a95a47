"""Replay a step as one CUDA graph a bucket of rows or tokens, captured when one is first met.

A step is some 200 launches of a few microseconds each; a replay hands them to the device at once.
Rows are padded to the bucket with slot -1, packed tokens with a sequence of slot -1. One graph
holds for one pool and fixed weights.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mrss_provider.model.state import StatePool

BUCKETS: tuple[int, ...] = (
    *range(1, 10),
    *range(10, 17, 2),
    *range(20, 33, 4),
    *range(40, 65, 8),
    *range(80, 129, 16),
    *range(160, 257, 32),
    *range(320, 1025, 64),
)
"""Rows that a graph is captured for. A step of more rows runs without a graph."""

TOKEN_BUCKETS: tuple[int, ...] = (
    *(16, 32, 48, 64, 96, 128, 160, 192, 256),
    *range(320, 513, 64),
    *range(640, 2049, 128),
)
"""Packed tokens that a graph is captured for. A pass over more runs without one: its launches
take less time on the host than on the device."""

SEQUENCE_BUCKETS: tuple[int, ...] = tuple(1 << i for i in range(10))
"""Sequences that a graph of packed tokens is captured for."""

MAX_TOKEN_GRAPHS = 64
"""Graphs of packed tokens that are kept for a pool; the one not used for longest makes room. They
share their activations' memory, so a graph more costs its launches only."""

Step = Callable[[Tensor, Tensor, StatePool], Tensor]


class PackedStep(Protocol):
    """A pass over packed tokens, as `rwkv7_ragged.RaggedStep.forward`."""

    def __call__(
        self,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        slots: Tensor,
        pool: StatePool,
        *,
        all_positions: bool = False,
    ) -> Tensor:
        """Return hidden [n, C], or [T, C] with `all_positions`."""
        ...


class SharedMemory:
    """The memory that a set of graphs shares: their replays never overlap."""

    def __init__(self) -> None:
        self._handle: Any = None

    def handle(self, num_graphs: int) -> Any:
        """Return the handle to capture with when so many graphs hold on to the memory.

        It is gone with the last of them, and so is its handle.
        """
        if self._handle is None or not num_graphs:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    token_ids: Tensor
    slots: Tensor
    hidden: Tensor


class DecodeGraphs:
    """Runs a decode step through CUDA graphs.

    Graphs of a pool are dropped with the pool, and share their memory: what a replay returns is
    copied out before the next one.
    """

    def __init__(self, step: Step) -> None:
        """Wrap `step(token_ids, slots, pool) -> hidden`, which only launches kernels."""
        self._step = step
        self._memory: weakref.WeakKeyDictionary[StatePool, SharedMemory] = (
            weakref.WeakKeyDictionary()
        )
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
        memory = self._memory.setdefault(pool, SharedMemory()).handle(len(self._graphs[pool]))
        with captured(graph, memory, device):
            hidden = self._step(token_ids, slots, pool)
        return _Graph(graph, token_ids, slots, hidden)


@contextlib.contextmanager
def captured(graph: torch.cuda.CUDAGraph, memory: Any, device: torch.device) -> Iterator[None]:
    """Capture into `graph` what is launched within, for a pool of memory by its handle.

    As `torch.cuda.graph`, which would also give back the host's pinned memory that is free: it was
    taken so that states can leave the device without a wait.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    with torch.cuda.stream(_capture_stream(device)):
        graph.capture_begin(memory, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def row_bucket(rows: int) -> int:
    """Return the smallest bucket that holds `rows` rows, at most the last one."""
    return BUCKETS[bisect.bisect_left(BUCKETS, rows)]


@dataclass(frozen=True)
class _PackedGraph:
    graph: torch.cuda.CUDAGraph
    token_ids: Tensor
    cu_seqlens: Tensor
    slots: Tensor
    hidden: Tensor


class RaggedGraphs:
    """Runs passes over few packed tokens through CUDA graphs, and the others without.

    A graph has one sequence more than its bucket: the padding's.
    """

    def __init__(self, step: PackedStep) -> None:
        """Wrap a step that only launches kernels, whose shapes alone decide what it launches."""
        self._step = step
        self._memory: weakref.WeakKeyDictionary[StatePool, SharedMemory] = (
            weakref.WeakKeyDictionary()
        )
        self._graphs: weakref.WeakKeyDictionary[
            StatePool, OrderedDict[tuple[int, int, bool], _PackedGraph]
        ] = weakref.WeakKeyDictionary()

    def forward(
        self,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        slots: Tensor,
        pool: StatePool,
        *,
        all_positions: bool = False,
    ) -> Tensor:
        """Read packed tokens; as the wrapped step, but `hidden` is the caller's own copy."""
        num_tokens, num_seqs = token_ids.shape[0], slots.shape[0]
        fits = 0 < num_tokens <= TOKEN_BUCKETS[-1] and 0 < num_seqs <= SEQUENCE_BUCKETS[-1]
        if all_positions or not fits:
            return self._step(
                token_ids.contiguous(),
                cu_seqlens,
                slots.contiguous(),
                pool,
                all_positions=all_positions,
            )
        graph = self._graph(token_bucket(num_tokens), sequence_bucket(num_seqs), pool)
        graph.token_ids[:num_tokens].copy_(token_ids)
        graph.cu_seqlens[: num_seqs + 1].copy_(cu_seqlens)
        # Sequences between the real ones and the padding's, which is the last, are empty.
        graph.cu_seqlens[num_seqs + 1 : -1].fill_(num_tokens)
        graph.slots[:num_seqs].copy_(slots)
        graph.slots[num_seqs:].fill_(-1)
        graph.graph.replay()
        return graph.hidden[:num_seqs].clone()

    def _graph(self, num_tokens: int, num_seqs: int, pool: StatePool) -> _PackedGraph:
        """Return the graph of a bucket, the newest in its pool's order; capture it if need be."""
        graphs = self._graphs.setdefault(pool, OrderedDict())
        key = (num_tokens, num_seqs, pool.has_offsets)
        if key not in graphs:
            if len(graphs) >= MAX_TOKEN_GRAPHS:
                graphs.popitem(last=False)
            graphs[key] = self._capture(num_tokens, num_seqs, pool)
        graphs.move_to_end(key)
        return graphs[key]

    def _capture(self, num_tokens: int, num_seqs: int, pool: StatePool) -> _PackedGraph:
        device = pool.wkv.device
        token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        # All is padding: the last sequence has every token.
        cu_seqlens = torch.zeros(num_seqs + 2, dtype=torch.int64, device=device)
        cu_seqlens[-1] = num_tokens
        slots = torch.full((num_seqs + 1,), -1, dtype=torch.int64, device=device)
        # Compiles what is not compiled yet; padding leaves the pool as it is.
        self._step(token_ids, cu_seqlens, slots, pool)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        memory = self._memory.setdefault(pool, SharedMemory()).handle(len(self._graphs[pool]))
        with captured(graph, memory, device):
            hidden = self._step(token_ids, cu_seqlens, slots, pool)
        return _PackedGraph(graph, token_ids, cu_seqlens, slots, hidden)


def token_bucket(num_tokens: int) -> int:
    """Return the smallest bucket that holds `num_tokens` packed tokens, at most the last one."""
    return TOKEN_BUCKETS[bisect.bisect_left(TOKEN_BUCKETS, num_tokens)]


def sequence_bucket(num_seqs: int) -> int:
    """Return the smallest bucket that holds `num_seqs` sequences, at most the last one."""
    return SEQUENCE_BUCKETS[bisect.bisect_left(SEQUENCE_BUCKETS, num_seqs)]
