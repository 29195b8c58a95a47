"""Rates and gaps of streams, against counts by hand."""

import asyncio
import json
from dataclasses import dataclass

import pytest
from streams import Gaps, Tape, merge_tapes, steady_window

from mrss_provider.backend import Backend, Delta, DeltaStream, GenerateRequest, ModelCard
from mrss_provider.sampling_params import SamplingParams


def tape(*streams: list[tuple[float, int]]) -> Tape:
    return Tape.of(streams)


def test_the_rate_counts_what_came_while_all_streams_ran() -> None:
    # All run from 2 to 5: the first brings 1 + 2 + 1 tokens then, the second 4.
    first = [(0.0, 1), (2.0, 7), (3.0, 1), (4.0, 2), (5.0, 1)]
    second = [(2.0, 1), (4.5, 4), (6.0, 9)]
    window = steady_window([tape(first), tape(second)])
    assert (window.begin, window.end, window.num_tokens) == (2.0, 5.0, 8)
    assert window.tokens_per_s == pytest.approx(8 / 3)
    assert steady_window([tape(first, second)]) == window


@pytest.mark.parametrize(
    ("streams", "words"),
    [
        ([[(0.0, 1), (1.0, 1)], []], "one brought none"),
        ([[(0.0, 1), (1.0, 1)], [(2.0, 1), (3.0, 1)]], "side by side"),
    ],
)
def test_streams_that_do_not_overlap_have_no_rate(
    streams: list[list[tuple[float, int]]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        steady_window([tape(*streams)])


def test_gaps_are_of_one_stream_and_overlap_the_time_asked_for() -> None:
    both = tape([(0.0, 1), (1.0, 1), (3.0, 3), (9.0, 1)], [(0.5, 1), (2.5, 1)])
    gaps = Gaps.within(both, 1.0, 3.0)
    # 1 to 3, and 0.5 to 2.5: the gap that ends at 1 and the one that begins at 3 are outside.
    assert (gaps.p50_ms, gaps.p99_ms, gaps.max_ms) == (2000.0, 2000.0, 2000.0)
    assert gaps.tokens_an_event == 2.0
    assert Gaps.within(both, 0.0, float("inf")).max_ms == 6000.0
    # Two stretches: 1 to 3 and 0.5 to 2.5, and 3 to 9; what is between them is left out.
    apart = Gaps.during(both, [(1.5, 2.0), (4.0, 5.0)])
    assert (apart.p50_ms, apart.max_ms, apart.tokens_an_event) == (2000.0, 6000.0, 5 / 3)
    with pytest.raises(ValueError, match="brought none"):
        Gaps.within(both, 20.0, 30.0)


def test_a_tape_survives_json_and_merging() -> None:
    one, other = tape([(0.0, 1), (1.0, 2)]), tape([(0.5, 4)])
    again = Tape.of(json.loads(json.dumps(one.arrivals)))
    merged = merge_tapes([again, other])
    assert merged.fewest() == 3
    assert [[tuple(x) for x in stream] for stream in merged.arrivals] == [
        [(0.0, 1), (1.0, 2)],
        [(0.5, 4)],
    ]


@dataclass
class ThreeDeltas:
    """A backend whose streams bring 1, 0 and 2 tokens."""

    num_closed: int = 0

    async def open(self, request: GenerateRequest) -> DeltaStream:
        return _Stream(self)

    async def models(self) -> list[ModelCard]:
        return []

    async def aclose(self) -> None:
        return None


class _Stream:
    def __init__(self, backend: ThreeDeltas) -> None:
        self._backend = backend
        self._left = [1, 0, 2]

    def __aiter__(self) -> "_Stream":
        return self

    async def __anext__(self) -> Delta:
        if not self._left:
            raise StopAsyncIteration
        return Delta(num_tokens=self._left.pop(0))

    async def aclose(self) -> None:
        self._backend.num_closed += 1


def test_reading_notes_what_brings_tokens_and_closes_every_stream() -> None:
    backend: Backend = ThreeDeltas()
    request = GenerateRequest("base", SamplingParams(), prompt="x")
    read = Tape(2)
    asyncio.run(read.read(backend, [request, request]))
    assert [[n for _, n in stream] for stream in read.arrivals] == [[1, 2], [1, 2]]
    assert isinstance(backend, ThreeDeltas)
    assert backend.num_closed == 2
