"""Asking: many questions to one backend at once, and how likely it finds given texts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mrss_provider.backend import (
    Backend,
    GenerateRequest,
    Message,
    MixtureOptions,
    TokenLogprob,
)
from mrss_provider.evaluate.systems import System
from mrss_provider.evaluate.task import GivenAnswer, Question
from mrss_provider.sampling_params import SamplingParams

T = TypeVar("T")

MAX_TOKENS = 64
"""Of an answer; what is longer is no answer to a question about one fact."""

MOST_NATS = 30.0
"""Of a token, also of one that a cut has removed."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn; temperature 0 is greedy."""

    name: str
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0


T1 = Decoding("T=1")
TOP_P = Decoding("top-p 0.7", top_p=0.7)
MIN_P = Decoding("min-p 0.1", min_p=0.1)
GREEDY = Decoding("greedy", temperature=0.0)
DECODINGS = (T1, TOP_P, MIN_P, GREEDY)


@dataclass(frozen=True)
class Said:
    """A given text, as a system finds it: nats of its tokens, and which of them state a fact."""

    nats: tuple[float, ...]
    is_fact: tuple[bool, ...]


class Asker:
    """Puts questions to a backend, `at_once` at a time, and counts what is done.

    Args:
        backend: where answers come from.
        on_done: called after each one.
        at_once: requests that are under way.
    """

    def __init__(
        self,
        backend: Backend,
        on_done: Callable[[], None] = lambda: None,
        *,
        at_once: int = 64,
    ) -> None:
        self._backend = backend
        self._on_done = on_done
        self._room = asyncio.Semaphore(at_once)

    async def answers(
        self, system: System, asked: Sequence[Question], decoding: Decoding, *, seed: int
    ) -> list[str]:
        """Return an answer a question. A question's random numbers are the same for all systems."""
        requests = [
            self._request(system, question, decoding, seed=seed * 1_000_003 + place)
            for place, question in enumerate(asked)
        ]
        return await asyncio.gather(*[self._in_turn(self._text, one) for one in requests])

    async def said(self, system: System, texts: Sequence[GivenAnswer]) -> list[Said]:
        """Return how likely each text is to a system, token by token, after its messages."""
        requests = [
            GenerateRequest(
                model=system.model,
                sampling=SamplingParams(logprobs=True),
                messages=one.messages,
                given=one.text,
            )
            for one in texts
        ]
        scored = await asyncio.gather(*[self._in_turn(self._scores, one) for one in requests])
        return [_said(tokens, one) for tokens, one in zip(scored, texts, strict=True)]

    async def neutral(self, system: System, texts: Sequence[str]) -> list[Said]:
        """Return how likely texts are that follow nothing but `System:`, before any cut.

        A plausibility cut is a truncation, as top-p is: it says nothing of unlikely tokens.
        """
        options = MixtureOptions(cut=0.0) if "+" in system.model else MixtureOptions()
        requests = [
            GenerateRequest(
                model=system.model,
                sampling=SamplingParams(logprobs=True),
                prompt="System:",
                given=text,
                mixture=options,
            )
            for text in texts
        ]
        scored = await asyncio.gather(*[self._in_turn(self._scores, one) for one in requests])
        return [_said(tokens, GivenAnswer(0, (), "")) for tokens in scored]

    async def _in_turn(
        self, ask: Callable[[GenerateRequest], Awaitable[T]], request: GenerateRequest
    ) -> T:
        async with self._room:
            found = await ask(request)
        self._on_done()
        return found

    def _request(
        self, system: System, question: Question, decoding: Decoding, *, seed: int
    ) -> GenerateRequest:
        messages = question.messages
        if system.is_hinted:
            messages = (Message("system", question.hint), *messages)
        sampling = SamplingParams(
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            min_p=decoding.min_p,
            max_tokens=MAX_TOKENS,
            seed=seed,
        )
        return GenerateRequest(model=system.model, sampling=sampling, messages=messages)

    async def _text(self, request: GenerateRequest) -> str:
        stream = await self._backend.open(request)
        try:
            return "".join([delta.text async for delta in stream]).strip()
        finally:
            await stream.aclose()

    async def _scores(self, request: GenerateRequest) -> list[TokenLogprob]:
        stream = await self._backend.open(request)
        try:
            return [token async for delta in stream for token in delta.logprobs]
        finally:
            await stream.aclose()


def _said(tokens: Sequence[TokenLogprob], given: GivenAnswer) -> Said:
    """Mark the tokens that any character of a fact is in."""
    spans = [
        (
            len(given.text[: span.start].encode()),
            len(given.text[: span.stop].encode()),
        )
        for span in given.facts
    ]
    # The model's lead before the text is part of the first token, not of the text.
    total = sum(len(token.token) for token in tokens)
    at = len(given.text.encode()) - total if given.text else 0
    is_fact = []
    for token in tokens:
        end = at + len(token.token)
        is_fact.append(any(at < stop and start < end for start, stop in spans))
        at = end
    nats = (MOST_NATS if token.logprob is None else -token.logprob for token in tokens)
    return Said(tuple(min(MOST_NATS, nat) for nat in nats), tuple(is_fact))
