"""What goes into the graphs of packed tokens, with graphs that run on a CPU."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from mrss_provider.model import cuda_graphs
from mrss_provider.model.cuda_graphs import RaggedGraphs

NUM_SLOTS = 8


class Pool:
    """What each slot has read: the sum of its tokens."""

    def __init__(self) -> None:
        self.sums = torch.zeros(NUM_SLOTS)
        self.has_offsets = False


def step(token_ids, cu_seqlens, slots, pool, *, all_positions=False):
    """Add each sequence's tokens to its slot's sum; return it, and how many tokens came."""
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == len(token_ids)
    assert (cu_seqlens.diff() >= 0).all()
    if all_positions:
        return token_ids.float()[:, None]
    hidden = torch.full((len(slots), 2), -1.0)
    for i, slot in enumerate(slots.tolist()):
        part = token_ids[cu_seqlens[i] : cu_seqlens[i + 1]]
        if slot >= 0:
            pool.sums[slot] += part.sum()
            hidden[i] = torch.stack((pool.sums[slot], torch.tensor(float(len(part)))))
    return hidden


class Replay:
    """Stands for a graph: a replay runs the step on the graph's own inputs."""

    def __init__(self, inputs, pool) -> None:
        self._inputs, self._pool = inputs, pool
        self.hidden = step(*inputs, pool)

    def replay(self) -> None:
        self.hidden.copy_(step(*self._inputs, self._pool))


@pytest.fixture
def captured(monkeypatch):
    """Let graphs be captured on a CPU; return the list of buckets that were."""
    buckets = []

    def capture(self, num_tokens, num_seqs, pool):
        buckets.append((num_tokens, num_seqs))
        inputs = (
            torch.zeros(num_tokens, dtype=torch.int64),
            torch.tensor([0] * (num_seqs + 1) + [num_tokens]),
            torch.full((num_seqs + 1,), -1),
        )
        replay = Replay(inputs, pool)
        return cuda_graphs._PackedGraph(replay, *inputs, replay.hidden)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", tuple)
    monkeypatch.setattr(RaggedGraphs, "_capture", capture)
    return buckets


def compare(graphs, pools, lengths, slots):
    tokens = torch.arange(1, sum(lengths) + 1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    args = (tokens, bounds, torch.tensor(slots))
    assert torch.equal(graphs.forward(*args, pools[0]), step(*args, pools[1]))
    assert torch.equal(pools[0].sums, pools[1].sums)


def test_what_is_padded_to_a_bucket_gives_the_same(captured) -> None:
    graphs, pools = RaggedGraphs(step), (Pool(), Pool())
    for lengths, slots in (
        ([4, 1, 1], [4, 0, 2]),
        ([1, 2, 2, 9], [0, 1, 4, 3]),
        ([7], [6]),
        ([1] * 5, [7, 6, 1, 0, 3]),
        ([16], [2]),
    ):
        compare(graphs, pools, lengths, slots)
    assert captured == [(16, 4), (16, 1), (16, 8)]


def test_too_much_runs_without_a_graph(captured) -> None:
    graphs, pools = RaggedGraphs(step), (Pool(), Pool())
    compare(graphs, pools, [2100, 1], [3, 1])
    bounds = torch.tensor([0, 2])
    hidden = graphs.forward(
        torch.tensor([5, 6]), bounds, torch.tensor([0]), Pool(), all_positions=True
    )
    assert hidden.tolist() == [[5.0], [6.0]]
    assert captured == []


def test_the_graph_not_used_for_longest_makes_room(captured, monkeypatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_TOKEN_GRAPHS", 2)
    graphs, pools = RaggedGraphs(step), (Pool(), Pool())
    for length in (10, 20, 10, 40, 10, 20):
        compare(graphs, pools, [length], [1])
    assert captured == [(16, 1), (32, 1), (48, 1), (32, 1)]
    assert list(graphs._graphs[pools[0]]) == [(16, 1, False), (32, 1, False)]
    assert isinstance(graphs._graphs[pools[0]], OrderedDict)


def test_a_pool_with_offsets_has_graphs_of_its_own(captured) -> None:
    graphs, pools = RaggedGraphs(step), (Pool(), Pool())
    compare(graphs, pools, [3], [1])
    pools[0].has_offsets = True
    compare(graphs, pools, [3], [1])
    assert captured == [(16, 1), (16, 1)]
