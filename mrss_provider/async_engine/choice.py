"""Choice: the tokens of one answer become text, as many at a time as have come."""

from __future__ import annotations

from collections.abc import Sequence

from mrss_provider.async_engine.answer_reader import AnswerReader
from mrss_provider.async_engine.traces import Tracer
from mrss_provider.backend import (
    Delta,
    FinishReason,
    TextPiece,
    TokenLogprob,
    TokenTrace,
    ToolCallDelta,
    TopLogprob,
)
from mrss_provider.engine.request import EOS_ID, EngineRequest, PromptReading, TokenOutput
from mrss_provider.stop import StopMatcher
from mrss_provider.tokenizer import StreamDecoder, Tokenizer


class Choice:
    """One answer: what has come from the engine, its text so far, and what nobody has taken yet.

    Attributes:
        finish_reason: what ended it, once that was read.
        is_running: whether the engine may give more tokens.
        num_waiting: tokens that came and were not read.
        num_tokens: tokens that were read; none after a stop string is.
    """

    def __init__(
        self,
        request: EngineRequest,
        index: int,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        lead: str,
        echo: str = "",
        reader: AnswerReader | None = None,
    ) -> None:
        """Begin an answer.

        Args:
            request: whose it is.
            index: which of its answers.
            tokenizer: ids to text.
            stops: strings that end it.
            lead: left out where it begins with it; one character at most.
            echo: what its text begins with.
            reader: where its text is more than content; None where it is content as it is.
        """
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.is_running = True
        self.num_waiting = 0
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._lead = lead
        self._prompt = request.prompt
        self._tracer = Tracer(request.mixture.names, self._bytes) if request.trace else None
        # Nothing but the text is wanted of its tokens.
        self._is_plain = not (request.sampling.logprobs or request.trace)
        self._decoder = StreamDecoder(tokenizer)
        self._matcher = StopMatcher(stops)
        self._waiting: list[TokenOutput] = []
        self._num_taken = 0
        self._texts: list[str] = [echo] if echo else []
        self._logprobs: list[TokenLogprob] = []
        self._trace: list[TokenTrace] = []
        self._reader = reader
        # Kept when all that follows is content, which is read faster without it.
        self._past_reader = reader
        # Texts that are not taken yet and that the reader knows.
        self._num_said = 0
        self._thoughts: list[str] = []
        self._calls: tuple[ToolCallDelta, ...] = ()

    @property
    def num_reasoning(self) -> int:
        """Tokens that were thoughts."""
        return 0 if self._past_reader is None else self._past_reader.num_reasoning

    @property
    def said(self) -> str | None:
        """The answer as the model wrote it; None where that is its text."""
        return None if self._past_reader is None else "".join(self._past_reader.said)

    def add(self, output: TokenOutput) -> None:
        """Note a token, for `read`."""
        self._waiting.append(output)
        self.num_waiting += 1
        if output.finish_reason is not None:
            self.is_running = False

    def read(self) -> bool:
        """Turn the tokens that wait into text; return whether something to take came of it."""
        waiting, self._waiting, self.num_waiting = self._waiting, [], 0
        if self._read_together(waiting):
            return bool(self._texts[-1])
        has_news = False
        for output in waiting:
            has_news |= self._read_one(output)
            if self.finish_reason is not None:
                # What follows was sampled before the engine learned of the stop string.
                break
        return has_news

    def take_text(self) -> TextPiece | None:
        """Return what was read since the last time if it is content, and no end; else take nothing.

        None also where more than text is told of each token.
        """
        if not self._is_plain or self._reader is not None or self.finish_reason is not None:
            return None
        if self._thoughts or self._calls:
            return None
        if self._past_reader is not None:
            self._note_said()
        piece = TextPiece(self.index, "".join(self._texts), self.num_tokens - self._num_taken)
        self._num_taken = self.num_tokens
        self._texts = []
        return piece

    def take(self) -> Delta:
        """Return everything that was read since the last time."""
        self._note_said()
        delta = Delta(
            index=self.index,
            text="".join(self._texts),
            num_tokens=self.num_tokens - self._num_taken,
            logprobs=tuple(self._logprobs),
            finish_reason=self.finish_reason,
            trace=tuple(self._trace),
            trace_summary=self._tracer.summary() if self._tracer and self.finish_reason else None,
            reasoning="".join(self._thoughts),
            tool_calls=self._calls,
        )
        self._num_taken = self.num_tokens
        self._texts, self._logprobs, self._trace = [], [], []
        self._thoughts, self._calls = [], ()
        return delta

    def _note_said(self) -> None:
        """Tell the reader that read the beginning what has come since without it."""
        if self._past_reader is not None and self._reader is None:
            self._past_reader.said += self._texts[self._num_said :]
            self._num_said = 0

    def _read_together(self, outputs: Sequence[TokenOutput]) -> bool:
        """Read tokens at once, if none of them does more than add text; return whether it did."""
        if not (self._is_plain and self.is_running) or self._lead or self._reader is not None:
            return False
        before = self._decoder.rest
        text = self._decoder.push([output.token_id or EOS_ID for output in outputs])
        shown = self._matcher.push_open(text)
        if shown is None:
            # Which token completes the stop string is to be known.
            self._decoder.rest = before
            return False
        self.num_tokens += len(outputs)
        self._texts.append(shown)
        return True

    def _read_one(self, output: TokenOutput) -> bool:
        """Read a token; return whether something to take came of it."""
        if output.reading is not None:
            self._logprobs += self._prompt_logprobs(output.reading)
        if output.token_id is None:
            # There is no answer to the prompt.
            self.finish_reason = output.finish_reason
            return True
        self.num_tokens += 1
        if output.trace is not None and self._tracer is not None:
            self._trace.append(self._tracer.add(output.trace))
        if self._reader is not None:
            return self._read_parsed(self._reader, output, output.token_id)
        if output.logprob is not None:
            self._logprobs.append(self._logprob(output, output.token_id, output.logprob))
        is_end = output.finish_reason is not None
        if not (output.finish_reason == "stop" and output.token_id == EOS_ID):
            self._texts.append(self._matcher.push(self._decode(output.token_id)))
        if is_end:
            self._texts.append(self._matcher.push(self._decoder.flush()))
        self.finish_reason = output.finish_reason
        if self._matcher.matched is not None:
            self.finish_reason = "stop"
        elif is_end:
            self._texts.append(self._matcher.flush())
        is_told = output.logprob is not None or output.trace is not None or bool(self._texts[-1])
        return self.finish_reason is not None or is_told

    def _read_parsed(self, reader: AnswerReader, output: TokenOutput, token_id: int) -> bool:
        """Read a token whose text may be a thought or part of a call."""
        is_end = output.finish_reason is not None
        is_eos = output.finish_reason == "stop" and token_id == EOS_ID
        text = "" if is_eos else self._decode(token_id)
        if is_end:
            text += self._decoder.flush()
        logprob = output.logprob
        reader.add(len(text), None if logprob is None else self._logprob(output, token_id, logprob))
        shown = self._matcher.push(text)
        self.finish_reason = output.finish_reason
        if self._matcher.matched is not None:
            self.finish_reason = "stop"
        elif is_end:
            shown += self._matcher.flush()
        news = reader.read(shown, is_last=self.finish_reason is not None)
        if reader.has_ended and self.finish_reason is None:
            news.logprobs += reader.read("", is_last=True).logprobs
            self.finish_reason = "stop"
        if self.finish_reason is not None:
            self.finish_reason = reader.reason(self.finish_reason)
        self._texts.append(news.text)
        if self.finish_reason is None and reader.is_done:
            self._reader, self._num_said = None, len(self._texts)
        self._thoughts.append(news.reasoning)
        self._calls += news.calls
        self._logprobs += news.logprobs
        return bool(news) or self.finish_reason is not None or output.trace is not None

    def _decode(self, token_id: int) -> str:
        text = self._decoder.push([token_id])
        if text and self._lead:
            text = text.removeprefix(self._lead)
            self._lead = ""
        return text

    def _prompt_logprobs(self, reading: PromptReading) -> list[TokenLogprob]:
        first = self._prompt[0]
        return [
            TokenLogprob(first, self._bytes(first), None),
            *(
                TokenLogprob(
                    score.token_id,
                    self._bytes(score.token_id),
                    score.logprob,
                    tuple(TopLogprob(i, self._bytes(i), value) for i, value in score.top),
                )
                for score in reading.scores
            ),
        ]

    def _logprob(self, output: TokenOutput, token_id: int, logprob: float) -> TokenLogprob:
        top = tuple(TopLogprob(i, self._bytes(i), value) for i, value in output.top)
        return TokenLogprob(token_id, self._bytes(token_id), logprob, top)

    def _bytes(self, token_id: int) -> bytes:
        return b"" if token_id == EOS_ID else self._tokenizer.token_bytes(token_id) or b""
