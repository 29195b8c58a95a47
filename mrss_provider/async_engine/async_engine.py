"""AsyncEngine: requests of text to requests of token ids, and the life of the engine's thread."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Self

from mrss_provider.async_engine.admin import EngineAdmin
from mrss_provider.async_engine.conversations import Conversations
from mrss_provider.async_engine.evidence import find_evidence, reads_prompt, user_turn
from mrss_provider.async_engine.lengths import check_lengths, room_for
from mrss_provider.async_engine.loading import Loaded, load
from mrss_provider.async_engine.model_slot import ModelSlot
from mrss_provider.async_engine.pauses import pause_ids
from mrss_provider.async_engine.resumption import Resumption, opening_text
from mrss_provider.async_engine.stream import TextStream
from mrss_provider.async_engine.thread import EngineThread
from mrss_provider.backend import (
    DeltaStream,
    EngineStats,
    GenerateRequest,
    ModelCard,
    SessionInfo,
    StreamInfo,
)
from mrss_provider.chat import render_prompt
from mrss_provider.config import EngineConfig
from mrss_provider.engine.request import EngineRequest, ResolvedMixture, resolve_sampling
from mrss_provider.errors import RequestTimeoutError

# Above it tokenising takes milliseconds and leaves the event loop.
_MAX_INLINE_CHARS = 20_000


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
        self._slot = ModelSlot(config or EngineConfig.from_env(), loader)
        self.admin = EngineAdmin(self._slot)
        self._ids = itertools.count()
        self._conversations = Conversations(self._slot)

    @property
    def config(self) -> EngineConfig:
        """What is loaded, or is to be."""
        return self._slot.config

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
        await self._slot.start()

    async def open(self, request: GenerateRequest) -> DeltaStream:
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

    def stats(self) -> EngineStats | None:
        """Return the numbers of this moment; None while nothing is loaded."""
        loaded = self._slot.loaded
        return None if loaded is None else loaded.engine.stats()

    async def aclose(self) -> None:
        """End open streams with `EngineUnavailableError` and the thread; idempotent.

        A step gets a few seconds to end. A model that still loads is not waited for: its thread
        ends with the load and keeps nothing.
        """
        await self._slot.aclose()

    async def create_session(self, request: GenerateRequest) -> SessionInfo:
        """Read a prompt, or a chat up to where the next turn begins, and save what the rows are.

        Raises:
            MRSSError: as `KeepsSessions.create_session`.
        """
        loaded, thread = await self._parts()
        opening = request
        if request.messages is not None:
            opening = replace(request, messages=None, prompt=opening_text(request, loaded))
        engine_request = await self._engine_request(opening, loaded)
        engine_request = replace(engine_request, turn=user_turn(request))
        loaded.engine.check(engine_request)
        return await self._conversations.create(request, engine_request, thread)

    async def session(self, session_id: str, owner: str) -> SessionInfo:
        """Return one of the owner's sessions; `NotFoundError` if it is not."""
        return (await self._conversations.store()).info(session_id, owner)

    async def sessions(self, owner: str) -> list[SessionInfo]:
        """Return the owner's sessions, the oldest first."""
        return (await self._conversations.store()).infos(owner)

    async def fork_session(self, session_id: str, owner: str) -> SessionInfo:
        """Save the same conversation once more, under another id."""
        return await self._conversations.fork(session_id, owner)

    async def export_session(self, session_id: str, owner: str) -> bytes:
        """Return a session as a safetensors file with a checksum."""
        return await self._conversations.export(session_id, owner)

    async def import_session(self, data: bytes, owner: str) -> SessionInfo:
        """Save what `export_session` returned, of any owner, under a new id.

        Raises:
            MRSSError: as `KeepsSessions.import_session`.
        """
        return await self._conversations.import_(data, owner)

    async def delete_session(self, session_id: str, owner: str) -> None:
        """Forget a session."""
        store = await self._conversations.store()
        await asyncio.to_thread(store.delete, session_id, owner)

    async def _open(self, request: GenerateRequest, started: float) -> DeltaStream:
        loaded, thread = await self._parts()
        if request.session is None:
            engine_request = await self._engine_request(request, loaded)
            return await self._admit(request, engine_request, started, loaded, thread)
        mixture = loaded.library.resolve(request.model, request.mixture)
        going = await self._conversations.resume(request, mixture, loaded)
        try:
            engine_request = await self._engine_request(going.request, loaded, going)
            stream = await self._admit(going.request, engine_request, started, loaded, thread)
        except BaseException:
            self._conversations.release(going)
            raise
        if going.capture is None:
            return stream
        return self._conversations.stream(stream, going, engine_request, loaded)

    async def _admit(
        self,
        request: GenerateRequest,
        engine_request: EngineRequest,
        started: float,
        loaded: Loaded,
        thread: EngineThread,
    ) -> TextStream:
        loaded.engine.check(engine_request)
        if self.config.cache_dir is not None:
            await asyncio.to_thread(loaded.engine.load_cached, engine_request)
        mixture = engine_request.mixture
        stops = engine_request.sampling.stop
        if request.messages is not None and request.given is None:
            stops += loaded.template.stop
        stream = TextStream(
            engine_request,
            StreamInfo(
                mixture=mixture.canonical,
                rows=mixture.rows,
                fingerprint=mixture.fingerprint,
                prompt_tokens=len(engine_request.prompt) + _num_answered(engine_request),
            ),
            loaded.tokenizer,
            stops,
            _lead(request, loaded),
            thread,
        )
        try:
            await asyncio.wrap_future(thread.add(engine_request, stream, _left_s(request, started)))
        except BaseException:
            # Cancelled while the engine may already have taken it.
            thread.abort(engine_request.id)
            raise
        stream.admit(started, request.timeout_s)
        return stream

    async def _engine_request(
        self, request: GenerateRequest, loaded: Loaded, going: Resumption | None = None
    ) -> EngineRequest:
        mixture = loaded.library.resolve(request.model, request.mixture)
        if going is not None:
            text, prompt = going.text, going.prompt
        else:
            text, prompt = await _prompt_of(request, loaded)
        sampling = resolve_sampling(
            request.sampling,
            mixture,
            temperature=loaded.card.temperature,
            top_p=loaded.card.top_p,
            sampling_order=loaded.sampling_order,
            room=room_for(request, len(prompt), self.config.max_context_len),
        )
        forced: tuple[int, ...] = ()
        if request.given is not None:
            forced = await _encode(_lead(request, loaded) + request.given, loaded)
            sampling = replace(sampling, max_tokens=len(forced))
        check_lengths(request, len(prompt), sampling)
        engine_request = EngineRequest(
            id=f"r{next(self._ids)}",
            prompt=prompt,
            mixture=mixture,
            sampling=sampling,
            n=request.n,
            trace=request.mixture.trace,
            forced=forced,
            evidence=await _evidence(request, text, prompt, mixture, loaded),
            turn=user_turn(request),
            owner=request.owner,
            pauses=pause_ids(loaded.tokenizer, loaded.template.stop),
        )
        return engine_request if going is None else going.apply(engine_request)

    async def _parts(self) -> tuple[Loaded, EngineThread]:
        return await self._slot.parts()


