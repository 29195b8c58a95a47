"""Streams of tokens and when they arrived: rates while all run, and the times between arrivals.

Times are `time.monotonic()`, which processes of one machine share.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mrss_provider.backend import Backend, GenerateRequest


class Tape:
    """What came on each of several streams: (time, tokens) an arrival, in order."""

    def __init__(self, num_streams: int) -> None:
        self.arrivals: list[list[tuple[float, int]]] = [[] for _ in range(num_streams)]
        self._num_tokens = [0] * num_streams

    @classmethod
    def of(cls, arrivals: Iterable[Iterable[tuple[float, int]]]) -> Tape:
        """Return a tape that holds `arrivals`."""
        streams = [list(stream) for stream in arrivals]
        tape = cls(len(streams))
        for number, stream in enumerate(streams):
            for when, tokens in stream:
                tape.add(number, when, tokens)
        return tape

    def add(self, stream: int, when: float, tokens: int) -> None:
        """Note an arrival."""
        self.arrivals[stream].append((when, tokens))
        self._num_tokens[stream] += tokens

    def fewest(self) -> int:
        """Return the tokens of the stream that has the fewest."""
        return min(self._num_tokens)

    async def read(self, backend: Backend, requests: Sequence[GenerateRequest]) -> None:
        """Open a stream for each request, all at once, and note what comes until all end."""
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(requests):
                group.create_task(self._read_one(backend, number, request))

    async def _read_one(self, backend: Backend, number: int, request: GenerateRequest) -> None:
        stream = await backend.open(request)
        try:
            async for delta in stream:
                if delta.num_tokens:
                    self.add(number, time.monotonic(), delta.num_tokens)
        finally:
            await stream.aclose()


@dataclass(frozen=True)
class Window:
    """A stretch of time in which every stream ran, and what came in it."""

    begin: float
    end: float
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all streams together."""
        return self.num_tokens / (self.end - self.begin)


def steady_window(tapes: Sequence[Tape]) -> Window:
    """Return what came between the last stream's first arrival and the first stream's last one.

    Raises:
        ValueError: there is no such time: a stream ended before another began.
    """
    streams = [stream for tape in tapes for stream in tape.arrivals]
    if not all(streams):
        raise ValueError("every stream must bring tokens, and one brought none")
    begin = max(stream[0][0] for stream in streams)
    end = min(stream[-1][0] for stream in streams)
    if not begin < end:
        raise ValueError("the streams must run side by side: ask for more tokens")
    inside = [n for stream in streams for when, n in stream if begin < when <= end]
    return Window(begin, end, sum(inside))


def merge_tapes(tapes: Iterable[Tape]) -> Tape:
    """Return one tape with the streams of all."""
    return Tape.of(stream for tape in tapes for stream in tape.arrivals)


@dataclass(frozen=True)
class Gaps:
    """Milliseconds between two arrivals of one stream. An arrival of n tokens counts once."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    tokens_an_event: float

    @classmethod
    def within(cls, tape: Tape, begin: float, end: float) -> Gaps:
        """Return those that overlap a stretch of time; raises as `during`."""
        return cls.during(tape, [(begin, end)])

    @classmethod
    def during(cls, tape: Tape, spans: Sequence[tuple[float, float]]) -> Gaps:
        """Return those that overlap stretches of time, which are apart.

        Raises:
            ValueError: there are none.
        """
        pairs = [
            (later[0] - earlier[0], later[1])
            for begin, end in spans
            for stream in tape.arrivals
            for earlier, later in itertools.pairwise(stream)
            if later[0] > begin and earlier[0] < end
        ]
        if not pairs:
            raise ValueError("streams must bring tokens in that time, and brought none")
        ms = sorted(1e3 * gap for gap, _ in pairs)
        tokens = sum(n for _, n in pairs)
        return cls(ms[len(ms) // 2], ms[len(ms) * 99 // 100], ms[-1], tokens / len(pairs))
