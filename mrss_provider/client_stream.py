"""ClientStream: an answer read from one connection to our own server."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import httpx

from mrss_provider.backend import Delta, StreamInfo
from mrss_provider.errors import (
    EngineError,
    EngineUnavailableError,
    MRSSError,
    RequestTimeoutError,
)
from mrss_provider.http1 import Connection
from mrss_provider.openai_schema import error_from_event, read_chunk


class ClientStream:
    """A `DeltaStream` over one connection. Deltas that came together are returned as one."""

    def __init__(
        self,
        info: StreamInfo,
        connection: Connection,
        timeout_s: float,
        on_end: Callable[[ClientStream], None],
    ) -> None:
        self.info = info
        self._connection = connection
        self._on_end = on_end
        self._ready: deque[Delta] = deque()
        self._rest = b""
        self._is_done = False
        self._error: MRSSError | None = None
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, timeout_s)

    def __aiter__(self) -> ClientStream:
        return self

    async def __anext__(self) -> Delta:
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self._is_done:
                raise StopAsyncIteration
            await self._read()
        return self._ready.popleft()

    def ready(self) -> bool:
        """Whether the next delta is already here."""
        return bool(self._ready)

    async def aclose(self) -> None:
        """Close the connection, which aborts the answer; idempotent."""
        self._ready.clear()
        self._end()

    def fail(self, error: MRSSError) -> None:
        """End the stream with `error` after what has already come."""
        if not self._is_done:
            self._error = self._error or error
        self._end()

    async def _read(self) -> None:
        try:
            data = await self._connection.read()
            if data:
                self._take(data)
            elif not self._is_done:
                raise EngineUnavailableError("the engine's answer broke off before its end")
        except httpx.HTTPError as exc:
            # After `aclose` the reader that was waiting just stops.
            if not self._is_done:
                self.fail(translate(exc, "the engine"))
        except MRSSError as exc:
            self.fail(exc)
        except (ValueError, RecursionError) as exc:
            self.fail(EngineError(f"the engine sent an event that is no JSON ({exc})"))

    def _take(self, data: bytes) -> None:
        events = (self._rest + data).split(b"\n\n")
        self._rest = events.pop()
        deltas: list[Delta] = []
        try:
            for event in events:
                if event == b"data: [DONE]":
                    self._end()
                    break
                if not event.startswith(b"data: "):
                    # A comment keeps a connection alive; nothing else is expected.
                    continue
                chunk = json.loads(event[6:])
                if isinstance(chunk, dict) and "error" in chunk:
                    self._error = error_from_event(chunk) or EngineError("the engine sent an error")
                    self._end()
                    break
                deltas.append(read_chunk(chunk))
        finally:
            # What came before an event that cannot be read is the caller's.
            self._ready.extend(deltas if len(deltas) < 2 else _coalesce(deltas))

    def _expire(self, timeout_s: float) -> None:
        self.fail(RequestTimeoutError(f"no complete answer within {timeout_s:.3g} s"))

    def _end(self) -> None:
        self._is_done = True
        self._timer.cancel()
        self._connection.close()
        self._on_end(self)


def _coalesce(deltas: Sequence[Delta]) -> list[Delta]:
    """Join neighbours of the same choice."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if (
            last is None
            or last.index != delta.index
            or last.finish_reason is not None
            or last.usage is not None
            or delta.usage is not None
        ):
            joined.append(delta)
        else:
            joined[-1] = replace(
                delta,
                text=last.text + delta.text,
                num_tokens=last.num_tokens + delta.num_tokens,
                logprobs=last.logprobs + delta.logprobs,
                trace=last.trace + delta.trace,
                reasoning=last.reasoning + delta.reasoning,
                tool_calls=last.tool_calls + delta.tool_calls,
            )
    return joined


def translate(exc: httpx.HTTPError, where: str) -> MRSSError:
    """Return our error for one of the transport's; `where` is who did not answer."""
    if isinstance(exc, httpx.ReadTimeout):
        return RequestTimeoutError(f"{where} did not answer in time ({exc})")
    if isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout):
        return EngineUnavailableError(f"no engine answers at {where} ({exc})")
    return EngineUnavailableError(f"the connection to {where} broke off ({exc})")
