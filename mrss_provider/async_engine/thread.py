"""EngineThread: the one thread that calls `Engine`, and the only way to it."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from mrss_provider.async_engine.waits import Queueing, Waits
from mrss_provider.engine.request import EngineRequest, TokenOutput
from mrss_provider.errors import EngineError, EngineUnavailableError, MRSSError

logger = logging.getLogger(__name__)


class StepEngine(Protocol):
    """What the thread needs of `Engine`."""

    @property
    def has_work(self) -> bool: ...

    def add(self, request: EngineRequest) -> None: ...

    def abort(self, request_id: str, index: int | None = None) -> None: ...

    def step(self) -> list[TokenOutput]: ...

    def close(self) -> None: ...


class Sink(Protocol):
    """Who reads the outputs of a request, on `loop`."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    def on_output(self, output: TokenOutput) -> None:
        """Take one output; called on `loop`."""
        ...

    def on_failure(self, error: MRSSError) -> None:
        """Learn that nothing more will come; called on `loop`."""
        ...


@dataclass(slots=True)
class _Entry:
    sink: Sink
    loop: asyncio.AbstractEventLoop
    unfinished: set[int]


_Message = Callable[[], None]


class EngineThread:
    """Runs `load()` and then steps its engine, both on one thread, until `stop`.

    A dead event loop among the readers ends its own requests and nothing else.

    Args:
        load: makes the engine.
        on_lost: called on this thread when the engine is lost, with its device or by a defect.
    """

    def __init__(
        self,
        load: Callable[[], StepEngine],
        on_lost: Callable[[MRSSError], None] = lambda error: None,
    ) -> None:
        self.loaded: Future[None] = Future()
        self.loaded.set_running_or_notify_cancel()
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()
        self._load = load
        self._on_lost = on_lost
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._entries: dict[str, _Entry] = {}
        self._engine: StepEngine | None = None
        self._waits: Waits | None = None
        self._is_stopping = self._is_lost = False
        self._stopped_by: MRSSError = EngineUnavailableError("the engine was closed")
        self._waiting_for_idle: list[Future[None]] = []
        # Guards `loaded`, and the inbox against messages that nobody would read.
        self._lock = threading.Lock()
        self._closed_by: MRSSError | None = None
        self._thread = threading.Thread(target=self._run, name="mrss-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; `loaded` tells when it takes requests, or why it cannot."""
        self._thread.start()

    def add(self, request: EngineRequest, sink: Sink, within_s: float = math.inf) -> Future[None]:
        """Queue a request; the future tells whether it was admitted. Any thread.

        It is refused where it would probably not start `within_s` seconds.
        """
        admitted: Future[None] = Future()
        admitted.set_running_or_notify_cancel()
        with self._lock:
            if self._closed_by is not None:
                admitted.set_exception(self._closed_by)
            else:
                self._inbox.put(lambda: self._add(request, sink, admitted, within_s))
        return admitted

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one of its answers, before the next step. Any thread."""
        self._inbox.put(lambda: self._abort(request_id, index))

    def when_idle(self) -> Future[None]:
        """Return what is done as soon as no request runs, or the thread has ended. Any thread."""
        idle: Future[None] = Future()
        idle.set_running_or_notify_cancel()
        with self._lock:
            if self._closed_by is not None:
                idle.set_result(None)
            else:
                self._inbox.put(lambda: self._wait_for_idle(idle))
        return idle

    def stop(self, error: MRSSError | None = None) -> None:
        """End all requests with `error`, `EngineUnavailableError` if None, and the thread.

        It ends after its step. Who waits for the model learns of it now, the thread when it has
        loaded it.
        """
        if error is not None:
            self._stopped_by = error
        self._inbox.put(self._stop)
        self._set_loaded(self._stopped_by)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the thread to end."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._load_and_step()
        except Exception as exc:
            # What is aborted is copied on the device, which may be the first to tell of its loss.
            logger.exception("the engine's thread failed")
            error = EngineUnavailableError(
                f"the engine failed and has to be started again ({type(exc).__name__}: {exc})"
            )
            self._is_lost = True
            self._on_lost(error)
            self._close(error)
        finally:
            self.ended.set_result(None)

    def _load_and_step(self) -> None:
        try:
            self._engine = self._load()
        except MRSSError as exc:
            self._close(exc)
            return
        except Exception as exc:
            logger.exception("the engine could not be loaded")
            self._close(EngineError(f"the engine could not be loaded: {exc!r}"))
            return
        if isinstance(self._engine, Queueing):
            self._waits = Waits(self._engine)
        self._set_loaded(None)
        while not self._is_stopping:
            self._take_messages(self._engine)
            if not self._is_stopping and self._engine.has_work:
                self._step(self._engine)
        self._close(self._stopped_by)

    def _close(self, error: MRSSError) -> None:
        """Refuse everything from now on, and end what is there, with `error`."""
        self._is_stopping = True
        with self._lock:
            self._closed_by = error
        self._set_loaded(error)
        self._drop_all()
        # A reader that has not closed its answer holds this thread, and not the model's memory.
        engine, self._engine, self._waits = self._engine, None, None
        while not self._inbox.empty():
            self._inbox.get()()
        self._fail_all(error)
        if engine is not None:
            try:
                engine.close()
            except Exception:
                logger.exception("the engine could not be closed")

    def _drop_all(self) -> None:
        """Let the engine keep the states of what runs; who saves a session waits for them."""
        if self._engine is None or self._is_lost:
            return
        try:
            # The newest first: what waits does not get the rows of what is dropped.
            for request_id in reversed(self._entries):
                self._engine.abort(request_id)
        except Exception:
            logger.exception("the states of running answers could not be kept")

    def _set_loaded(self, error: MRSSError | None) -> None:
        """Tell, if nobody has yet, that requests are taken (None) or why not."""
        with self._lock:
            if self.loaded.done():
                return
            if error is None:
                self.loaded.set_result(None)
            else:
                self.loaded.set_exception(error)

    def _take_messages(self, engine: StepEngine) -> None:
        """Handle what is in the inbox; wait for a message when there is nothing else to do."""
        # Nobody else takes from the inbox.
        while not self._is_stopping and not (engine.has_work and self._inbox.empty()):
            self._inbox.get()()

    def _step(self, engine: StepEngine) -> None:
        try:
            outputs = engine.step()
        except EngineUnavailableError as exc:
            logger.critical("%s", exc)
            self._stopped_by = exc
            self._is_stopping = self._is_lost = True
            self._on_lost(exc)
            return
        except Exception as exc:
            # `Engine.step` turns what it expects into outputs; this is a defect of ours.
            logger.exception("the engine's step failed")
            for request_id in list(self._entries):
                engine.abort(request_id)
            self._fail_all(EngineError(f"the engine failed: {type(exc).__name__}: {exc}"))
        else:
            self._publish(outputs)
        if self._waits is not None:
            self._waits.note()

    def _add(
        self, request: EngineRequest, sink: Sink, admitted: Future[None], within_s: float
    ) -> None:
        if self._engine is None or self._closed_by is not None:
            admitted.set_exception(self._closed_by)
            return
        try:
            if self._waits is not None:
                self._waits.check(request.owner, within_s)
            self._engine.add(request)
        except MRSSError as exc:
            admitted.set_exception(exc)
        except Exception as exc:
            logger.exception("the engine could not take a request")
            admitted.set_exception(EngineError(f"the engine failed: {exc!r}"))
        else:
            self._entries[request.id] = _Entry(sink, sink.loop, set(range(request.n)))
            admitted.set_result(None)

    def _abort(self, request_id: str, index: int | None = None) -> None:
        if self._engine is not None:
            self._engine.abort(request_id, index)
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.unfinished -= entry.unfinished if index is None else {index}
            if not entry.unfinished:
                del self._entries[request_id]
                self._tell_if_idle()

    def _stop(self) -> None:
        self._is_stopping = True

    def _wait_for_idle(self, idle: Future[None]) -> None:
        self._waiting_for_idle.append(idle)
        self._tell_if_idle()

    def _tell_if_idle(self) -> None:
        if not self._entries:
            waiting, self._waiting_for_idle = self._waiting_for_idle, []
            for idle in waiting:
                idle.set_result(None)

    def _publish(self, outputs: Sequence[TokenOutput]) -> None:
        """Hand a step's outputs over, all those of one event loop in one call."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Sink, TokenOutput]]] = {}
        batch: list[tuple[Sink, TokenOutput]] = []
        last_loop: asyncio.AbstractEventLoop | None = None
        for output in outputs:
            entry = self._entries.get(output.request_id)
            if entry is None:
                continue
            if entry.loop is not last_loop:
                last_loop = entry.loop
                batch = batches.setdefault(last_loop, [])
            batch.append((entry.sink, output))
            if output.finish_reason is not None or output.error is not None:
                entry.unfinished.discard(output.index)
                if not entry.unfinished:
                    del self._entries[output.request_id]
        for loop, batch in batches.items():
            if not _call_soon(loop, _deliver, batch):
                for request_id in {output.request_id for _, output in batch}:
                    self._abort(request_id)
        self._tell_if_idle()

    def _fail_all(self, error: MRSSError) -> None:
        entries, self._entries = self._entries, {}
        for entry in entries.values():
            _call_soon(entry.sink.loop, entry.sink.on_failure, error)
        self._tell_if_idle()


def _deliver(batch: Sequence[tuple[Sink, TokenOutput]]) -> None:
    for sink, output in batch:
        try:
            sink.on_output(output)
        except Exception as exc:
            # The others of this step have nothing to do with it.
            logger.exception("a token cannot be taken")
            sink.on_failure(EngineError(f"the answer cannot be read: {exc!r}"))


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], arg: object) -> bool:
    try:
        loop.call_soon_threadsafe(callback, arg)
    except RuntimeError:
        # The loop was closed with the request still running: nobody is left to read it.
        return False
    return True
