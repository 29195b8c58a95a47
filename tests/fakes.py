"""FakeBackend: a `Backend` without an engine, scripted, and watchable from any thread.

    backend = FakeBackend()                      # every answer is "Hello, world"
    backend = FakeBackend(script=[text("a"), Wait(event), text("b"), QueueFullError("...")])

A script is what each answer does: `Delta`s are yielded, a `Wait` blocks until its event is set
(or the stream is closed), an exception is raised. Choices 1.. of a request with `n` > 1 repeat
the script's text; a missing finish and the usage are added.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from mrss_provider.backend import (
    Backend,
    Delta,
    GenerateRequest,
    ModelCard,
    StreamInfo,
    TokenTrace,
    TraceSummary,
    Usage,
)
from mrss_provider.config import ServerConfig
from mrss_provider.errors import EngineUnavailableError, InvalidRequestError
from mrss_provider.mixture import parse_mixture

PROMPT_TOKENS = 7
ROWS = 3
FINGERPRINT = "mrss-fake"
CARDS = [
    ModelCard("base", "base", "the plain model", 1_700_000_000, 4096),
    ModelCard("knowledge", "state", "knows things", 1_700_000_000, 4096),
    ModelCard("tone", "state", "sounds nice", 1_700_000_000, 4096),
]


@dataclass
class Wait:
    """Block the stream here; `reached` tells that it got here, `go` lets it on."""

    go: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)


Step = Delta | Wait | BaseException
Script = Sequence[Step]


def text(piece: str, index: int = 0) -> Delta:
    """Return a delta of one token."""
    return Delta(index=index, text=piece, num_tokens=1)


def token_trace(token: bytes, who: str = "tone", *, disagreement: float = 0.4) -> TokenTrace:
    """Return a trace in which every field says something."""
    return TokenTrace(
        token_id=token[0],
        token=token,
        who=who,
        agreed=disagreement <= 0.05,
        weights={"base": 0.0, "knowledge": 0.25, "tone": 1.0},
        logprob={"base": -2.25, "knowledge": -9999.0, "tone": -0.1},
        merged_logprob=-0.125,
        r={"base": 0.0, "knowledge": 0.2, "tone": 0.8},
        r_is_exact=False,
        additive={"base": -2.25, "knowledge": 0.5, "tone": 1.75},
        log_z=0.125,
        loo={"base": None, "knowledge": -0.02, "tone": 1.9},
        kl={"base": 0.5, "knowledge": None, "tone": 1e-5},
        kl_base={"base": 0.0, "knowledge": 0.1, "tone": 0.5},
        entropy={"base": 1.0, "knowledge": 1.5, "tone": 0.5},
        merged_entropy=0.75,
        disagreement=disagreement,
        would_say={"base": b" .", "knowledge": b"\xe4\xbd", "tone": token},
    )


def traced(piece: str, who: str = "tone", *, disagreement: float = 0.4) -> Delta:
    """Return a delta of one traced token."""
    trace = token_trace(piece.encode(), who, disagreement=disagreement)
    return Delta(text=piece, num_tokens=1, trace=(trace,))


SUMMARY = TraceSummary(
    {"base": 0.0, "knowledge": 0.25, "tone": 0.25, "agreed": 0.5},
    {"base": None, "knowledge": 42.5, "tone": None},
)

HELLO: Script = [text("Hello"), text(","), text(" world")]


class FakeBackend:
    """A `Backend` that follows a script.

    Attributes:
        requests: everything that was asked for, refused requests too.
        streams: every stream that was opened.
        open_error: raised by `open` when set.
        closed: whether `aclose` was called.
    """

    def __init__(
        self,
        script: Script | Callable[[GenerateRequest], Script] = HELLO,
        *,
        open_error: BaseException | None = None,
        cards: Sequence[ModelCard] = CARDS,
    ) -> None:
        self.script = script
        self.open_error = open_error
        self.cards = list(cards)
        self.requests: list[GenerateRequest] = []
        self.streams: list[FakeStream] = []
        self.closed = False

    async def open(self, request: GenerateRequest) -> FakeStream:
        self.requests.append(request)
        if self.open_error is not None:
            raise self.open_error
        if self.closed:
            raise EngineUnavailableError("the engine is closed")
        mixture = parse_mixture(request.model)
        known = {card.id for card in self.cards}
        for name in mixture.names:
            if name not in known:
                raise InvalidRequestError(f"unknown state {name!r}", param="model")
        info = StreamInfo(mixture.canonical(), ROWS, FINGERPRINT, PROMPT_TOKENS)
        script = self.script(request) if callable(self.script) else self.script
        stream = FakeStream(info, _complete(script, request.n))
        self.streams.append(stream)
        return stream

    async def models(self) -> list[ModelCard]:
        return self.cards

    async def aclose(self) -> None:
        self.closed = True
        for stream in self.streams:
            stream.fail(EngineUnavailableError("the engine was closed"))


class FakeStream:
    """A `DeltaStream` over a list of steps.

    Attributes:
        ended: set once the stream is over, by its end, an error, or `aclose`.
        aborted: whether `aclose` came before the end.
    """

    def __init__(self, info: StreamInfo, steps: Script) -> None:
        self.info = info
        self.ended = threading.Event()
        self.aborted = False
        self._waiting: Wait | None = None
        self._error: BaseException | None = None
        self._deltas = self._run(steps)

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> Delta:
        try:
            return await anext(self._deltas)
        except asyncio.CancelledError:
            raise
        except BaseException:
            self.ended.set()
            raise

    def fail(self, error: BaseException) -> None:
        if not self.ended.is_set():
            self._error = error
            self._let_go()

    def _let_go(self) -> None:
        self.ended.set()
        if self._waiting is not None:
            self._waiting.go.set()

    def ready(self) -> bool:
        return False

    async def aclose(self) -> None:
        if not self.ended.is_set():
            self.aborted = True
            self._let_go()

    async def _run(self, steps: Script) -> AsyncIterator[Delta]:
        for step in steps:
            if isinstance(step, Wait):
                self._waiting = step
                step.reached.set()
                await asyncio.to_thread(step.go.wait)
                self._waiting = None
            elif isinstance(step, BaseException):
                raise step
            if self._error is not None:
                raise self._error
            if self.aborted:
                return
            if isinstance(step, Delta):
                yield step


def _complete(script: Script, n: int) -> list[Step]:
    """Repeat the script's deltas for every choice, end each choice, and add the usage."""
    steps: list[Step] = []
    for step in script:
        if isinstance(step, Delta) and step.index == 0 and step.usage is None:
            steps += [replace(step, index=index) for index in range(n)]
        else:
            steps.append(step)
    if any(isinstance(step, BaseException) for step in steps):
        return steps
    deltas = [step for step in steps if isinstance(step, Delta)]
    finished = {delta.index for delta in deltas if delta.finish_reason}
    ends = [Delta(index=i, finish_reason="stop") for i in range(n) if i not in finished]
    usage = Usage(PROMPT_TOKENS, sum(delta.num_tokens for delta in deltas))
    has_usage = any(delta.usage for delta in deltas)
    return [*steps, *ends, *([] if has_usage else [Delta(usage=usage)])]


class Impatient:
    """asyncio for uvicorn, which looks every 0.1 s whether to go on: ten times as often."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s / 10)


@contextlib.contextmanager
def serving(backend: Backend, config: ServerConfig) -> Iterator[Callable[[float], None]]:
    """Serve `backend` in a thread; yields what ends the server from any thread (drain_s)."""
    from mrss_provider.server.run import Server, listen_on

    listeners = listen_on(config)
    begun = threading.Event()
    servers: list[Server] = []

    async def main() -> None:
        servers.append(Server(backend, config, *listeners, model="fake"))
        begun.set()
        await servers[0].run_to_end()

    def end(drain_s: float = 0.0) -> None:
        loop = servers[0]._loop
        if not loop.is_closed():
            loop.call_soon_threadsafe(servers[0].end, drain_s)

    thread = threading.Thread(target=asyncio.run, args=(main(),), name="fake-server")
    with mock.patch("uvicorn.server.asyncio", Impatient()):
        thread.start()
        try:
            begun.wait()
            yield end
        finally:
            end()
            thread.join()
            for listener in listeners:
                listener.close()
