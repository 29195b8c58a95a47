"""Chats and texts as examples: JSON Lines in, token ids with answers and facts marked out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mrss_provider.backend import Message
from mrss_provider.chat import ChatTemplate, render_prompt
from mrss_provider.errors import FileFormatError, InvalidRequestError
from mrss_provider.tokenizer import Tokenizer
from mrss_provider.tune.examples import Example, mark_example

ROLES = ("system", "user", "assistant")

_PAIRS = (("question", "answer"), ("prompt", "response"))
_KINDS = (*_PAIRS, ("messages",), ("text",))
_KEYS = {"messages", "text", "facts", *(key for pair in _PAIRS for key in pair)}


def read_chats(path: Path, tokenizer: Tokenizer, template: ChatTemplate) -> list[Example]:
    """Read a file of chats, one JSON object a line; blank lines are skipped.

    A line is `{"messages": [{"role": ..., "content": ...}, ...]}`, `{"question": ..., "answer":
    ...}`, the same as `{"prompt": ..., "response": ...}`, or `{"text": ...}`, which is no chat and
    counts as an answer from end to end. Each may have `"facts"`: strings of the answers that must
    be learnt.

    Raises:
        FileFormatError: a line that is not so, with its number; or no line at all.
    """
    try:
        # Not splitlines: JSON strings may hold U+2028, U+2029 and U+0085 as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise FileFormatError(f"cannot read the chats in {path} ({exc})") from exc
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            said, facts = _parse(json.loads(line))
            if isinstance(said, str):
                examples.append(text_example(said, facts, tokenizer))
            else:
                examples.append(chat_example(said, facts, tokenizer, template))
        except (ValueError, InvalidRequestError) as exc:
            raise FileFormatError(f"{path}, line {number}: {exc}") from exc
    if not examples:
        raise FileFormatError(f"{path} holds no chat; give one JSON object a line")
    return examples


def chat_example(
    messages: Sequence[Message],
    facts: Sequence[str],
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> Example:
    """Render a chat as the engine would read it, and mark what the assistant says.

    An answer runs from the end of its prompt to the end of the stop string that ends it, since
    that is what the model must write.

    Args:
        messages: at least one of the assistant's.
        facts: strings that occur in answers; every occurrence there is marked.
        tokenizer: of the model.
        template: of the model.

    Raises:
        InvalidRequestError: no answer, a fact that no answer has, or a template that writes
            earlier turns anew when later ones come.
    """
    whole = render_prompt([*messages, Message("user", "")], template)
    answers = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start = len(_prefix(messages[:i], template, whole))
        said = len(_prefix(messages[: i + 1], template, whole))
        stops = [at + len(stop) for stop in template.stop if (at := whole.find(stop, said)) >= 0]
        answers.append((start, min(stops, default=said)))
    if not answers:
        raise InvalidRequestError("a chat to tune on needs an answer of the assistant")
    text = whole[: answers[-1][1]]
    marked = [span for fact in facts for span in _occurrences(text, fact, answers)]
    return mark_example(
        text, answers, marked, encode=tokenizer.encode, token_bytes=tokenizer.token_bytes
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
    found = []
    for start, end in answers:
        at = text.find(fact, start, end) if fact else -1
        while at >= 0:
            found.append((at, at + len(fact)))
            at = text.find(fact, at + len(fact), end)
    if not found:
        raise InvalidRequestError(f"no answer contains the fact {fact!r}", param="facts")
    return found


def _parse(line: Any) -> tuple[str | list[Message], list[str]]:
    """Return the text, or the messages, of a line and its facts."""
    if not isinstance(line, dict) or not line.keys() <= _KEYS:
        raise InvalidRequestError(
            "a chat is an object with 'messages', 'question' and 'answer', 'prompt' and "
            "'response', or 'text', and maybe 'facts'"
        )
    facts = line.get("facts", [])
    if not isinstance(facts, list) or not all(isinstance(fact, str) for fact in facts):
        raise InvalidRequestError(f"'facts' must be a list of strings, got {facts!r}")
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
