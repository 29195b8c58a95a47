"""Messages to the text of a prompt, and where in it the user's own words are."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mrss_provider.backend import Message, Tool
from mrss_provider.chat.sandbox import compiled
from mrss_provider.chat.template import TEMPLATES, ChatTemplate, Pair
from mrss_provider.errors import InvalidRequestError


@dataclass(frozen=True)
class PromptText:
    """A prompt as text.

    Attributes:
        text: what the model reads.
        user_spans: of its characters, what the user wrote, in order, none empty; None where that
            was not found on the way (see `user_spans`).
    """

    text: str
    user_spans: tuple[range, ...] | None = None


def render_prompt(
    messages: Sequence[Message],
    template: ChatTemplate,
    tools: Sequence[Tool] = (),
    thinking: bool | None = None,
) -> str:
    """Return the text that the model reads; a last message of the assistant is continued.

    Args:
        messages: the chat.
        template: of the model.
        tools: that the model is told of.
        thinking: whether the answer begins with a thought; None leaves it to the model.

    Raises:
        InvalidRequestError: the template refuses these messages, or has no form for tools.
    """
    contents = [message.content for message in messages]
    return _render(messages, contents, template, tools, thinking)


def render_chat(
    messages: Sequence[Message],
    template: ChatTemplate,
    tools: Sequence[Tool] = (),
    thinking: bool | None = None,
) -> PromptText:
    """Do as `render_prompt` does, and find what the user wrote if that takes no second rendering.

    Our own templates treat a text in the same way whether it has marks at its ends or not, so they
    get it with marks, which are taken out again.

    Raises:
        InvalidRequestError: as `render_prompt`.
    """
    marks = _unused_marks([message.content for message in messages])
    if template.source in _OWN_SOURCES and marks is not None:
        marked = _marked(messages, marks)
        found = _between(_render(messages, marked, template, tools, thinking), marks)
        num_marked = sum(map(_is_said_by_user, messages))
        if found.user_spans is not None and len(found.user_spans) == num_marked:
            return found
        # The tools' descriptions, or a call, have the same characters.
    return PromptText(render_prompt(messages, template, tools, thinking))


def user_spans(
    messages: Sequence[Message],
    template: ChatTemplate,
    prompt: str,
    tools: Sequence[Tool] = (),
    thinking: bool | None = None,
) -> tuple[range, ...]:
    """Find what the user wrote in the prompt that `render_prompt` made of these messages.

    The template renders the messages once more, with a mark on either side of what each message of
    the user says. A template that does something else with text that has marks in it (it cuts,
    escapes or counts it) gives no spans: better no evidence than false evidence. What a tool said
    is not the user's.

    Returns:
        Spans of characters of `prompt`, in order, none empty.
    """
    marks = _unused_marks([prompt, *(message.content for message in messages)])
    if marks is None:
        return ()
    try:
        marked = _render(messages, _marked(messages, marks), template, tools, thinking)
    except InvalidRequestError:
        return ()
    found = _between(marked, marks)
    return found.user_spans or () if found.text == prompt else ()


def turn_starts(
    messages: Sequence[Message],
    template: ChatTemplate,
    prompt: str,
    spans: Sequence[range],
) -> tuple[int, ...]:
    """Find where the user's turns begin in the prompt that `render_prompt` made of these messages.

    A turn begins with what names the user: what of the text before a message also comes before a
    chat's first one. Messages without text are left out, and so is each that comes right after
    another of the user's: it goes on with that turn.

    Args:
        messages: the chat.
        template: of the model.
        prompt: that they were rendered to.
        spans: of `prompt`, what the user wrote (`user_spans`).

    Returns:
        Places in `prompt`, ascending; the first user's turn is among them.

    Raises:
        InvalidRequestError: the template makes something else of texts with marks in them, so that
            they cannot be found.
    """
    turns = [
        before.role != "user" if before else True
        for before, message in zip((None, *messages), messages, strict=False)
        if _is_said_by_user(message)
    ]
    if len(spans) != len(turns):
        raise InvalidRequestError(
            f"mrss.reinject 'turn' is refused: the chat template {template.name!r} does not show "
            "where the user's turns are in what it makes of these messages; leave it out",
            param="mrss.reinject",
        )
    opening = _before_first(template)
    starts = []
    bound = 0
    for is_turn, span in zip(turns, spans, strict=True):
        if is_turn and prompt.endswith(opening, bound, span.start):
            starts.append(span.start - len(opening))
        elif is_turn:
            starts.append(span.start - _num_alike(prompt[bound : span.start], opening))
        bound = span.stop
    return tuple(starts)


def _num_alike(text: str, other: str) -> int:
    """Return how many characters at the ends of two texts are the same."""
    pairs = zip(reversed(text), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


@functools.lru_cache(maxsize=16)
def _before_first(template: ChatTemplate) -> str:
    """Return what comes before the user's text in a chat that begins with it."""
    alone = (Message("user", "x"),)
    try:
        prompt = render_prompt(alone, template)
    except InvalidRequestError:
        # A template that wants more messages: turns begin with what the user wrote.
        return ""
    spans = user_spans(alone, template, prompt)
    return prompt[: spans[0].start] if spans else ""


