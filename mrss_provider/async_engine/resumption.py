"""Resumption: a saved session and what is new become a request, an answer becomes a session."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mrss_provider.async_engine.loading import Loaded
from mrss_provider.backend import GenerateRequest, Message
from mrss_provider.chat import PromptText, render_chat, render_prompt
from mrss_provider.engine.request import EngineRequest
from mrss_provider.errors import InvalidRequestError
from mrss_provider.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mrss_provider.engine.continuation import Capture, StartPoint
    from mrss_provider.engine.session import Session


@dataclass(frozen=True)
class Resumption:
    """A request that goes on with a session, as the engine is to have it.

    Attributes:
        session: as it was saved.
        request: with the whole conversation.
        text: of the prompt, where all of it is text.
        prompt: token ids.
        num_kept: tokens of the session that the prompt begins with.
        start: where the rows begin; None where they have read what is no part of it any more.
        capture: what the new session is made of, if the answer is saved.
    """

    session: Session
    request: GenerateRequest
    text: PromptText | None
    prompt: tuple[int, ...]
    num_kept: int
    start: StartPoint | None
    capture: Capture | None

    @property
    def answer_len(self) -> int:
        """Tokens of an answer that goes on."""
        return len(self.start.answer) if self.start is not None else 0

    def apply(self, request: EngineRequest) -> EngineRequest:
        """Let `request`, made of `self.request` and `self.prompt`, begin where the rows are."""
        sampling = request.sampling
        if self.request.sampling.seed is None and self.answer_len:
            sampling = replace(sampling, seed=self.session.seed)
        assert sampling.max_tokens is not None
        sampling = replace(sampling, max_tokens=sampling.max_tokens + self.answer_len)
        # A token is scored when the one before it is read.
        unread = 0 if self.start is None else self.start.num_read + 1
        spans = [range(max(span.start, unread), span.stop) for span in request.evidence]
        evidence = () if self.answer_len else tuple(span for span in spans if span)
        return replace(
            request,
            sampling=sampling,
            evidence=evidence,
            turn=self.session.turn if self.answer_len else request.turn,
            reinjections=self._reinjections(request),
            start=self.start,
            capture=self.capture,
        )

    def _reinjections(self, request: EngineRequest) -> tuple[int, ...]:
        """Return where what is kept was read so, and the request's own of the rest."""
        before = (p for p in self.session.reinjections if p < self.num_kept)
        return (*before, *(p for p in request.reinjections if p >= self.num_kept))


def opening_text(request: GenerateRequest, loaded: Loaded) -> str:
    """Return how a chat begins, up to where its next turn would."""
    assert request.messages is not None
    whole = render_prompt(request.messages, loaded.template)
    longer = render_prompt((*request.messages, Message("user", "x")), loaded.template)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, longer, strict=False))
    return "".join(char for char, _ in same) or whole


def resumption_of(
    session: Session, request: GenerateRequest, loaded: Loaded, capture: Capture | None
) -> Resumption:
    from mrss_provider.engine.continuation import StartPoint

    goes_on = not (request.messages or request.prompt)
    is_chat = session.messages is not None
    if not goes_on and is_chat != (request.messages is not None):
        kinds = ("messages", "a prompt") if is_chat else ("a prompt", "messages")
        raise InvalidRequestError(
            f"the session {session.info.id} goes on with {kinds[0]}, got {kinds[1]}",
            param="prompt" if is_chat else "messages",
        )
    messages = None if session.messages is None else session.messages + (request.messages or ())
    full = replace(request, messages=messages, prompt=None if is_chat else request.prompt or "")
    if goes_on and session.answer and session.num_read == len(session.tokens) - 1:
        prompt = session.tokens[: session.num_prompt]
        start = StartPoint(session.rows, len(prompt), session.answer, session.evidence)
        return Resumption(session, full, None, prompt, len(prompt), start, capture)
    text, kept = None, len(session.tokens)
    encode = loaded.tokenizer.encode
    if messages is not None:
        text = render_chat(messages, loaded.template, thinking=request.thinking)
        kept, rest = _matching(session.tokens, text.text.encode(), loaded.tokenizer)
        prompt = session.tokens[:kept] + tuple(encode(rest))
    else:
        new = request.prompt or ()
        prompt = session.tokens + tuple(encode(new) if isinstance(new, str) else new)
    begins = 0 < session.num_read <= kept and session.num_read < len(prompt)
    start = StartPoint(session.rows, session.num_read, (), session.evidence)
    return Resumption(session, full, text, prompt, kept, start if begins else None, capture)


def _matching(tokens: tuple[int, ...], data: bytes, tokenizer: Tokenizer) -> tuple[int, str]:
    """Return how many of `tokens` write a beginning of `data`, and the rest of it as text."""
    ends = [0]
    for token_id in tokens:
        token = tokenizer.token_bytes(token_id)
        if not token or not data.startswith(token, ends[-1]):
            break
        ends.append(ends[-1] + len(token))
    while True:
        try:
            return len(ends) - 1, data[ends[-1] :].decode()
        except UnicodeDecodeError:
            # A token ended within a character.
            ends.pop()


def session_after(
    resumption: Resumption,
    request: EngineRequest,
    tokenizer: Tokenizer,
    opening: str,
    lead: str,
    text: str,
    reason: str,
) -> Session:
    """Return the session after an answer.

    Args:
        resumption: what it went on from, with a filled `capture`.
        request: as the engine had it.
        tokenizer: of the model.
        opening: how the prompt began the answer, where it has a thought.
        lead: what the model may write before an answer.
        text: of the answer, as the model wrote it, without what was there of it before.
        reason: why it ended.
    """
    before, capture = resumption.session, resumption.capture
    assert capture is not None
    assert request.sampling.seed is not None
    answer, kept = capture.answer, len(capture.answer)
    written = tokenizer.decode_bytes(answer[resumption.answer_len :])
    own_lead = lead if written.startswith(lead.encode()) else ""
    if reason != "length":
        # As much as was told: neither a stop string nor what came after it.
        old = tokenizer.decode_bytes(answer[: resumption.answer_len])
        kept, rest = _matching(answer, old + (own_lead + text).encode(), tokenizer)
        answer = answer[:kept] + tuple(tokenizer.encode(rest))
    # What the prompt began of it is part of it when the next turn is written.
    said = f"{opening}{own_lead}{text}" if opening else text
    tokens = request.prompt + answer
    num_prompt = len(request.prompt)
    usable = [
        state
        for state in capture.states
        if state.num_read <= kept and num_prompt + state.num_read < len(tokens)
    ]
    if usable:
        rows, num_read = usable[-1].rows, num_prompt + usable[-1].num_read
    elif resumption.start is not None and not resumption.answer_len:
        rows, num_read = before.rows, before.num_read
    else:
        rows, num_read = (), 0
    return replace(
        before,
        info=replace(before.info, num_tokens=len(tokens), updated=int(time.time())),
        tokens=tokens,
        num_prompt=num_prompt,
        num_read=num_read,
        rows=rows,
        seed=request.sampling.seed,
        turn=request.turn,
        messages=_with_answer(resumption.request.messages, said),
        evidence=capture.evidence,
        reinjections=request.reinjections,
    )


def _with_answer(messages: tuple[Message, ...] | None, text: str) -> tuple[Message, ...] | None:
    """Return a chat with what was answered; an answer that went on is one message."""
    if messages is None:
        return None
    if messages and messages[-1].role == "assistant":
        return (*messages[:-1], Message("assistant", messages[-1].content + text))
    return (*messages, Message("assistant", text))
