"""Stalls: a client that does not read its answer does not hold it, and its connection, for ever.

What waits for a client is bounded: 64 KiB in the connection's buffer (uvicorn's high water mark),
after which a write waits, and behind it the deltas of one answer, at most `max_tokens` of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_ABORT = "mrss.abort"
_SEND = "mrss.send"
# Looks at each write so often within the time that it may take.
_LOOKS = 4


class Write:
    """The writes of one answer, one after the other.

    Args:
        send: ASGI.
        drop: ends the connection.
        server_send: the server's own `send`, behind which nothing looks at a body; None where it
            is not known.
    """

    def __init__(
        self, send: Send, drop: Callable[[], object], server_send: Send | None = None
    ) -> None:
        self.drop = drop
        self.num_looks = 0
        self._send = send
        self._server_send = server_send
        self._rest: _Rest | None = None
        self._is_writing = False

    @property
    def can_begin(self) -> bool:
        """Whether `begin` may be called, once the response has been started."""
        return self._server_send is not None

    def begin(self, body: bytes) -> bool:
        """Write a piece of a body without waiting; tell whether that is done.

        If it is not, the client reads too slowly: `finish` waits for it.
        """
        assert self._server_send is not None
        message = {"type": "http.response.body", "body": body, "more_body": True}
        steps = self._server_send(message).__await__()
        try:
            awaited = next(steps)
        except StopIteration:
            return True
        self._rest = _Rest(steps, awaited)
        return False

    async def finish(self) -> None:
        """Wait for what `begin` could not do, if anything."""
        rest, self._rest = self._rest, None
        if rest is not None:
            await self._watched(rest)

    async def send(self, message: Message) -> None:
        """Write one message; waits while the client does not read."""
        await self._watched(self._send(message))

    async def _watched(self, writing: Awaitable[None]) -> None:
        self.num_looks = 0
        self._is_writing = True
        await writing
        self._is_writing = False

    def look(self) -> bool:
        """Tell whether a write has been under way for a while."""
        if self._is_writing:
            self.num_looks += 1
        return self._is_writing and self.num_looks > _LOOKS


class _Rest:
    """What is left of a coroutine that was begun without a task, for the task that goes on."""

    def __init__(self, steps: Generator[Any, Any, None], awaited: Any) -> None:
        self._steps = steps
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, None]:
        # The task waits for what the coroutine does, as if it had begun it.
        yield self._awaited
        yield from self._steps


class Stalls:
    """Looks after the writes of one server. Belongs to one event loop.

    Args:
        longest_s: a write that takes longer ends its connection.
        on_stall: called for each.
    """

    def __init__(self, longest_s: float, on_stall: Callable[[], None]) -> None:
        self._longest_s = longest_s
        self._on_stall = on_stall
        self._writes: set[Write] = set()
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def watched(self, scope: Scope, send: Send) -> Iterator[Write]:
        """Yield what writes, and is looked after."""
        task = asyncio.current_task()
        assert task is not None
        # Behind another server than ours nobody knows the connection; its task must do.
        write = Write(send, scope.get(_ABORT, task.cancel), scope.get(_SEND))
        self._writes.add(write)
        self._schedule()
        try:
            yield write
        finally:
            self._writes.discard(write)

    def _schedule(self) -> None:
        if self._timer is None and self._writes:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._longest_s / _LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        for write in [write for write in self._writes if write.look()]:
            logger.warning("a client took nothing for %g s and is dropped", self._longest_s)
            self._on_stall()
            self._writes.discard(write)
            write.drop()
        self._schedule()


class KnowsConnection:
    """Tells the application what ASGI has no words for: how to end a connection at once (ASGI).

    Only `abort` frees a connection whose client does not read: closing it waits for the client.
    Also told is the server's own `send`, so that a stream's events do not pass each layer between.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        # uvicorn's `receive` is a method of what has the transport; it has no public way to it.
        transport = getattr(getattr(receive, "__self__", None), "transport", None)
        if transport is not None:
            scope[_ABORT] = transport.abort
        scope[_SEND] = send
        await self._app(scope, receive, send)
