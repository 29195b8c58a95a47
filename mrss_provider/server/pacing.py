"""Pacer: with many streams, each one's tokens are written a few at a time.

An event costs about the same for one token as for three. Nothing is held back while there are few
streams, and never an answer's first event.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
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

    Attributes:
        pause_s: what a stream waits between two events: 0 for few streams, more the more there are.
    """

    def __init__(self, longest_s: float) -> None:
        self.pause_s = 0.0
        self._longest_s = longest_s
        self._num_streams = 0
        # Who is called when, in the order of arrival: pauses are alike, so that is about the order
        # of their ends.
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()
        self._has_timer = False

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count a stream that is being written."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    async def pause(self) -> None:
        """Wait, after an event, for the turn of the next one."""
        turn = asyncio.get_running_loop().create_future()

        def go_on() -> None:
            # Whoever hung up meanwhile waits no more.
            if not turn.done():
                turn.set_result(None)

        if self.call_after_pause(go_on):
            await turn

    def call_after_pause(self, call: Callable[[], None]) -> bool:
        """Call `call`, which raises nothing, at the turn of the next event; False if that is now.

        It is called even if nobody waits for it any more.
        """
        pause_s = self.pause_s
        if not pause_s:
            return False
        loop = asyncio.get_running_loop()
        if not self._has_timer:
            self._has_timer = True
            loop.call_later(pause_s, self._go_on, loop)
        self._waiting.append((loop.time() + pause_s, call))
        return True

    def _count(self, change: int) -> None:
        self._num_streams += change
        wanted_s = self._num_streams * _EVENT_S / _SHARE
        self.pause_s = min(wanted_s, self._longest_s) if wanted_s >= _SHORTEST_S else 0.0

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + _RESOLUTION_S
        waiting = self._waiting
        # Who is called may wait again, later than this.
        while waiting and waiting[0][0] <= due:
            waiting.popleft()[1]()
        self._has_timer = bool(waiting)
        if waiting:
            loop.call_at(waiting[0][0], self._go_on, loop)
