"""Merged: the streams of one answer (one for each prompt) as a single one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from mrss_provider.backend import Delta, DeltaStream, StreamInfo, Usage


def merge(streams: Sequence[DeltaStream], n: int) -> DeltaStream:
    """Return one stream of all, of `n` choices each; a single stream is itself."""
    return streams[0] if len(streams) == 1 else Merged(streams, n)


class Merged:
    """A `DeltaStream`: the deltas of several streams in the order of arrival.

    Stream i's choices become i*n .. i*n + n-1. One usage, the sum, comes at the end.
    """

    def __init__(self, streams: Sequence[DeltaStream], n: int) -> None:
        self.info = _joined_info(streams)
        self._streams = streams
        self._n = n
        self._usage: Usage | None = None
        self._pending: dict[asyncio.Task[Delta], int] | None = None
        self._ready: deque[Delta] = deque()

    def __aiter__(self) -> Merged:
        return self

    def ready(self) -> bool:
        """Tell whether the next delta, or the end, is already here."""
        return bool(self._ready)

    async def __anext__(self) -> Delta:
        if self._pending is None:
            self._pending = {_next_of(s): i for i, s in enumerate(self._streams)}
        while not self._ready:
            if not self._pending:
                raise StopAsyncIteration
            try:
                await self._wait()
            except BaseException:
                for task in self._pending:
                    task.cancel()
                await asyncio.gather(*self._pending, return_exceptions=True)
                raise
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Close every stream."""
        for stream in self._streams:
            await stream.aclose()

    async def _wait(self) -> None:
        assert self._pending is not None
        done, _ = await asyncio.wait(self._pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            i = self._pending.pop(task)
            try:
                delta = task.result()
            except StopAsyncIteration:
                continue
            self._pending[_next_of(self._streams[i])] = i
            if delta.usage is not None:
                self._usage = delta.usage if self._usage is None else self._usage + delta.usage
            self._ready.append(replace(delta, index=delta.index + i * self._n, usage=None))
        if not self._pending and self._usage is not None:
            self._ready.append(Delta(usage=self._usage))


def _joined_info(streams: Sequence[DeltaStream]) -> StreamInfo:
    """Return the first stream's info with every prompt's tokens; all are of one mixture."""
    first = streams[0].info
    total = sum(stream.info.prompt_tokens for stream in streams)
    return StreamInfo(first.mixture, first.rows, first.fingerprint, total)


def _next_of(stream: DeltaStream) -> asyncio.Task[Delta]:
    async def take() -> Delta:
        return await anext(stream)

    return asyncio.create_task(take())
