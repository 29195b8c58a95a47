"""Chats and texts as examples: JSON Lines in, token ids with answers and facts marked out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mrss_provider.backend import Message
from mrss_provider.chat import ChatTemplate, render_prompt
from mrss_provider.errors import FileFormatError, InvalidRequestError
from mrss_provider.tokenizer import Tokenizer
from mrss_provider.tune.examples import Example, mark_example

ROLES = ("system", "user", "assistant")

T = TypeVar("T")

_PAIRS = (("question", "answer"), ("prompt", "response"))
_KINDS = (*_PAIRS, ("messages",), ("text",))
_KEYS = {"messages", "text", "facts", *(key for pair in _PAIRS for key in pair)}


MAX_PROBLEMS = 20
"""Bad lines that an error names at most."""


@dataclass(frozen=True)
class Line:
    """One line of a file, and what it becomes.

    Attributes:
        number: from 1.
        said: the messages of a chat, or a text that is none.
        facts: strings that must be learnt; None if the line does not say.
        example: the same as token ids.
    """

    number: int
    said: tuple[Message, ...] | str
    facts: tuple[str, ...] | None
    example: Example


def read_chats(path: Path, tokenizer: Tokenizer, template: ChatTemplate) -> list[Example]:
    """Read the examples of a file of chats; see `read_lines`."""
    return [line.example for line in read_lines(path, tokenizer, template)]


def read_lines(path: Path, tokenizer: Tokenizer, template: ChatTemplate) -> list[Line]:
    """Read a file of chats, one JSON object a line; blank lines are skipped.

    A line is `{"messages": [{"role": ..., "content": ...}, ...]}`, `{"question": ..., "answer":
    ...}`, the same as `{"prompt": ..., "response": ...}`, or `{"text": ...}`, which is no chat and
    counts as an answer from end to end. Each may have `"facts"`: strings of the answers that must
    be learnt.

    Raises:
        FileFormatError: lines that are not so, each with its number; or no line at all.
    """

    def line(number: int, value: Any) -> Line:
        said, facts = _parse(value)
        if isinstance(said, str):
            example = text_example(said, facts or (), tokenizer)
        else:
            example = chat_example(said, facts or (), tokenizer, template)
        return Line(number, said if isinstance(said, str) else tuple(said), facts, example)

    return _each_line(path, line)


def read_prompts(path: Path, tokenizer: Tokenizer, template: ChatTemplate) -> list[list[Message]]:
    """Read a file of questions: lines of `{"prompt"}`, or `{"messages"}` that end with the user's.

    An answer that a line has is left out, so that a file to tune on is a file of prompts too.

    Raises:
        FileFormatError: lines that are not so, each with its number; or no line at all.
    """

    def prompt(number: int, value: Any) -> list[Message]:
        if isinstance(value, dict) and "prompt" in value and "response" not in value:
            value = value | {"response": ""}
        said, _ = _parse(value)
        turns = [] if isinstance(said, str) else said
        while turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        if not turns or turns[-1].role != "user":
            raise InvalidRequestError("a prompt ends with what the user says")
        render_prompt(turns, template)
        return list(turns)

    return _each_line(path, prompt)


def _each_line(path: Path, read: Callable[[int, Any], T]) -> list[T]:
    """Return what `read` makes of every line, or raise with all lines that it refuses."""
    try:
        # Not splitlines: JSON strings may hold U+2028, U+2029 and U+0085 as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise FileFormatError(f"cannot read the chats in {path} ({exc})") from exc
    found: list[T] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(read(number, json.loads(line)))
        except (ValueError, RecursionError, InvalidRequestError) as exc:
            problems.append(f"line {number}: {exc}")
    if len(problems) == 1:
        raise FileFormatError(f"{path}, {problems[0]}")
    if problems:
        shown = "\n  ".join(problems[:MAX_PROBLEMS])
        left = len(problems) - MAX_PROBLEMS
        more = f"\n  and {left} more" if left > 0 else ""
        raise FileFormatError(f"{path}, {len(problems)} lines are wrong:\n  {shown}{more}")
    if not found:
        raise FileFormatError(f"{path} holds no chat; give one JSON object a line")
    return found


def chat_example(
    messages: Sequence[Message],
    facts: Sequence[str],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    num_before: int = 0,
    counts_before: bool = False,
) -> Example:
    """Render a chat as the engine would read it, and mark what the assistant says.

    An answer runs from the end of its prompt to the end of the stop string that ends it, since
    that is what the model must write.

    Args:
        messages: at least one of the assistant's.
        facts: strings that occur in answers; every occurrence there and before them is marked.
        tokenizer: of the model.
        template: of the model.
        num_before: messages at the start that are other talk: no fact is looked for in them.
        counts_before: whether the answers in them count as answers.

    Raises:
        InvalidRequestError: no answer, a fact that no answer has, or a template that writes
            earlier turns anew when later ones come.
    """
    whole = render_prompt([*messages, Message("user", "")], template)
    answers: list[tuple[int, int]] = []
    before: list[tuple[int, int]] = []
    asked: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start = len(_prefix(messages[:i], template, whole))
        if i >= num_before:
            asked.append((max((end for _, end in [*before, *answers]), default=0), start))
        said = len(_prefix(messages[: i + 1], template, whole))
        stops = [at + len(stop) for stop in template.stop if (at := whole.find(stop, said)) >= 0]
        (before if i < num_before else answers).append((start, min(stops, default=said)))
    if not answers:
        raise InvalidRequestError("a chat to tune on needs an answer of the assistant")
    text = whole[: answers[-1][1]]
    marked = [span for fact in facts for span in _occurrences(text, fact, answers)]
    marked += [span for fact in facts for span in _find(text, fact, asked)]
    counted = [*before, *answers] if counts_before else answers
    return mark_example(
        text, counted, marked, encode=tokenizer.encode, token_bytes=tokenizer.token_bytes
    )


def text_example(text: str, facts: Sequence[str], tokenizer: Tokenizer) -> Example:
    """Encode a text of which every token counts as an answer.

    Args:
        text: not empty.
        facts: strings that occur in it; every occurrence is marked.
        tokenizer: of the model.

    Raises:
        InvalidRequestError: an empty text, or a fact that it does not have.
    """
    if not text:
        raise InvalidRequestError("'text' must not be empty", param="text")
    whole = [(0, len(text))]
    marked = [span for fact in facts for span in _occurrences(text, fact, whole)]
    return mark_example(
        text, whole, marked, encode=tokenizer.encode, token_bytes=tokenizer.token_bytes
    )


def _prefix(messages: Sequence[Message], template: ChatTemplate, whole: str) -> str:
    text = render_prompt(messages, template).rstrip()
    if not whole.startswith(text):
        raise InvalidRequestError(
            f"the chat template {template.name!r} writes earlier turns anew when later ones come, "
            "so answers cannot be told apart; tune on chats of one turn"
        )
    return text


def _occurrences(text: str, fact: str, answers: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    found = _find(text, fact, answers) if fact else []
    if not found:
        raise InvalidRequestError(f"no answer contains the fact {fact!r}", param="facts")
    return found


def _find(text: str, fact: str, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    found = []
    for start, end in ranges:
        at = text.find(fact, start, end)
        while at >= 0:
            found.append((at, at + len(fact)))
            at = text.find(fact, at + len(fact), end)
    return found


def _parse(line: Any) -> tuple[str | list[Message], tuple[str, ...] | None]:
    """Return the text, or the messages, of a line and its facts, None if it does not say."""
    if not isinstance(line, dict) or not line.keys() <= _KEYS:
        raise InvalidRequestError(
            "a chat is an object with 'messages', 'question' and 'answer', 'prompt' and "
            "'response', or 'text', and maybe 'facts'"
        )
    given = line.get("facts", [])
    if not isinstance(given, list) or not all(isinstance(fact, str) for fact in given):
        raise InvalidRequestError(f"'facts' must be a list of strings, got {given!r}")
    facts = tuple(given) if "facts" in line else None
    if sum(any(key in line for key in kind) for kind in _KINDS) > 1:
        raise InvalidRequestError(
            "give 'messages', or 'question' and 'answer', or 'prompt' and 'response', or 'text', "
            "one of them"
        )
    if "text" in line:
        if not isinstance(line["text"], str):
            raise InvalidRequestError(f"'text' must be a text, got {line['text']!r}")
        return line["text"], facts
    turns = line.get("messages")
    if turns is None:
        asked, answered = next((p for p in _PAIRS if set(p) & line.keys()), _PAIRS[0])
        for key in (asked, answered):
            if not isinstance(line.get(key), str):
                raise InvalidRequestError(
                    f"{asked!r} and {answered!r} go together, both texts; got {line.get(key)!r} as "
                    f"{key!r}"
                )
        turns = [
            {"role": "user", "content": line.get(asked)},
            {"role": "assistant", "content": line.get(answered)},
        ]
    if not isinstance(turns, list):
        raise InvalidRequestError(f"'messages' must be a list, got {turns!r}")
    return [_message(turn) for turn in turns], facts


def _message(turn: Any) -> Message:
    role = turn.get("role") if isinstance(turn, dict) else None
    content = turn.get("content") if isinstance(turn, dict) else None
    if role not in ROLES or not isinstance(content, str):
        raise InvalidRequestError(
            f"a message has a role ({', '.join(ROLES)}) and a text as content, got {turn!r}"
        )
    return Message(role, content)
