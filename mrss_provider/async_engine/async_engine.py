"""AsyncEngine: requests of text to requests of token ids, and the life of the engine's thread."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from typing import Self

from mrss_provider.async_engine.loading import Loaded, load
from mrss_provider.async_engine.stream import TextStream
from mrss_provider.async_engine.thread import EngineThread, StepEngine
from mrss_provider.backend import GenerateRequest, ModelCard, StreamInfo
from mrss_provider.chat import render_prompt
from mrss_provider.config import EngineConfig
from mrss_provider.engine.request import EngineRequest, resolve_sampling
from mrss_provider.errors import EngineUnavailableError, RequestTimeoutError

# Above it tokenising takes milliseconds and leaves the event loop.
_MAX_INLINE_CHARS = 20_000
# A step of a large model on a slow CPU; neither `aclose` nor the interpreter's end wait longer.
_EXIT_WAIT_S = 5.0


class AsyncEngine:
    """A `Backend` in this process.

    The model is loaded by `start`, or by the first call that needs it. Any number of event
    loops may use one engine; a stream stays on the loop that opened it.

    Args:
        config: what to load, and limits; `EngineConfig.from_env()` when None.
        loader: makes what `config` describes (tests give their own).
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        loader: Callable[[EngineConfig], Loaded] = load,
    ) -> None:
        self.config = config or EngineConfig.from_env()
        self._loader = loader
        self._lock = threading.Lock()
        self._thread: EngineThread | None = None
        self._loaded: Loaded | None = None
        self._is_closed = False
        self._ids = itertools.count()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Load the model; returns at once when it is loaded.

        Raises:
            MRSSError: it cannot be loaded, or the engine is closed.
        """
        if self._loaded is None:
            await asyncio.wrap_future(self._start_thread().loaded)

    async def open(self, request: GenerateRequest) -> TextStream:
        """Admit a request; waits for the model to be loaded and for a step to end.

        Raises:
            MRSSError: as `Backend.open`.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(request.timeout_s):
                return await self._open(request, started)
        except TimeoutError as exc:
            raise RequestTimeoutError(
                f"the engine did not take the request within {request.timeout_s:g} s"
            ) from exc

    async def models(self) -> list[ModelCard]:
        """Return the names that are served, `base` first.

        Raises:
            MRSSError: the model cannot be loaded.
        """
        loaded, _ = await self._parts()
        return loaded.library.cards()

    async def aclose(self) -> None:
        """End open streams with `EngineUnavailableError` and the thread; idempotent.

        A step gets a few seconds to end. A model that still loads is not waited for: its thread
        ends with the load and keeps nothing.
        """
        with self._lock:
            self._is_closed = True
            thread = self._thread
            # Whoever still holds this object does not hold the model's memory.
            loaded, self._loaded = self._loaded, None
        if thread is None:
            return
        thread.stop()
        if loaded is not None:
            # Not in the loop's executor, whose end would wait for as long as the thread lives.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(thread.ended), _EXIT_WAIT_S)
                thread.join()

    async def _open(self, request: GenerateRequest, started: float) -> TextStream:
        loaded, thread = await self._parts()
        engine_request = await self._engine_request(request, loaded)
        loaded.engine.check(engine_request)
        mixture = engine_request.mixture
        stops, lead = engine_request.sampling.stop, ""
        if request.messages is not None:
            stops += loaded.template.stop
            # An answer that is continued has its first token behind it.
            lead = "" if request.messages[-1].role == "assistant" else loaded.template.lead
        stream = TextStream(
            engine_request,
            StreamInfo(
                mixture=mixture.canonical,
                rows=mixture.rows,
                fingerprint=mixture.fingerprint,
                prompt_tokens=len(engine_request.prompt),
            ),
            loaded.tokenizer,
            stops,
            lead,
            thread,
        )
        try:
            await asyncio.wrap_future(thread.add(engine_request, stream))
        except BaseException:
            # Cancelled while the engine may already have taken it.
            thread.abort(engine_request.id)
            raise
        stream.admit(started, request.timeout_s)
        return stream

    async def _engine_request(self, request: GenerateRequest, loaded: Loaded) -> EngineRequest:
        mixture = loaded.library.resolve(request.model, request.mixture)
        prompt = request.prompt
        if request.messages is not None:
            prompt = render_prompt(request.messages, loaded.template)
        if isinstance(prompt, str):
            encode = loaded.tokenizer.encode
            is_short = len(prompt) <= _MAX_INLINE_CHARS
            prompt = tuple(encode(prompt) if is_short else await asyncio.to_thread(encode, prompt))
        assert prompt is not None
        sampling = resolve_sampling(
            request.sampling,
            mixture,
            temperature=loaded.card.temperature,
            top_p=loaded.card.top_p,
            # An empty prompt is read as the one token that a text begins with.
            room=self.config.max_context_len - max(1, len(prompt)),
        )
        return EngineRequest(
            id=f"r{next(self._ids)}",
            prompt=prompt,
            mixture=mixture,
            sampling=sampling,
            n=request.n,
        )

    async def _parts(self) -> tuple[Loaded, EngineThread]:
        await self.start()
        with self._lock:
            if self._is_closed or self._loaded is None or self._thread is None:
                raise EngineUnavailableError("the engine was closed")
            return self._loaded, self._thread

    def _start_thread(self) -> EngineThread:
        with self._lock:
            if self._is_closed:
                raise EngineUnavailableError("the engine was closed")
            if self._thread is None:
                self._thread = EngineThread(self._load)
                # A thread that is inside torch when the interpreter ends would crash it.
                atexit.register(_stop_at_exit, weakref.ref(self._thread))
                self._thread.start()
            return self._thread

    def _load(self) -> StepEngine:
        loaded = self._loader(self.config)
        with self._lock:
            if not self._is_closed:
                self._loaded = loaded
        return loaded.engine


def _stop_at_exit(reference: weakref.ref[EngineThread]) -> None:
    thread = reference()
    if thread is not None:
        thread.stop()
        thread.join(_EXIT_WAIT_S)
