"""AnswerReader: an answer's tokens beside what its parser makes of their text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from mrss_provider.async_engine.output_parser import OutputParser, Piece
from mrss_provider.backend import FinishReason, TokenLogprob, ToolCallDelta


@dataclass(slots=True)
class _Token:
    """A token whose characters are not all understood yet."""

    num_left: int
    logprob: TokenLogprob | None
    is_content: bool = False


@dataclass(slots=True)
class News:
    """What has become of an answer since the last time.

    Attributes:
        text: of its content.
        reasoning: of its thought.
        calls: pieces of calls.
        logprobs: of the tokens that have a part in the content.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls or self.logprobs)


class AnswerReader:
    """Reads one answer.

    Args:
        parser: of its text.
        is_named: whether one tool was asked for by name: such an answer ends as any other one.

    Attributes:
        num_reasoning: tokens of its thought.
        said: its text as the model wrote it.
    """

    def __init__(self, parser: OutputParser, *, is_named: bool = False) -> None:
        self.num_reasoning = 0
        self.said: list[str] = []
        self._parser = parser
        self._is_named = is_named
        self._tokens: deque[_Token] = deque()

    @property
    def has_ended(self) -> bool:
        """Whether what follows is no part of the answer."""
        return self._parser.has_ended

    @property
    def is_done(self) -> bool:
        """Whether all that follows is content, and each token so far is known."""
        return self._parser.is_done and not self._tokens

    def add(self, num_chars: int, logprob: TokenLogprob | None) -> None:
        """Note a token of the answer, whose text has so many characters."""
        self._tokens.append(_Token(num_chars, logprob))

    def read(self, text: str, *, is_last: bool = False) -> News:
        """Take text of the tokens that were noted, and all that there will be if `is_last`."""
        self.said.append(text)
        news = News()
        self._tell(self._parser.push(text), news)
        if is_last:
            self._tell(self._parser.flush(), news)
            # The end of the text, and what a stop string cut off.
            is_thought = self._parser.is_thinking
            is_content = not is_thought and not self._parser.num_calls
            while self._tokens:
                self._settle(self._tokens.popleft(), is_content, is_thought, news)
        return news

    def reason(self, ended_by: FinishReason) -> FinishReason:
        """Return why the answer ended, as it is told."""
        has_called = self._parser.num_calls > 0 and not self._is_named
        # Who is told of calls runs them: a stop string may have left half a one.
        has_called &= not self._parser.is_in_arguments
        return "tool_calls" if has_called and ended_by == "stop" else ended_by

    def _tell(self, pieces: Iterable[Piece], news: News) -> None:
        for piece in pieces:
            if piece.kind == "content":
                news.text += piece.text
            elif piece.kind == "thought":
                news.reasoning += piece.text
            news.calls += piece.calls
            self._attribute(piece, news)

    def _attribute(self, piece: Piece, news: News) -> None:
        """Tell the tokens whose last character is in `piece` what they are."""
        left = piece.num_chars
        while self._tokens and left:
            token = self._tokens[0]
            # A token without text is the first part of a character, the next one the rest of it.
            part = min(left, token.num_left)
            token.num_left -= part
            left -= part
            token.is_content |= piece.kind == "content"
            if token.num_left:
                return
            self._settle(self._tokens.popleft(), token.is_content, piece.kind == "thought", news)

    def _settle(self, token: _Token, is_content: bool, is_thought: bool, news: News) -> None:
        if is_content and token.logprob is not None:
            news.logprobs.append(token.logprob)
        self.num_reasoning += is_thought and not is_content
