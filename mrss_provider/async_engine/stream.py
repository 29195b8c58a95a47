"""TextStream: token outputs of one request to deltas of text, on the reader's event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from mrss_provider.async_engine.answer_reader import AnswerReader
from mrss_provider.async_engine.choice import Choice
from mrss_provider.backend import Delta, StreamInfo, TextPiece, Usage
from mrss_provider.engine.request import EngineRequest, TokenOutput
from mrss_provider.errors import EngineError, MRSSError, RequestTimeoutError
from mrss_provider.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Tokens that may wait for a reader before they are looked at: how late a stop string is found.
_MOST_WAITING = 8


class Aborter(Protocol):
    """What the stream needs of the engine's thread."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one of its answers, without waiting."""
        ...


class TextStream:
    """A `DeltaStream`. Built on the loop that reads it; every method runs there.

    A reader that comes late gets everything that has come for a choice as one delta, so what
    waits is bounded by the request's `max_tokens`. Tokens become text when somebody waits for it or
    asks, or when a few have come: together they cost little more than one.

    Args:
        request: as the engine has it.
        info: what is known on admission.
        tokenizer: ids to text.
        stops: every stop string, the template's too.
        lead: left out where an answer begins with it; one character at most.
        aborter: takes aborts.
        echo: what the text of each answer begins with.
        new_reader: makes what reads an answer whose text is more than content.
    """

    def __init__(
        self,
        request: EngineRequest,
        info: StreamInfo,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        lead: str,
        aborter: Aborter,
        echo: str = "",
        new_reader: Callable[[], AnswerReader | None] = lambda: None,
    ) -> None:
        self.info = info
        self.loop = asyncio.get_running_loop()
        self._request = request
        self._aborter = aborter
        self._choices = [
            Choice(request, i, tokenizer, stops, lead, echo, new_reader()) for i in range(request.n)
        ]
        self._num_unfinished = request.n
        self._num_cached = 0
        # Choices with something to take, in the order in which it came.
        self._unread: dict[int, None] = {}
        self._error: MRSSError | None = None
        self._has_ended = False
        self._has_told_usage = False
        self._waiter: asyncio.Future[None] | None = None
        # Or who is called instead, once.
        self._call: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._on_end: Callable[[TextStream], None] = lambda stream: None
        self._started = time.monotonic()
        self._first_token: float | None = None

    def admit(self, started: float, timeout_s: float | None) -> None:
        """Begin to count, from `started` (monotonic); the whole answer has `timeout_s` seconds.

        A short answer may have ended already: its last outputs can come before this call.
        """
        self._started = started
        if timeout_s is not None and not self._has_ended:
            left_s = max(0.0, started + timeout_s - time.monotonic())
            self._timer = self.loop.call_later(left_s, self._expire, timeout_s)

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> Delta:
        while not self.ready():
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._unread:
            index = next(iter(self._unread))
            del self._unread[index]
            return self._choices[index].take()
        if self._error is not None:
            raise self._error
        if self._num_unfinished or self._has_told_usage:
            raise StopAsyncIteration
        self._has_told_usage = True
        reasoning = sum(choice.num_reasoning for choice in self._choices)
        counts = (self.info.prompt_tokens, self._num_tokens, self._num_cached, reasoning)
        return Delta(usage=Usage(*counts))

    @property
    def said(self) -> str | None:
        """The only answer as the model wrote it; None where that is its text."""
        return self._choices[0].said

    def ready(self) -> bool:
        """Whether the next delta, or the end, is already here."""
        self._read_all()
        return bool(self._unread) or self._has_ended

    def take_text(self) -> TextPiece | None:
        """Return the next delta if it is here and is text only; else None, and nothing is taken."""
        if not self._unread:
            self._read_all()
        for index in self._unread:
            piece = self._choices[index].take_text()
            if piece is not None:
                del self._unread[index]
            return piece
        return None

    def call_when_ready(self, call: Callable[[], None] | None) -> None:
        """Call `call` once when `ready` becomes true, which it is not now; None takes that back."""
        self._call = call

    async def aclose(self) -> None:
        """Abort what still runs; idempotent."""
        self._read_all()
        self._unread.clear()
        if not self._has_ended:
            self._aborter.abort(self._request.id)
            self._end("abort")
        self._has_told_usage = True

    def on_output(self, output: TokenOutput) -> None:
        """Take one token of the engine."""
        if self._has_ended:
            return
        if output.error is not None:
            self.on_failure(output.error)
            return
        self._num_cached = output.num_cached
        choice = self._choices[output.index]
        if choice.finish_reason is not None:
            # Sampled before the engine learned of the stop string.
            return
        if self._first_token is None:
            self._first_token = time.monotonic()
        choice.add(output)
        is_awaited = self._waiter is not None or self._call is not None
        if is_awaited or not choice.is_running or choice.num_waiting == _MOST_WAITING:
            self._read(choice)

    def on_failure(self, error: MRSSError) -> None:
        """End with `error`, after what has already come."""
        self._read_all()
        if not self._has_ended:
            self._fail(error)

    @property
    def _num_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    def _read_all(self) -> None:
        # Whoever ended the stream has read what had come.
        for choice in self._choices:
            if choice.num_waiting and not self._has_ended:
                self._read(choice)

    def _read(self, choice: Choice) -> None:
        try:
            has_news = choice.read()
        except Exception as exc:
            # A defect of ours, and of this answer.
            logger.exception("the answer of %s cannot be read", self._request.id)
            self._fail(EngineError(f"the answer cannot be read: {exc!r}"))
            return
        if has_news:
            self._unread[choice.index] = None
            self._wake()
        if choice.finish_reason is not None:
            self._finish(choice)

    def _finish(self, choice: Choice) -> None:
        if choice.is_running:
            self._aborter.abort(self._request.id, choice.index)
        self._num_unfinished -= 1
        if not self._num_unfinished:
            self._end(",".join(str(c.finish_reason) for c in self._choices))

    def _expire(self, timeout_s: float) -> None:
        self._read_all()
        self.on_failure(
            RequestTimeoutError(
                f"the answer was not complete within {timeout_s:g} s "
                f"({self._num_tokens} tokens were)"
            )
        )

    def _fail(self, error: MRSSError) -> None:
        # Whatever of it still runs keeps no rows, whoever it is that has failed.
        self._aborter.abort(self._request.id)
        self._error = error
        self._end(error.code)

    def _end(self, reason: str) -> None:
        self._has_ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._log(reason)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self._call is not None:
            # Not at once: the other answers' tokens of this step are on their way.
            self.loop.call_soon(self._call)
            self._call = None

    def _log(self, reason: str) -> None:
        now = time.monotonic()
        first = self._first_token
        ttft_ms = -1.0 if first is None else 1e3 * (first - self._started)
        later = self._num_tokens - self._request.n
        tpot_ms = 1e3 * (now - first) / later if first is not None and later > 0 else 0.0
        logger.info(
            "%s %s prompt=%d cached=%d output=%d ttft_ms=%.1f tpot_ms=%.2f finish_reason=%s",
            self._request.id,
            self.info.mixture,
            self.info.prompt_tokens,
            self._num_cached,
            self._num_tokens,
            ttft_ms,
            tpot_ms,
            reason,
            # The same for machines, and who asked.
            extra={
                "fields": {
                    "request_id": self._request.id,
                    "mixture": self.info.mixture,
                    "owner": self._request.owner,
                    "prompt_tokens": self.info.prompt_tokens,
                    "cached_tokens": self._num_cached,
                    "completion_tokens": self._num_tokens,
                    "ttft_ms": round(ttft_ms, 1),
                    "tpot_ms": round(tpot_ms, 2),
                    "finish_reason": reason,
                }
            },
        )
