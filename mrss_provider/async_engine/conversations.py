"""Conversations: saved sessions of an `AsyncEngine`: made, gone on with, saved again, moved about.

Files and checksums are for threads; nothing here blocks an event loop.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from mrss_provider.async_engine.loading import Loaded
from mrss_provider.async_engine.model_slot import ModelSlot
from mrss_provider.async_engine.prompting import lead_of, opening_of
from mrss_provider.async_engine.resumption import Resumption, resumption_of, session_after
from mrss_provider.async_engine.saved_stream import Reader, SavedStream
from mrss_provider.async_engine.stream import TextStream
from mrss_provider.async_engine.thread import EngineThread
from mrss_provider.backend import GenerateRequest, SessionInfo
from mrss_provider.engine.request import EngineRequest, ResolvedMixture
from mrss_provider.errors import (
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    StorageError,
)

if TYPE_CHECKING:
    from mrss_provider.engine.continuation import Capture
    from mrss_provider.engine.session import Session
    from mrss_provider.engine.session_store import SessionStore
    from mrss_provider.model import ModelConfig, StateSnapshot
    from mrss_provider.model.packed_tensors import Buffer

# The engine ends an answer between two steps.
_END_WAIT_S = 30.0


class Conversations:
    """The sessions of one engine.

    Args:
        slot: the model.
    """

    def __init__(self, slot: ModelSlot) -> None:
        self._slot = slot
        self._lock = threading.Lock()
        self._store: SessionStore | None = None

    async def store(self) -> SessionStore:
        """Return where sessions are kept.

        Raises:
            ConfigError: the folder cannot be used.
        """
        return await asyncio.to_thread(self._get_store)

    async def create(
        self, request: GenerateRequest, engine_request: EngineRequest, thread: EngineThread
    ) -> SessionInfo:
        """Read the prompt of `engine_request` into a new session.

        Raises:
            MRSSError: as `KeepsSessions.create_session`.
        """
        from mrss_provider.engine.continuation import Capture
        from mrss_provider.engine.session import Session, new_info, states_of

        _check_not_given(request)
        if request.grammar is not None:
            raise InvalidRequestError(
                f"a session is made of a prompt; ask for {request.grammar.param} when it goes on",
                param=request.grammar.param,
            )
        loaded = await self._loaded()
        tokens = engine_request.prompt
        rows: tuple[StateSnapshot, ...] = ()
        # The last token is read by what goes on, which needs to know what it leads to.
        if len(tokens) > 1:
            capture = Capture()
            reader = Reader()
            sampling = replace(engine_request.sampling, max_tokens=1)
            reading = replace(
                engine_request, prompt=tokens[:-1], sampling=sampling, evidence=(), capture=capture
            )
            try:
                await asyncio.wrap_future(thread.add(reading, reader))
                await reader.ended
            except BaseException:
                thread.abort(reading.id)
                raise
            if not capture.states:
                raise StorageError("there is no memory left for the session; try again later")
            rows = capture.states[0].rows
        mixture = engine_request.mixture
        assert engine_request.sampling.seed is not None
        session = Session(
            new_info(request.owner, mixture.canonical, len(tokens)),
            states_of(mixture),
            tokens,
            num_prompt=len(tokens),
            num_read=len(tokens) - 1,
            rows=rows,
            seed=engine_request.sampling.seed,
            turn=engine_request.turn,
            messages=request.messages,
            reinjections=engine_request.reinjections,
        )
        return await asyncio.to_thread(self._put, session, loaded.engine.model_config)

    async def resume(
        self, request: GenerateRequest, mixture: ResolvedMixture, loaded: Loaded
    ) -> Resumption:
        """Return how a request goes on with its session; held if the answer will be saved.

        Raises:
            NotFoundError: no such session of the owner.
            ConflictError: an answer that is saved to it is under way.
            InvalidRequestError: another mixture, or a chat that goes on with a text.
        """
        from mrss_provider.engine.continuation import Capture

        _check_not_given(request)
        assert request.session is not None
        store = await self.store()
        info = store.info(request.session, request.owner)
        capture = Capture() if request.session_save else None
        if capture is not None:
            store.hold(info.id, capture)
        try:
            return await asyncio.to_thread(self._resume, info, request, mixture, loaded, capture)
        except BaseException:
            # Not in the thread, which goes on reading when whoever waits for it gives up.
            store.release(info.id, capture)
            raise

    def stream(
        self, inner: TextStream, resumption: Resumption, request: EngineRequest, loaded: Loaded
    ) -> SavedStream:
        """Return a stream that saves the session before it ends.

        Args:
            inner: the answer.
            resumption: with a `capture`.
            request: as the engine has it.
            loaded: the model.
        """
        # Not `loaded` itself: who reads slowly would keep a model that has been replaced.
        tokenizer, template = loaded.tokenizer, loaded.template
        model_config = loaded.engine.model_config
        asked = resumption.request

        def run(text: str, reason: str) -> None:
            opening, lead = opening_of(asked, template), lead_of(asked, template)
            session = session_after(resumption, request, tokenizer, opening, lead, text, reason)
            # Deleted meanwhile: it does not come back.
            self._put(session, model_config, is_new=False)

        async def save(text: str, reason: str) -> None:
            assert resumption.capture is not None
            ended = asyncio.wrap_future(resumption.capture.ended)
            try:
                await asyncio.wait_for(asyncio.shield(ended), _END_WAIT_S)
            except TimeoutError as exc:
                raise EngineUnavailableError("the engine ended before it was saved") from exc
            await asyncio.to_thread(run, text, reason)

        return SavedStream(inner, save, lambda: self.release(resumption))

    def release(self, resumption: Resumption) -> None:
        """Let others save to a session that `resume` holds; idempotent."""
        if self._store is not None:
            self._store.release(resumption.session.info.id, resumption.capture)

    async def fork(self, session_id: str, owner: str) -> SessionInfo:
        """Save a session once more, under another id."""
        loaded = await self._loaded()
        data = await asyncio.to_thread((await self.store()).get, session_id, owner)
        return await asyncio.to_thread(self._import, data, owner, loaded)

    async def export(self, session_id: str, owner: str) -> bytes:
        """Return a session as bytes that do not tell whose it was."""
        loaded = await self._loaded()

        def run() -> bytes:
            session = self._read(self._get_store().get(session_id, owner), loaded)
            bare = replace(session, info=replace(session.info, owner=""))
            return bare.to_bytes(loaded.engine.model_config)

        return await asyncio.to_thread(run)

    async def import_(self, data: bytes, owner: str) -> SessionInfo:
        """Save an exported session under a new id."""
        loaded = await self._loaded()
        (await self.store()).check_size(len(data))
        return await asyncio.to_thread(self._import, data, owner, loaded)

    async def _loaded(self) -> Loaded:
        loaded, _ = await self._slot.parts()
        return loaded

    def _get_store(self) -> SessionStore:
        # Here and not above: the server listens before torch is there.
        from mrss_provider.engine.session_store import SessionStore

        with self._lock:
            if self._store is None:
                config = self._slot.config
                self._store = SessionStore(
                    max_sessions=config.max_sessions,
                    max_bytes=config.session_bytes,
                    folder=config.sessions_dir,
                )
            return self._store

    def _read(self, data: Buffer, loaded: Loaded) -> Session:
        from mrss_provider.engine.session import Session

        return Session.from_bytes(data, loaded.engine.model_config, loaded.engine.state_dtype)

    def _put(
        self, session: Session, model_config: ModelConfig, *, is_new: bool = True
    ) -> SessionInfo:
        session = replace(session, rows=tuple([row.to_host() for row in session.rows]))
        if not all(row.is_finite for row in session.rows):
            raise EngineError("the states of the session are not finite, so it is not saved")
        data = session.pack(model_config)
        return self._get_store().put(session.info, data, is_new=is_new)

    def _import(self, data: Buffer, owner: str, loaded: Loaded) -> SessionInfo:
        from mrss_provider.engine.session import new_info

        session = self._read(data, loaded)
        info = new_info(owner, session.info.mixture, len(session.tokens))
        return self._put(replace(session, info=info), loaded.engine.model_config)

    def _resume(
        self,
        info: SessionInfo,
        request: GenerateRequest,
        mixture: ResolvedMixture,
        loaded: Loaded,
        capture: Capture | None,
    ) -> Resumption:
        from mrss_provider.engine.session import states_of

        session = self._read(self._get_store().get(info.id, request.owner), loaded)
        if session.states != states_of(mixture):
            if session.info.mixture == mixture.canonical:
                raise InvalidRequestError(
                    f"the session {info.id} was made when a state of {mixture.canonical!r} was "
                    "another, which has been replaced since; load that one again, or begin anew",
                    param="mrss.session",
                )
            raise InvalidRequestError(
                f"the session {info.id} has the states of {session.info.mixture!r}, so it "
                f"cannot go on as {mixture.canonical!r}",
                param="model",
            )
        session = replace(session, rows=loaded.engine.at_hand(session.rows))
        return resumption_of(session, request, loaded, capture)


def _check_not_given(request: GenerateRequest) -> None:
    """Refuse an answer that is read and not drawn: a session would go on as if it had been drawn.

    Raises:
        InvalidRequestError: as said.
    """
    if request.given is not None:
        raise InvalidRequestError(
            "a session takes no given answer; send it as a message of the assistant",
            param="mrss.given",
        )
