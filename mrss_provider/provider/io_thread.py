"""The I/O loop of one process: an asyncio event loop on a daemon thread.

LiteLLM calls the provider from several threads and loops (a thread pool for plain functions, the
proxy's loop for coroutines, the caller's thread in the sync SDK), while a connection pool belongs
to one loop. So everything that talks to the engine runs here, and the others hand work over.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from mrss_provider.errors import EngineUnavailableError

T = TypeVar("T")

STOP_WAIT_S = 2.0


class IOThread:
    """An event loop on its own thread, started on first use and stopped at interpreter exit."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        self._at_stop: list[Callable[[], Coroutine[Any, Any, None]]] = []

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop; starts the thread the first time."""
        if self._loop is None:
            with self._lock:
                if self._loop is None:
                    self._loop = self._start()
        return self._loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` on the loop; cancelling the future cancels it there.

        Raises:
            EngineUnavailableError: the thread has been stopped.
        """
        loop = self.loop
        with self._lock:
            if not self._is_stopped:
                return asyncio.run_coroutine_threadsafe(coroutine, loop)
        coroutine.close()
        raise EngineUnavailableError("the provider was closed before the call began")

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the loop and wait for it; an interrupt cancels it."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call_soon(self, callback: Callable[..., object], *args: object) -> None:
        """Call `callback` on the loop, without waiting; nothing happens after `stop`."""
        loop = self._loop
        if loop is not None and not loop.is_closed() and os.getpid() == self.pid:
            loop.call_soon_threadsafe(callback, *args)

    def at_stop(self, callback: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Await `callback()` on the loop before it stops."""
        self._at_stop.append(callback)

    def stop(self) -> None:
        """Cancel what runs, await the `at_stop` callbacks and end the thread; idempotent."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None or os.getpid() != self.pid or not thread.is_alive():
            return
        atexit.unregister(self.stop)
        asyncio.run_coroutine_threadsafe(self._finish(), loop)
        thread.join(STOP_WAIT_S)

    def _start(self) -> asyncio.AbstractEventLoop:
        loop = _new_loop()
        self._thread = threading.Thread(
            target=self._serve, args=(loop,), name="mrss-io", daemon=True
        )
        self._thread.start()
        atexit.register(self.stop)
        return loop

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            with self._lock:
                self._is_stopped = True
            # What came while it stopped, for which somebody may wait.
            loop.run_until_complete(_cancel_others())
            loop.close()

    async def _finish(self) -> None:
        await _cancel_others()
        await asyncio.gather(*(close() for close in self._at_stop), return_exceptions=True)
        asyncio.get_running_loop().stop()


async def _cancel_others() -> None:
    """Cancel what runs beside this, and wait for its end."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _new_loop() -> asyncio.AbstractEventLoop:
    """Return uvloop's where it is installed (LiteLLM's proxy brings it): it is cheaper a chunk."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
