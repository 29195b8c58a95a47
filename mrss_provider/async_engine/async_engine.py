"""AsyncEngine: requests of text to requests of token ids, and the life of the engine's thread."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

from mrss_provider.async_engine.admin import EngineAdmin
from mrss_provider.async_engine.best_of import BestOf, widened
from mrss_provider.async_engine.cards import model_cards
from mrss_provider.async_engine.constraints import constraint_for
from mrss_provider.async_engine.conversations import Conversations
from mrss_provider.async_engine.deadlines import within
from mrss_provider.async_engine.embedding import Embedder
from mrss_provider.async_engine.evidence import user_turn
from mrss_provider.async_engine.lengths import check_lengths, room_for
from mrss_provider.async_engine.loading import Loaded, load
from mrss_provider.async_engine.model_slot import ModelSlot
from mrss_provider.async_engine.pauses import pause_ids
from mrss_provider.async_engine.prompting import (
    check_opening,
    check_session,
    encode,
    evidence_of,
    lead_of,
    prepared,
    prompt_of,
    reader_of,
    stops_of,
)
from mrss_provider.async_engine.resumption import Resumption, opening_text
from mrss_provider.async_engine.stream import TextStream
from mrss_provider.async_engine.thread import EngineThread
from mrss_provider.async_engine.turns import reinjections_of
from mrss_provider.backend import (
    DeltaStream,
    Embeddings,
    EmbedRequest,
    EngineStats,
    GenerateRequest,
    ModelCard,
    SessionInfo,
    StreamInfo,
    Tokens,
)
from mrss_provider.config import EngineConfig
from mrss_provider.engine.request import EngineRequest, ResolvedMixture, resolve_sampling
from mrss_provider.errors import MRSSError


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
        self._embedder = Embedder(self._slot, self._ids)

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
            MRSSError: it cannot be loaded, a folder of the settings cannot be used, or the engine
                is closed.
        """
        if self._slot.config.sessions_dir is not None:
            # Before the model, which takes long: a bad folder is told at once, and leaves nothing.
            await self._conversations.store()
        await self._slot.start()

    async def until_lost(self) -> MRSSError:
        """Return why this engine will not answer again, once its device is lost."""
        return await asyncio.wrap_future(self._slot.lost)

    async def open(self, request: GenerateRequest) -> DeltaStream:
        """Admit a request; waits for the model to be loaded and for a step to end.

        Raises:
            MRSSError: as `Backend.open`.
        """
        if request.best_of is not None:
            return BestOf(await self.open(widened(request)), request)
        started = time.monotonic()
        async with within(request.timeout_s, "the engine did not take the request"):
            return await self._open(request, started)

    async def models(self) -> list[ModelCard]:
        """Return the names that are served, `base` first.

        Raises:
            MRSSError: the model cannot be loaded.
        """
        loaded, _ = await self._parts()
        return model_cards(loaded)

    async def trained_gates(self) -> tuple[str, ...]:
        """Return the names of the trained gates.

        Raises:
            MRSSError: the model cannot be loaded.
        """
        loaded, _ = await self._parts()
        return tuple(sorted(loaded.library.gates))

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Return a vector of each input, read beside the engine's other work.

        Raises:
            MRSSError: as `Embeds.embed`.
        """
        return await self._embedder.embed(request)

    async def tokenize(self, request: GenerateRequest) -> Tokens:
        """Return the tokens that an answer's prompt would have.

        Raises:
            MRSSError: as `Tokenizes.tokenize`.
        """
        _, loaded, _ = await self._resolved(request)
        _, prompt = await prompt_of(prepared(request, loaded.template), loaded)
        loaded.engine.check_ids("prompt", prompt)
        return Tokens(prompt, self.config.max_context_len)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; U+FFFD stands for bytes that are none.

        Raises:
            InvalidRequestError: an id outside the vocabulary.
        """
        loaded, _ = await self._parts()
        loaded.engine.check_ids("tokens", token_ids)
        return await asyncio.to_thread(loaded.tokenizer.decode, token_ids)

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
        check_opening(request)
        async with within(request.timeout_s, "the session was not made"):
            mixture, loaded, thread = await self._resolved(request)
            if request.messages is None:
                engine_request = await self._engine_request(request, loaded, mixture)
            else:
                engine_request = await self._opening(request, loaded, mixture)
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
        mixture, loaded, thread = await self._resolved(request)
        if request.session is None:
            request = prepared(request, loaded.template)
            engine_request = await self._engine_request(request, loaded, mixture)
            return await self._admit(request, engine_request, started, loaded, thread)
        check_session(request)
        going = await self._conversations.resume(request, mixture, loaded)
        try:
            going = replace(going, request=prepared(going.request, loaded.template))
            engine_request = await self._engine_request(going.request, loaded, mixture, going)
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
        stream = TextStream(
            engine_request,
            StreamInfo(
                mixture=mixture.canonical,
                rows=mixture.rows,
                fingerprint=mixture.fingerprint,
                prompt_tokens=len(engine_request.prompt) + _num_answered(engine_request),
            ),
            loaded.tokenizer,
            engine_request.sampling.stop + stops_of(request, loaded.template),
            lead_of(request, loaded.template),
            thread,
            _echo(request, loaded),
            lambda: reader_of(request, loaded.template),
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
        self,
        request: GenerateRequest,
        loaded: Loaded,
        mixture: ResolvedMixture,
        going: Resumption | None = None,
    ) -> EngineRequest:
        if going is not None:
            text, prompt = going.text, going.prompt
        else:
            text, prompt = await prompt_of(request, loaded)
        sampling = resolve_sampling(
            request.sampling,
            mixture,
            temperature=loaded.card.temperature,
            top_p=loaded.card.top_p,
            sampling_order=loaded.sampling_order,
            room=room_for(request, len(prompt), self.config.max_context_len),
        )
        lead = lead_of(request, loaded.template)
        forced: tuple[int, ...] = ()
        if request.given is not None:
            forced = await encode(lead + request.given, loaded)
            sampling = replace(sampling, max_tokens=len(forced))
        check_lengths(request, len(prompt), sampling)
        mixture, reinjections = await reinjections_of(request, text, prompt, mixture, loaded)
        engine_request = EngineRequest(
            id=f"r{next(self._ids)}",
            prompt=prompt,
            mixture=mixture,
            sampling=sampling,
            n=request.n,
            trace=request.mixture.trace,
            forced=forced,
            evidence=await evidence_of(request, text, prompt, mixture, loaded),
            turn=user_turn(request),
            owner=request.owner,
            pauses=pause_ids(loaded.tokenizer, loaded.template.stop),
            score_prompt=_scored(request),
            reinjections=reinjections,
            constraint=await constraint_for(request, loaded, going, lead),
        )
        return engine_request if going is None else going.apply(engine_request)

    async def _opening(
        self, request: GenerateRequest, loaded: Loaded, mixture: ResolvedMixture
    ) -> EngineRequest:
        """Return what reads a chat up to where its next turn begins."""
        options = replace(request.mixture, reinject=None)
        told = opening_text(request, loaded)
        opening = replace(request, messages=None, prompt=told, mixture=options)
        engine_request = await self._engine_request(opening, loaded, mixture)
        text, _ = await prompt_of(request, loaded)
        prompt = engine_request.prompt
        mixture, reinjections = await reinjections_of(request, text, prompt, mixture, loaded)
        return replace(
            engine_request, mixture=mixture, turn=user_turn(request), reinjections=reinjections
        )

    async def _parts(self) -> tuple[Loaded, EngineThread]:
        return await self._slot.parts()

    async def _resolved(
        self, request: GenerateRequest
    ) -> tuple[ResolvedMixture, Loaded, EngineThread]:
        """Return what a request's name means, and the model with the template that it wants."""
        loaded, thread = await self._parts()
        mixture = loaded.library.resolve(request.model, request.mixture)
        return mixture, loaded.speaking(mixture.template), thread


def _left_s(request: GenerateRequest, started: float) -> float:
    if request.timeout_s is None:
        return math.inf
    return started + request.timeout_s - time.monotonic()


def _echo(request: GenerateRequest, loaded: Loaded) -> str:
    """Return what the text of an answer begins with."""
    if not request.echo or request.prompt is None:
        return ""
    prompt = request.prompt
    return prompt if isinstance(prompt, str) else loaded.tokenizer.decode(prompt)


def _scored(request: GenerateRequest) -> int | None:
    """Return how many likeliest tokens are told in the places of the prompt's; None tells none."""
    sampling = request.sampling
    return sampling.top_logprobs if request.echo and sampling.logprobs else None


def _num_answered(request: EngineRequest) -> int:
    """Return how many tokens of the answer were there before."""
    return len(request.start.answer) if request.start is not None else 0