def _left_s(request: GenerateRequest, started: float) -> float:
    if request.timeout_s is None:
        return math.inf
    return started + request.timeout_s - time.monotonic()


async def _prompt_of(
    request: GenerateRequest, loaded: Loaded
) -> tuple[str | None, tuple[int, ...]]:
    """Return what a request's prompt is as text, unless it came as token ids, and as those."""
    prompt = request.prompt
    if request.messages is not None:
        prompt = render_prompt(request.messages, loaded.template)
    if isinstance(prompt, str):
        return prompt, await _encode(prompt, loaded)
    assert prompt is not None
    return None, prompt


def _num_answered(request: EngineRequest) -> int:
    """Return how many tokens of the answer were there before."""
    return len(request.start.answer) if request.start is not None else 0


async def _encode(text: str, loaded: Loaded) -> tuple[int, ...]:
    encode = loaded.tokenizer.encode
    is_short = len(text) <= _MAX_INLINE_CHARS
    return tuple(encode(text) if is_short else await asyncio.to_thread(encode, text))


async def _evidence(
    request: GenerateRequest,
    text: str | None,
    prompt: tuple[int, ...],
    mixture: ResolvedMixture,
    loaded: Loaded,
) -> tuple[range, ...]:
    """Return the positions of what the user wrote, if the mixture's gate reads it."""
    if not reads_prompt(mixture):
        return ()
    arguments = (request, text, prompt, loaded.template, loaded.tokenizer)
    if text is None or len(text) <= _MAX_INLINE_CHARS:
        return find_evidence(*arguments)
    return await asyncio.to_thread(find_evidence, *arguments)


def _lead(request: GenerateRequest, loaded: Loaded) -> str:
    """Return what the model writes before its answer, which is no part of it."""
    # An answer that is continued has its first token behind it.
    messages = request.messages
    begins = messages and messages[-1].role != "assistant"
    return loaded.template.lead if begins else ""