def _render(
    messages: Sequence[Message],
    contents: Sequence[str],
    template: ChatTemplate,
    tools: Sequence[Tool],
    thinking: bool | None,
) -> str:
    """Render `messages` with other contents.

    Raises:
        InvalidRequestError: as `render_prompt`.
    """
    import jinja2

    has_calls = any(message.tool_calls or message.role == "tool" for message in messages)
    if template.tool_call is None and (tools or has_calls):
        raise InvalidRequestError(
            f"the chat template {template.name!r} has no form for tools; leave them out, or choose "
            "another template",
            param="tools" if tools else "messages",
        )
    forged = _marks_of(template, with_tools=bool(tools) or has_calls)
    turns = [
        _turn(message, content, forged) for message, content in zip(messages, contents, strict=True)
    ]
    continues = bool(messages) and messages[-1].role == "assistant"
    try:
        return compiled(template.source, template.name).render(
            messages=turns,
            continues=continues,
            tools=[tool_object(tool) for tool in tools],
            thinking=thinking,
        )
    except jinja2.TemplateError as exc:
        raise InvalidRequestError(
            f"the chat template {template.name!r} refuses these messages: {exc}", param="messages"
        ) from exc


def tool_object(tool: Tool) -> dict[str, Any]:
    """Return a tool as OpenAI writes it, and templates do."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": {**function, "parameters": dict(tool.parameters)}}


def _turn(message: Message, content: str, forged: re.Pattern[str] | None) -> Mapping[str, Any]:
    """Return a message as templates see it; only its writers may write marks."""
    if forged is not None and message.role in ("user", "tool"):
        content = forged.sub(lambda found: f"{found[0][0]} {found[0][1:]}", content)
    calls = [
        # Once more: on one line, whatever the caller's JSON looks like.
        {"name": call.name, "arguments": _on_one_line(call.arguments)}
        for call in message.tool_calls
    ]
    return {"role": message.role, "content": content, "tool_calls": calls}


def _on_one_line(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False)
    except ValueError as exc:
        raise InvalidRequestError(
            f"the arguments of a call must be JSON, got {arguments!r:.80}", param="messages"
        ) from exc


@functools.lru_cache(maxsize=16)
def _marks_of(template: ChatTemplate, *, with_tools: bool) -> re.Pattern[str] | None:
    """Return what nobody but the model and the template may write, if there is any.

    Marks of tools mean nothing in a chat without any, whose texts stay as they are.
    """
    pairs = [template.thought]
    if with_tools:
        pairs += [template.tool_call, template.tool_result, ("<tools>", "</tools>")]
    marks = [mark for pair in pairs if pair is not None for mark in pair]
    if not marks:
        return None
    return re.compile("|".join(map(re.escape, marks)), re.IGNORECASE)


def _unused_marks(texts: Sequence[str]) -> Pair | None:
    """Return two characters for private use that stand nowhere in the texts, if there are."""
    free = (c for c in map(chr, _PRIVATE_USE) if not any(c in text for text in texts))
    marks = tuple(itertools.islice(free, 2))
    return (marks[0], marks[1]) if len(marks) == 2 else None


def _is_said_by_user(message: Message) -> bool:
    return message.role == "user" and bool(message.content.strip())


def _marked(messages: Sequence[Message], marks: Pair) -> list[str]:
    """Return the messages' contents, the user's between marks."""
    return [
        _mark(message.content, *marks) if message.role == "user" else message.content
        for message in messages
    ]


def _between(text: str, marks: Pair) -> PromptText:
    """Take the marks out of a text; its spans are what was between them, if each has its pair."""
    begin, end = marks
    parts = re.split(f"([{begin}{end}])", text)
    said = parts[::2]
    if "".join(parts[1::2]) != (begin + end) * (len(parts) // 4):
        return PromptText("".join(said))
    ends = list(itertools.accumulate(map(len, said)))
    spans = map(range, ends[:-1:2], ends[1::2])
    return PromptText("".join(said), tuple(spans))


def _mark(text: str, begin: str, end: str) -> str:
    """Put marks around `text` but for its outer white space, which templates may take away."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    return f"{text[:start]}{begin}{core}{end}{text[start + len(core) :]}"


_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_OWN_SOURCES = frozenset(template.source for template in TEMPLATES.values())
