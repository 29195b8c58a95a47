"""StepGraphs: a whole decode step, from token ids to token ids, as one CUDA graph replay.

A graph is captured for a bucket of rows when it is first met, or before (`prepare`). It reads and
writes tensors at fixed addresses; rows beyond those in use have slot -1 and belong to nobody.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager

import torch

from mrss_provider.model.cuda_graphs import SharedMemory, captured

log = logging.getLogger(__name__)

MAX_GRAPHS = 176
"""Graphs that are kept, the last used ones: four for every bucket, and some more. All share one
pool of memory; each has its launches besides."""


class StepGraphs:
    """Replays what a step launches, by a key that decides all its launches."""

    def __init__(
        self,
        device: torch.device,
        rehearsal: Callable[[], AbstractContextManager[None]],
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        """Keep at most `max_graphs` graphs of work on `device`.

        Within `rehearsal()` a step may run without any effect: its kernels must be compiled and
        loaded before they can be captured.
        """
        self._device = device
        self._rehearsal = rehearsal
        self._max_graphs = max_graphs
        self._memory = SharedMemory()
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Do `step`: by a replay, after capturing it if the key is new."""
        self.prepare(key, step)
        self._graphs.move_to_end(key)
        self._graphs[key].replay()

    def prepare(self, key: Hashable, step: Callable[[], None]) -> None:
        """Capture `step` if the key is new; its effects are not felt."""
        if key in self._graphs:
            return
        if len(self._graphs) >= self._max_graphs:
            # Its last replay may be under way.
            torch.cuda.synchronize(self._device)
            self._graphs.popitem(last=False)
        log.debug("capturing a step: %s", key)
        with self._rehearsal():
            step()
            torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        memory = self._memory.handle(len(self._graphs))
        with captured(graph, memory, self._device):
            step()
        self._graphs[key] = graph

    def clear(self) -> None:
        """Drop every graph: an address that they read is no longer that."""
        if self._graphs:
            torch.cuda.synchronize(self._device)
        self._graphs.clear()
