"""One running answer: pumped from the engine on the I/O loop, read from any thread or loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial

from mrss_provider.backend import Delta, DeltaStream, StreamInfo
from mrss_provider.errors import EngineUnavailableError, RequestTimeoutError
from mrss_provider.provider.io_thread import IOThread

# A reader this far behind stops the pump (and so, in the end, the engine's sender).
MAX_WAITING = 512


class RunningAnswer:
    """An answer on its way. Built and read outside the I/O loop; the pump runs on it.

    Every delta waits in a list until the reader takes all of them at once: at leisure that is
    one delta, under load many, so the cost of a chunk is paid less often when it matters.

    Args:
        io: where the pump runs.
        open_stream: admits the request; raises `MRSSError`.
        timeout_s: for the first delta from now, and then between deltas. Time that a slow
            reader takes does not count.
    """

    def __init__(
        self, io: IOThread, open_stream: Callable[[], Awaitable[DeltaStream]], timeout_s: float
    ) -> None:
        self._io = io
        self._open_stream = open_stream
        self._timeout_s = timeout_s
        self._admitted: Future[StreamInfo] = Future()
        self._lock = threading.Lock()
        self._waiting: list[Delta] = []
        # Of more than one, where several tasks or threads read one stream.
        self._wake_readers: list[Callable[[], object]] = []
        self._ended = False
        self._error: BaseException | None = None
        # Of the I/O loop alone:
        self._room = asyncio.Event()
        self._silent_since: float | None = None
        self._is_pumped = False
        self._has_begun = False
        self._timed_out = False
        self._timer: asyncio.TimerHandle | None = None
        self._pump_task = io.submit(self._pump())
        self._pump_task.add_done_callback(self._end_unbegun)

    def wait_admitted(self, wait_s: float) -> StreamInfo | None:
        """Block until the request is admitted; None when that takes longer than `wait_s`.

        Raises:
            MRSSError: the request was refused.
        """
        try:
            return self._admitted.result(wait_s)
        except TimeoutError:
            if self._admitted.done():
                raise
            return None

    @property
    def was_admitted(self) -> bool:
        """Whether the engine has taken the request."""
        done = self._admitted.done() and not self._admitted.cancelled()
        return done and self._admitted.exception() is None

    @property
    def info(self) -> StreamInfo:
        """What admission told; only after the first delta or `wait_admitted`."""
        return self._admitted.result(0)

    async def take(self) -> list[Delta]:
        """Return every delta that waits, at least one; an empty list is the end.

        Raises:
            MRSSError: how the answer broke off.
        """
        loop = asyncio.get_running_loop()
        while True:
            arrived = loop.create_future()
            wake = partial(loop.call_soon_threadsafe, _resolve, arrived)
            taken = self._take_or_arm(wake)
            if taken is not None:
                return taken
            await arrived

    def take_blocking(self) -> list[Delta]:
        """Do as `take`, in a thread without a loop."""
        arrived = threading.Event()
        while (taken := self._take_or_arm(arrived.set)) is None:
            arrived.wait()
            arrived.clear()
        return taken

    def cancel(self) -> None:
        """Abort what still runs, without waiting; idempotent, from any thread."""
        self._pump_task.cancel()

    def _take_or_arm(self, wake: Callable[[], object]) -> list[Delta] | None:
        """Return what waits; None when nothing does, and then `wake` is called at the next."""
        with self._lock:
            taken, self._waiting = self._waiting, []
            if not taken:
                if not self._ended:
                    self._wake_readers.append(wake)
                    return None
                if self._error is not None:
                    raise self._error
        if len(taken) >= MAX_WAITING:
            self._io.call_soon(self._room.set)
        return taken

    def _publish(self, delta: Delta | None) -> int:
        """Hand over a delta, or the end; return how many wait."""
        with self._lock:
            if delta is None:
                self._ended = True
            else:
                self._waiting.append(delta)
            num_waiting = len(self._waiting)
            readers, self._wake_readers = self._wake_readers, []
        if readers and not sum(_is_woken(wake) for wake in readers):
            # Nobody will read on.
            self.cancel()
        return num_waiting

    def _end_unbegun(self, pump: Future[None]) -> None:
        """Tell the reader where the pump was cancelled before its first step, and so tells none."""
        if not self._is_pumped:
            self._error = self._cause(asyncio.CancelledError())
            if not self._admitted.done():
                self._admitted.set_exception(self._error)
            self._publish(None)

    async def _pump(self) -> None:
        self._is_pumped = True
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._silent_since = loop.time()
        self._watch(loop, task)
        try:
            await self._forward(loop)
        except (Exception, asyncio.CancelledError) as exc:
            self._error = self._cause(exc)
            if not self._admitted.done():
                self._admitted.set_exception(self._error)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._publish(None)

    async def _forward(self, loop: asyncio.AbstractEventLoop) -> None:
        stream = await self._open_stream()
        try:
            self._admitted.set_result(stream.info)
            async for delta in stream:
                if self._publish(delta) >= MAX_WAITING:
                    self._silent_since = None
                    self._room.clear()
                    await self._wait_for_room()
                self._silent_since = loop.time()
                self._has_begun = True
        finally:
            await stream.aclose()

    async def _wait_for_room(self) -> None:
        # The reader may have taken everything before `_room` was cleared.
        while len(self._waiting) >= MAX_WAITING:
            await self._room.wait()
            self._room.clear()

    def _watch(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
        """Cancel `task` when nothing came for `timeout_s`; one timer for the whole answer."""
        since = self._silent_since if self._silent_since is not None else loop.time()
        left = since + self._timeout_s - loop.time()
        if left <= 0:
            self._timed_out = True
            task.cancel()
        else:
            self._timer = loop.call_later(left, self._watch, loop, task)

    def _cause(self, exc: BaseException) -> BaseException:
        if not isinstance(exc, asyncio.CancelledError):
            return exc
        if self._timed_out:
            when = "between two tokens" if self._has_begun else "before the first token"
            return RequestTimeoutError(
                f"nothing came for {self._timeout_s:g} s {when}; the timeout is LiteLLM's "
                "(`timeout` or `stream_timeout` of the request or the deployment)"
            )
        return EngineUnavailableError("the answer was cancelled")


def _is_woken(wake: Callable[[], object]) -> bool:
    """Wake a reader; False if its loop is closed."""
    try:
        wake()
    except RuntimeError:
        return False
    return True


def _resolve(arrived: asyncio.Future[None]) -> None:
    if not arrived.done():
        arrived.set_result(None)
