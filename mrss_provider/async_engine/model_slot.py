"""ModelSlot: which model is loaded, the thread that computes with it, and how they are replaced.

Any thread and any event loop may use it. There is one model or none at a time: a card that holds
one does not hold two.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from mrss_provider.async_engine.loading import Loaded
from mrss_provider.async_engine.thread import EngineThread, StepEngine
from mrss_provider.config import EngineConfig
from mrss_provider.errors import ConflictError, EngineUnavailableError, MRSSError

# A step of a large model on a slow CPU; neither `aclose` nor the interpreter's end wait longer.
EXIT_WAIT_S = 5.0

log = logging.getLogger(__name__)

_NONE_LOADED = "no model is loaded; load one with POST /v1/model, or /loadmodel"


@dataclass(frozen=True)
class Plan:
    """What to load, and what is done to it then."""

    config: EngineConfig
    finish: Callable[[Loaded], Loaded] | None = None


class ModelSlot:
    """Holds what `loader` made of the configuration.

    Args:
        config: what to load first.
        loader: makes what a configuration describes; runs on the engine's thread.

    Attributes:
        settings: what the engine was started with.
        loaded: the model that takes requests, or None.
        lost: done with an error when the device is lost, and with it the model for good.
    """

    def __init__(self, config: EngineConfig, loader: Callable[[EngineConfig], Loaded]) -> None:
        self.settings = config
        self.loaded: Loaded | None = None
        self.lost: Future[MRSSError] = Future()
        self.lost.set_running_or_notify_cancel()
        self._plan = Plan(config)
        self._loader = loader
        self._lock = threading.Lock()
        self._thread: EngineThread | None = None
        # Of the model that was taken away, while its answers end.
        self._leaving: EngineThread | None = None
        # Of the thread: a process that is forked has a copy of all of this, but of no thread.
        self._pid = 0
        self._is_closed = False
        self._is_removed = False
        # Done when the model that is being replaced has its successor.
        self._change: Future[None] | None = None

    @property
    def config(self) -> EngineConfig:
        """What is loaded, or is to be."""
        return self._plan.config

    async def start(self) -> None:
        """Load the model; returns at once when it is loaded.

        Raises:
            MRSSError: it cannot be loaded, was removed or lost, is another process's, or the slot
                is closed.
        """
        self._check_process()
        if self.lost.done():
            raise self.lost.result()
        change = self._change
        if change is not None:
            await asyncio.wrap_future(change)
        if self.loaded is None:
            if self._is_removed and not self._is_closed:
                raise EngineUnavailableError(_NONE_LOADED)
            await asyncio.wrap_future(self._start_thread().loaded)

    async def parts(self) -> tuple[Loaded, EngineThread]:
        """Return the model and its thread; waits until there is one.

        Raises:
            MRSSError: as `start`.
        """
        while True:
            await self.start()
            with self._lock:
                if self._is_closed:
                    raise EngineUnavailableError("the engine was closed")
                # Neither: it was taken away for another one in between.
                if self.loaded is not None and self._thread is not None:
                    return self.loaded, self._thread

    async def replace(
        self, plan: Plan, drain_s: float, on_taken: Callable[[], None] = lambda: None
    ) -> None:
        """Let the running answers end, then load another model in the place of this one.

        Whoever asks meanwhile waits. If it cannot be loaded, the one before is loaded again.
        `on_taken` is called when the loaded one takes no more requests.

        Raises:
            ConflictError: another change is under way.
            MRSSError: it cannot be loaded.
        """
        await self._settle()
        with self._changing():
            before, was_removed = self._plan, self._is_removed
            on_taken()
            await self._empty(drain_s, "the model was replaced before the answer was complete")
            try:
                await self._fill(plan)
            except MRSSError:
                if was_removed:
                    self._is_removed = True
                else:
                    log.warning("going back to the model that was loaded before")
                    await self._fill(before)
                raise

    async def remove(self, drain_s: float, on_taken: Callable[[], None] = lambda: None) -> None:
        """Let the running answers end, then unload the model; `on_taken` as in `replace`.

        Raises:
            ConflictError: another change is under way.
        """
        await self._settle()
        with self._changing():
            on_taken()
            await self._empty(drain_s, "the model was removed before the answer was complete")
            self._is_removed = True
            await asyncio.to_thread(_release_memory)

    async def aclose(self) -> None:
        """End open streams with `EngineUnavailableError` and the thread; idempotent.

        A step gets a few seconds to end. A model that still loads is not waited for: its thread
        ends with the load and keeps nothing.
        """
        if self._is_elsewhere:
            return
        with self._lock:
            self._is_closed = True
            # One of them at most: the next model's thread starts when the last one's has ended.
            thread, is_leaving = self._thread or self._leaving, self._leaving is not None
            # Whoever still holds this object does not hold the model's memory.
            loaded, self.loaded = self.loaded, None
        if thread is None:
            return
        thread.stop()
        if loaded is not None or is_leaving:
            # Not in the loop's executor, whose end would wait for as long as the thread lives.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(thread.ended), EXIT_WAIT_S)
                thread.join()

    @property
    def _is_elsewhere(self) -> bool:
        return self._pid not in (0, os.getpid())

    def _check_process(self) -> None:
        """Refuse to wait for a thread that is not in this process."""
        if self._is_elsewhere:
            raise EngineUnavailableError(
                f"the engine is in process {self._pid}, which this one was forked from without its "
                "threads; make an AsyncEngine here, or let both ask one `mrss serve`"
            )

    async def _settle(self) -> None:
        """Wait for a model that still loads: who started it is to learn how that went."""
        self._check_process()
        if self._change is None:
            with contextlib.suppress(MRSSError):
                await self.start()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Make everybody wait who wants the model.

        Raises:
            ConflictError: another change is under way.
            EngineUnavailableError: the device is lost, or the slot closed.
        """
        if self.lost.done():
            raise self.lost.result()
        change: Future[None] = Future()
        change.set_running_or_notify_cancel()
        with self._lock:
            if self._is_closed:
                raise EngineUnavailableError("the engine was closed")
            if self._change is not None:
                raise ConflictError("another model is being loaded or removed; wait for it")
            self._change = change
        try:
            yield
        finally:
            self._change = None
            change.set_result(None)

    async def _empty(self, drain_s: float, why: str) -> None:
        """Take the model away: its answers end, with an error after `drain_s` seconds."""
        with self._lock:
            thread, self._thread, self._leaving = self._thread, None, self._thread
            self.loaded = None
        if thread is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await asyncio.wrap_future(thread.when_idle())
        if not self._is_closed:
            thread.stop(EngineUnavailableError(f"{why}; ask again"))
        await asyncio.wrap_future(thread.ended)
        self._leaving = None

    async def _fill(self, plan: Plan) -> None:
        """Load `plan`; leaves the slot empty if it cannot be loaded."""
        self._plan, self._is_removed = plan, False
        thread = self._start_thread()
        try:
            await asyncio.wrap_future(thread.loaded)
        except MRSSError:
            with self._lock:
                if self._thread is thread:
                    self._thread = None
            raise

    def _start_thread(self) -> EngineThread:
        with self._lock:
            if self._is_closed:
                raise EngineUnavailableError("the engine was closed")
            if self._thread is None:
                plan = self._plan
                thread = EngineThread(lambda: self._load(plan, thread), self._set_lost)
                self._thread = thread
                # A thread that is inside torch when the interpreter ends would crash it.
                atexit.register(_stop_at_exit, weakref.ref(self._thread))
                self._pid = os.getpid()
                self._thread.start()
            return self._thread

    def _set_lost(self, error: MRSSError) -> None:
        if not self.lost.done():
            self.lost.set_result(error)

    def _load(self, plan: Plan, thread: EngineThread) -> StepEngine:
        if self._change is not None:
            _release_memory()
        try:
            loaded = self._make(plan)
        except MRSSError as exc:
            # Whoever keeps the error would keep what had been loaded: its frames have it.
            _forget_frames(exc)
            raise
        with self._lock:
            # Else it was taken away while it loaded.
            if self._thread is thread and not self._is_closed:
                self.loaded = loaded
        return loaded.engine

    def _make(self, plan: Plan) -> Loaded:
        loaded = self._loader(plan.config)
        return loaded if plan.finish is None else plan.finish(loaded)


def _forget_frames(error: BaseException | None) -> None:
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _release_memory() -> None:
    # Not above: torch takes a second to import, and the server listens before.
    from mrss_provider.model.memory import release_memory

    release_memory()


def _stop_at_exit(reference: weakref.ref[EngineThread]) -> None:
    thread = reference()
    if thread is not None:
        thread.stop()
        thread.join(EXIT_WAIT_S)
