"""OutputParser: the text of an answer, in pieces of any size, to content, thoughts and calls.

What comes out does not depend on how the text was cut. A piece of text is held back only while it
may be the beginning of a mark; a call that is none after all comes out as the text that it is.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from mrss_provider.async_engine.json_scanner import ObjectScanner
from mrss_provider.backend import ToolCallDelta

Kind = Literal["content", "thought", "call"]
State = Literal["start", "opened", "thought", "content", "call", "arguments", "tail"]

Pair = tuple[str, str]

_ID_CHARS = string.ascii_letters + string.digits
_ID_LEN = 24
# Each is read to its end before it is known to be none: without a bound, a long answer that does
# nothing but begin calls would hold up all others.
_MAX_FALSE_CALLS = 64


@dataclass(slots=True)
class Piece:
    """A part of an answer that is understood.

    Attributes:
        kind: what it is.
        num_chars: characters of the answer that it stands for, marks and dropped blanks too.
        text: of the content or the thought.
        calls: what is new of calls.
    """

    kind: Kind
    num_chars: int
    text: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


def new_call_id() -> str:
    """Return an id such as OpenAI's."""
    return "call_" + "".join(secrets.choice(_ID_CHARS) for _ in range(_ID_LEN))


class OutputParser:
    """Reads one answer.

    Args:
        state: where it begins: "start" may begin a thought, "opened" is in one whose mark the
            prompt has begun, "thought" is in one, "content" in none.
        thought: what begins and ends a thought.
        opens_thought: what of the thought's mark is in the prompt already.
        tool_call: what begins and ends a call; None without tools.
        names: of the functions that there are; a call of another one is text.
        is_single: an answer ends with its first call.
        is_constrained: calls have one form for certain, so their arguments come out as they come.
        must_call: the answer is calls and nothing else.
        calls_first: an answer that does not begin with a call has none, whatever it says.
        new_id: makes the id of a call.

    Attributes:
        num_calls: that were made.
        has_ended: nothing belongs to the answer any more.
    """

    def __init__(
        self,
        state: State,
        *,
        thought: Pair | None = None,
        opens_thought: str = "",
        tool_call: Pair | None = None,
        names: frozenset[str] = frozenset(),
        is_single: bool = False,
        is_constrained: bool = False,
        must_call: bool = False,
        calls_first: bool = False,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self.num_calls = 0
        self.has_ended = False
        self._state: State = state
        self._thought = thought or ("", "")
        self._rest_of_mark = self._thought[0].removeprefix(opens_thought)
        self._tool_call = tool_call
        self._num_false_calls = 0
        self._names = names
        self._is_single = is_single
        self._is_constrained = is_constrained
        self._must_call = must_call
        self._calls_first = calls_first
        self._new_id = new_id
        self._held = ""
        # Blanks at the beginning of what comes next are no part of it.
        self._trims = state != "content"
        self._has_content = state == "content"
        self._scanner = ObjectScanner()
        # Of a call's object: what the scanner has seen, and its size once that is known.
        self._num_fed = 0
        self._size: int | None = None
        self._steps: dict[State, Callable[[], Piece | None]] = {
            "start": self._start,
            "opened": self._opened,
            "thought": self._in_thought,
            "content": self._in_content,
            "call": self._in_call,
            "arguments": self._in_arguments,
            "tail": self._in_tail,
        }

    @property
    def is_done(self) -> bool:
        """Whether all that follows is content, and nothing is held."""
        is_plain = self._state == "content" and self._tool_call is None
        return is_plain and not self._held and not self._trims

    @property
    def is_thinking(self) -> bool:
        """Whether the answer is in the middle of a thought."""
        return self._state in ("thought", "opened")

    @property
    def is_in_arguments(self) -> bool:
        """Whether a call that has come out lacks the end of its arguments."""
        return self._state == "arguments"

    def push(self, text: str) -> list[Piece]:
        """Take a piece of text; return what is understood now."""
        self._held += text
        return list(self._read())

    def flush(self) -> list[Piece]:
        """Return what is left, at the end of the answer."""
        pieces = list(self._read())
        if self._state == "call" and self._size:
            call = self._whole_call(self._body(), self._size, is_last=True)
            pieces += [call] if call is not None else []
        while self._state == "call" and not self._is_constrained:
            # It never came to its end: what it holds may be another one.
            pieces.append(self._no_call(self._body()))
            pieces += self._read()
        held, self._held = self._held, ""
        if not held or self.has_ended:
            return pieces
        if self.is_thinking:
            pieces.append(Piece("thought", len(held), self._trimmed(held.rstrip())))
        elif self._is_only_call(held):
            pieces.append(Piece("call", len(held)))
        else:
            pieces.append(Piece("content", len(held), self._trimmed(held)))
        return pieces

    def _is_only_call(self, held: str) -> bool:
        """Tell whether what is left is part of calls: their end, or one that was cut short."""
        if self._state == "tail" or self._must_call:
            return True
        if self._state == "call":
            return self._is_constrained
        return self.num_calls > 0 and not held.strip()

    def _read(self) -> Iterator[Piece]:
        while self._held and not self.has_ended:
            piece = self._steps[self._state]()
            if piece is None:
                return
            yield piece

    def _take(self, num_chars: int) -> str:
        taken, self._held = self._held[:num_chars], self._held[num_chars:]
        return taken

    def _trimmed(self, text: str) -> str:
        """Return `text` without the blanks that are no part of it."""
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        self._has_content |= self._state == "content" and bool(text)
        return text

    def _start(self) -> Piece | None:
        begin = self._thought[0]
        text = self._held.lstrip()
        if begin.startswith(text) and len(text) < len(begin):
            return None
        if not text.startswith(begin):
            self._state = "content"
            return Piece("content", len(self._take(len(self._held) - len(text))))
        self._state = "thought"
        return Piece("thought", len(self._take(len(self._held) - len(text) + len(begin))))

    def _opened(self) -> Piece | None:
        rest = self._rest_of_mark
        if len(self._held) < len(rest) and rest.startswith(self._held):
            return None
        self._state = "thought"
        return Piece("thought", len(self._take(len(rest) if self._held.startswith(rest) else 0)))

    def _in_thought(self) -> Piece | None:
        end = self._thought[1]
        at = self._held.find(end)
        if at < 0:
            return self._text_before("thought", end)
        text = self._trimmed(self._take(at).rstrip())
        self._take(len(end))
        self._state, self._trims = "content", True
        return Piece("thought", at + len(end), text)

    def _in_content(self) -> Piece | None:
        if self._calls_first and not self.num_calls and self._is_no_mark(self._held.lstrip()):
            self._tool_call = None
        if self._tool_call is None:
            text = self._take(len(self._held))
            return Piece("content", len(text), self._trimmed(text))
        at = self._held.find(self._tool_call[0])
        if at < 0:
            return self._text_before("content", self._tool_call[0])
        self._state = "call"
        # The blanks before a call belong to it, if it is one.
        text = self._held[:at].rstrip()
        if not text:
            return self._in_call()
        self._has_content = True
        return Piece("content", len(text), self._trimmed(self._take(len(text))))

    def _is_no_mark(self, text: str) -> bool:
        """Tell whether `text` can be neither a call's mark nor the beginning of one."""
        mark = self._tool_call[0] if self._tool_call else ""
        return not (text.startswith(mark) or mark.startswith(text))

    def _text_before(self, kind: Kind, mark: str) -> Piece | None:
        """Return the text that certainly comes before a mark and the blanks in front of it."""
        keep = next(
            n
            for n in range(min(len(mark) - 1, len(self._held)), -1, -1)
            if self._held.endswith(mark[:n])
        )
        certain = self._held[: len(self._held) - keep].rstrip()
        if not certain:
            return None
        return Piece(kind, len(certain), self._trimmed(self._take(len(certain))))

    def _in_call(self) -> Piece | None:
        """Read a call that has begun; its mark and the blanks before it are still held."""
        body = self._body()
        if not body:
            return None
        if self._is_constrained:
            return self._head_of_call(body)
        if self._size is None:
            size = self._scanner.feed(body[self._num_fed :])
            if size is None:
                self._num_fed = len(body)
                return None
            self._size = size and self._num_fed + size
        after = body[self._size :].lstrip()
        if self._size and len(after) < len(self._end) and self._end.startswith(after):
            return None
        return self._whole_call(body, self._size) or self._no_call(body)

    @property
    def _end(self) -> str:
        assert self._tool_call is not None
        return self._tool_call[1]

    def _body(self) -> str:
        """Return what is held of a call behind its mark."""
        assert self._tool_call is not None
        return self._held.lstrip().removeprefix(self._tool_call[0]).lstrip()

    def _whole_call(self, body: str, size: int, *, is_last: bool = False) -> Piece | None:
        """Return the call whose object is the first `size` of `body`, taken; None if it is none.

        The end of the answer, `is_last`, may stand for the mark that ends a call.
        """
        call = _parsed(body[:size]) if size else None
        after = body[size:].lstrip()
        if call is None or call[0] not in self._names:
            return None
        if not (after.startswith(self._end) or (is_last and not after)):
            return None
        num_chars = len(self._held) - len(after.removeprefix(self._end))
        self._take(num_chars)
        self._end_call()
        piece = ToolCallDelta(self.num_calls, self._new_id(), *call)
        self.num_calls += 1
        return Piece("call", num_chars, calls=(piece,))

    def _no_call(self, body: str) -> Piece:
        """Return the mark as text; what follows it is looked at anew, but not for ever."""
        taken = self._take(len(self._held) - len(body))
        text = self._trimmed(taken)
        self._end_call()
        self.has_ended = self._trims = False
        self._num_false_calls += 1
        if self._num_false_calls == _MAX_FALSE_CALLS:
            self._tool_call = None
        return Piece("content", len(taken), text)

    def _head_of_call(self, body: str) -> Piece | None:
        """Read a call's name, where it begins as the grammar has it."""
        for name in self._names:
            head = f'{{"name": {json.dumps(name)}, "arguments": '
            if body.startswith(head):
                taken = self._take(len(self._held) - len(body) + len(head))
                self._state, self._scanner = "arguments", ObjectScanner()
                piece = ToolCallDelta(self.num_calls, self._new_id(), name)
                self.num_calls += 1
                return Piece("call", len(taken), calls=(piece,))
        return None

    def _in_arguments(self) -> Piece | None:
        size = self._scanner.feed(self._held)
        if size is not None:
            self._state = "tail"
        text = self._take(len(self._held) if size is None else size)
        piece = ToolCallDelta(self.num_calls - 1, arguments=text)
        return Piece("call", len(text), calls=(piece,))

    def _in_tail(self) -> Piece | None:
        """Read what ends a call after its arguments."""
        at = self._held.find(self._end)
        if at < 0:
            return None
        self._end_call()
        return Piece("call", len(self._take(at + len(self._end))))

    def _end_call(self) -> None:
        self._state, self._trims = "content", not self._has_content
        self._scanner, self._num_fed, self._size = ObjectScanner(), 0, None
        self.has_ended = self._is_single


def _parsed(text: str) -> tuple[str, str] | None:
    """Return a call's name and arguments as JSON, if `text` is those and nothing else."""
    try:
        call = json.loads(text)
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            return None
        name, arguments = call["name"], call["arguments"]
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        # Half of a surrogate pair, which JSON can spell, is no text that can be sent.
        written.encode()
    except (ValueError, RecursionError):
        return None
    return (name, written) if isinstance(name, str) and isinstance(arguments, dict) else None
