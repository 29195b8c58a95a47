"""Waits: how long a request would wait for its rows, from how fast others got theirs.

Belongs to the engine's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from mrss_provider.errors import QueueFullError

# Of the newest interval, in the running mean.
_SHARE = 0.3


@runtime_checkable
class Queueing(Protocol):
    """An engine that tells of its queue."""

    @property
    def num_waiting(self) -> int:
        """Requests without rows."""
        ...

    @property
    def num_started(self) -> int:
        """Requests that got rows, since the start."""
        ...

    def num_before(self, owner: str) -> int:
        """Return about how many requests would get rows before one that `owner` adds now."""
        ...


class Waits:
    """Watches the queue of an engine."""

    def __init__(self, engine: Queueing, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._interval_s = 0.0
        # When the last start was seen, or since when somebody waits; None while nobody does.
        self._since: float | None = None
        self._num_started = 0

    def note(self) -> None:
        """Take in what a step did."""
        engine = self._engine
        if not engine.num_waiting:
            self._since = None
            return
        now, num_new = self._clock(), engine.num_started - self._num_started
        if self._since is not None and not num_new:
            return
        if self._since is not None:
            interval_s = (now - self._since) / num_new
            share = _SHARE if self._interval_s else 1.0
            self._interval_s += share * (interval_s - self._interval_s)
        self._since, self._num_started = now, engine.num_started

    def check(self, owner: str, within_s: float) -> None:
        """Return if a request will probably start in time; nobody is refused for want of knowledge.

        Raises:
            QueueFullError: it would not; better to say so now than when its time is over.
        """
        if not self._engine.num_waiting:
            return
        wait_s = self._interval_s * (1 + self._engine.num_before(owner))
        if wait_s > within_s:
            raise QueueFullError(
                f"the request would wait about {wait_s:.3g} s for its turn and has {within_s:.3g} "
                "s; try again later, or with a longer timeout",
                retry_after_s=wait_s,
            )
