"""Messages to the text of a prompt, and where in it the user's own words are."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mrss_provider.backend import Message, Tool
from mrss_provider.chat.sandbox import compiled
from mrss_provider.chat.template import ChatTemplate
from mrss_provider.errors import InvalidRequestError


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
    marks = _unused_marks(prompt, messages)
    if len(marks) < 2:
        return ()
    begin, end = marks
    marked = [
        _mark(message.content, begin, end) if message.role == "user" else message.content
        for message in messages
    ]
    try:
        text = _render(messages, marked, template, tools, thinking)
    except InvalidRequestError:
        return ()
    if text.replace(begin, "").replace(end, "") != prompt:
        return ()
    spans: list[range] = []
    start: int | None = None
    # Every mark before this one is no part of the prompt.
    for number, found in enumerate(re.finditer(f"[{begin}{end}]", text)):
        at = found.start() - number
        if (found[0] == begin) != (start is None):
            return ()
        if start is not None:
            spans.append(range(start, at))
        start = at if start is None else None
    return tuple(spans) if start is None else ()


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


def _unused_marks(prompt: str, messages: Sequence[Message]) -> list[str]:
    """Return two characters for private use that stand nowhere in the messages, if there are."""
    used = set(prompt).union(*(message.content for message in messages))
    return list(itertools.islice((c for c in map(chr, _PRIVATE_USE) if c not in used), 2))


def _mark(text: str, begin: str, end: str) -> str:
    """Put marks around `text` but for its outer white space, which templates may take away."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    return f"{text[:start]}{begin}{core}{end}{text[start + len(core) :]}"


_PRIVATE_USE = range(0xF0000, 0xFFFFE)
