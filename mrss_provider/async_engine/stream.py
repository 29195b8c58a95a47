"""TextStream: token outputs of one request to deltas of text, on the reader's event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from mrss_provider.backend import (
    Delta,
    FinishReason,
    StreamInfo,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mrss_provider.engine.request import EOS_ID, EngineRequest, TokenOutput
from mrss_provider.errors import MRSSError, RequestTimeoutError
from mrss_provider.stop import StopMatcher
from mrss_provider.tokenizer import StreamDecoder, Tokenizer

logger = logging.getLogger(__name__)


class Aborter(Protocol):
    """What the stream needs of the engine's thread."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one of its answers, without waiting."""
        ...


class _Choice:
    """One answer: its decoder, its stops, and what nobody has read yet."""

    def __init__(self, index: int, tokenizer: Tokenizer, stops: Sequence[str], lead: str) -> None:
        self.index = index
        self._lead = lead
        self.finish_reason: FinishReason | None = None
        self._decoder = StreamDecoder(tokenizer)
        self._matcher = StopMatcher(stops)
        self._texts: list[str] = []
        self._num_tokens = 0
        self._logprobs: list[TokenLogprob] = []

    def push(self, output: TokenOutput, logprob: TokenLogprob | None) -> bool:
        """Take a token; return whether something to read came of it."""
        assert output.token_id is not None
        self._num_tokens += 1
        if logprob is not None:
            self._logprobs.append(logprob)
        is_end = output.finish_reason is not None
        if not (is_end and output.finish_reason == "stop"):
            self._texts.append(self._matcher.push(self._decode(output.token_id)))
        if is_end:
            self._texts.append(self._matcher.push(self._decoder.flush()))
        self.finish_reason = output.finish_reason
        if self._matcher.matched is not None:
            self.finish_reason = "stop"
        elif is_end:
            self._texts.append(self._matcher.flush())
        return self.finish_reason is not None or logprob is not None or bool(self._texts[-1])

    def _decode(self, token_id: int) -> str:
        text = self._decoder.push(token_id)
        if text and self._lead:
            text = text.removeprefix(self._lead)
            self._lead = ""
        return text

    def take(self) -> Delta:
        """Return everything since the last time."""
        delta = Delta(
            index=self.index,
            text="".join(self._texts),
            num_tokens=self._num_tokens,
            logprobs=tuple(self._logprobs),
            finish_reason=self.finish_reason,
        )
        self._texts, self._num_tokens, self._logprobs = [], 0, []
        return delta


class TextStream:
    """A `DeltaStream`. Built on the loop that reads it; every method runs there.

    A reader that comes late gets everything that has come for a choice as one delta, so what
    waits is bounded by the request's `max_tokens`.

    Args:
        request: as the engine has it.
        info: what is known on admission.
        tokenizer: ids to text.
        stops: every stop string, the template's too.
        lead: left out where an answer begins with it; one character at most.
        aborter: takes aborts.
    """

    def __init__(
        self,
        request: EngineRequest,
        info: StreamInfo,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        lead: str,
        aborter: Aborter,
    ) -> None:
        self.info = info
        self.loop = asyncio.get_running_loop()
        self._request = request
        self._tokenizer = tokenizer
        self._aborter = aborter
        self._choices = [_Choice(i, tokenizer, stops, lead) for i in range(request.n)]
        self._num_unfinished = request.n
        self._unread: dict[int, None] = {}
        self._num_tokens = 0
        self._error: MRSSError | None = None
        self._has_ended = False
        self._has_told_usage = False
        self._waiter: asyncio.Future[None] | None = None
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
        return Delta(usage=Usage(self.info.prompt_tokens, self._num_tokens))

    def ready(self) -> bool:
        """Whether the next delta, or the end, is already here."""
        return bool(self._unread) or self._has_ended

    async def aclose(self) -> None:
        """Abort what still runs; idempotent."""
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
            self._aborter.abort(self._request.id)
            self.on_failure(output.error)
            return
        choice = self._choices[output.index]
        if choice.finish_reason is not None:
            # Sampled before the engine learned of the stop string.
            return
        self._num_tokens += 1
        if self._first_token is None:
            self._first_token = time.monotonic()
        if choice.push(output, self._logprob(output)):
            self._unread[output.index] = None
            self._wake()
        if choice.finish_reason is not None:
            self._finish(choice, is_running=output.finish_reason is None)

    def on_failure(self, error: MRSSError) -> None:
        """End with `error`, after what has already come."""
        if not self._has_ended:
            self._error = error
            self._end(error.code)

    def _finish(self, choice: _Choice, *, is_running: bool) -> None:
        if is_running:
            self._aborter.abort(self._request.id, choice.index)
        self._num_unfinished -= 1
        if not self._num_unfinished:
            self._end(",".join(str(c.finish_reason) for c in self._choices))

    def _expire(self, timeout_s: float) -> None:
        self._aborter.abort(self._request.id)
        self.on_failure(
            RequestTimeoutError(
                f"the answer was not complete within {timeout_s:g} s "
                f"({self._num_tokens} tokens were)"
            )
        )

    def _end(self, reason: str) -> None:
        self._has_ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._log(reason)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _logprob(self, output: TokenOutput) -> TokenLogprob | None:
        if output.logprob is None:
            return None
        assert output.token_id is not None
        return TokenLogprob(
            output.token_id,
            self._bytes(output.token_id),
            output.logprob,
            tuple(TopLogprob(i, self._bytes(i), logprob) for i, logprob in output.top),
        )

    def _bytes(self, token_id: int) -> bytes:
        return b"" if token_id == EOS_ID else self._tokenizer.token_bytes(token_id) or b""

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
            0,
            self._num_tokens,
            ttft_ms,
            tpot_ms,
            reason,
        )
