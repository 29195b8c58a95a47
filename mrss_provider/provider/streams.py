"""The object that LiteLLM iterates over: chunks of one answer, asynchronously or not."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Self

from litellm.types.utils import ModelResponseStream

from mrss_provider.backend import Delta
from mrss_provider.provider.answers import RunningAnswer
from mrss_provider.provider.chunks import StreamChunks
from mrss_provider.provider.error_map import BrokenOff, to_litellm


class ChunkStream:
    """Chunks of a running answer; whoever stops reading ends it.

    A class and not a generator: a generator that was never started has no `finally`, and a
    client may well leave between admission and the first token.
    """

    def __init__(self, answer: RunningAnswer, chunks: StreamChunks, model: str) -> None:
        self._answer = answer
        self._chunks = chunks
        self._model = model
        self._ready: deque[ModelResponseStream] = deque()
        self._ended = False
        # Several threads may read one stream, in turns.
        self._reading, self._writing = threading.Lock(), threading.Lock()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ModelResponseStream:
        while (chunk := self._pop()) is None:
            if self._ended:
                raise StopAsyncIteration
            try:
                self._write(await self._answer.take())
            except Exception as exc:
                self.close()
                raise self._translated(exc) from exc
            except BaseException:
                self.close()
                raise
        return chunk

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ModelResponseStream:
        while (chunk := self._pop()) is None:
            if self._ended:
                raise StopIteration
            try:
                self._read_on()
            except Exception as exc:
                self.close()
                raise self._translated(exc) from exc
            except BaseException:
                self.close()
                raise
        return chunk

    async def aclose(self) -> None:
        """End the answer without waiting for the engine; idempotent."""
        self.close()

    def close(self) -> None:
        """Do as `aclose`."""
        self._ended = True
        self._ready.clear()
        self._answer.cancel()

    def __del__(self) -> None:
        self._answer.cancel()

    def _translated(self, error: Exception) -> Exception:
        return to_litellm(BrokenOff(error) if self._answer.was_admitted else error, self._model)

    def _pop(self) -> ModelResponseStream | None:
        try:
            return self._ready.popleft()
        except IndexError:
            return None

    def _read_on(self) -> None:
        with self._reading:
            # Else somebody else has read what this one waited for.
            if not self._ready and not self._ended:
                self._write(self._answer.take_blocking())

    def _write(self, deltas: Sequence[Delta]) -> None:
        with self._writing:
            if deltas:
                self._ready.extend(self._chunks.write(deltas, self._answer.info))
            elif not self._ended:
                # Each of several readers is told of the end; one has the last chunks.
                self._ready.extend(self._chunks.end())
                self._ended = True
