"""Pacer: with many streams, each one's tokens are written a few at a time.

An event costs about the same for one token as for three. Nothing is held back while there are few
streams, and never an answer's first event.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

# What one event costs, and the part of one core that all of them together may take.
_EVENT_S = 20e-6
_SHARE = 0.4
# A shorter pause than this saves nothing: with so many streams no step is that short.
_SHORTEST_S = 2e-3
# Streams whose turns are closer together than this go on at once.
_RESOLUTION_S = 5e-4


class Pacer:
    """The pace of one server's streams. Belongs to one event loop.

    Args:
        longest_s: no event waits longer for its turn; 0 holds nothing back.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._num_streams = 0
        # Who waits until when, in the order of arrival: pauses are alike, so that is about the
        # order of their ends.
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()

    @property
    def pause_s(self) -> float:
        """What a stream waits between two events: 0 for few streams, more the more there are."""
        wanted_s = self._num_streams * _EVENT_S / _SHARE
        return min(wanted_s, self._longest_s) if wanted_s >= _SHORTEST_S else 0.0

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count a stream that is being written."""
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1

    async def pause(self) -> None:
        """Wait, after an event, for the turn of the next one."""
        pause_s = self.pause_s
        if not pause_s:
            return
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        if not self._waiting:
            loop.call_later(pause_s, self._go_on, loop)
        self._waiting.append((loop.time() + pause_s, turn))
        await turn

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + _RESOLUTION_S
        while self._waiting and self._waiting[0][0] <= due:
            _, turn = self._waiting.popleft()
            # Whoever hung up meanwhile waits no more.
            if not turn.done():
                turn.set_result(None)
        if self._waiting:
            loop.call_at(self._waiting[0][0], self._go_on, loop)
