"""Lifecycle: whether new work is taken, what still runs, and when an unused engine leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mrss_provider.errors import EngineUnavailableError, MRSSError

logger = logging.getLogger(__name__)


class Lifecycle:
    """The state of one server. Belongs to one event loop.

    Args:
        idle_exit_s: end when there were neither leases nor answers for so many seconds since
            the engine became ready; 0 never does.

    Attributes:
        on_end: called when an engine should leave: it is idle, did not start, or is lost.
        on_ready: each is called whenever a model is ready, the first and those that replace it.
        failure: what the engine could not be started with, or was lost by.
        stopping: set when the server is about to close its connections.
    """

    def __init__(self, idle_exit_s: float = 0.0) -> None:
        self.on_end: Callable[[], None] = lambda: None
        self.on_ready: list[Callable[[], None]] = []
        self.failure: MRSSError | None = None
        self.num_running = 0
        self.num_leases = 0
        self.stopping = asyncio.Event()
        self._idle_exit_s = idle_exit_s
        self._idle_timer: asyncio.TimerHandle | None = None
        self._is_ready = False
        self._not_ready = "the engine is starting; try again soon"
        self._is_draining = False
        self._changed = asyncio.Event()

    def set_ready(self) -> None:
        """Note that the engine is loaded."""
        self._is_ready = True
        self._update()
        for call in self.on_ready:
            call()

    def set_unready(self, why: str) -> None:
        """Note that there is no model, or soon none; requests may wait for the next one."""
        self._is_ready = False
        self._not_ready = why
        self._update()

    def set_failed(self, error: MRSSError) -> None:
        """Note that the engine could not be loaded or is lost, and leave.

        Who is draining was told to leave, and a load that this cuts short is no failure.
        """
        if self._is_draining:
            return
        self.failure = error
        self.on_end()

    def check_ready(self) -> None:
        """Return if the engine answers requests at once.

        Raises:
            EngineUnavailableError: it is starting or draining, or there is no model.
            MRSSError: what it failed to start with.
        """
        self.check_open()
        if not self._is_ready:
            raise EngineUnavailableError(self._not_ready)

    def check_open(self) -> None:
        """Return if new requests are taken (they may wait for the engine to start).

        Raises:
            EngineUnavailableError: the engine is draining.
            MRSSError: what it failed to start with.
        """
        if self.failure is not None:
            raise self.failure
        if self._is_draining:
            raise EngineUnavailableError("the engine is shutting down; ask another one")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count one answer.

        Raises:
            EngineUnavailableError: as `check_open`.
        """
        self.check_open()
        self.num_running += 1
        self._update()
        try:
            yield
        finally:
            self.num_running -= 1
            self._update()

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Count one lease.

        Raises:
            EngineUnavailableError: as `check_open`.
        """
        self.check_open()
        self.num_leases += 1
        self._update()
        try:
            yield
        finally:
            self.num_leases -= 1
            self._update()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; tell whether all of them ended."""
        self._is_draining = True
        self._update()
        logger.info("draining: %d answers have %g s to end", self.num_running, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                while self.num_running:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _update(self) -> None:
        self._changed.set()
        is_idle = self._is_ready and not (self.num_running or self.num_leases or self._is_draining)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if is_idle and self._idle_exit_s > 0:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(self._idle_exit_s, self._expire)

    def _expire(self) -> None:
        logger.info("no client for %g s, leaving", self._idle_exit_s)
        self.on_end()
