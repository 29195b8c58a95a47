"""`messages`: each one, and that calls and what tools said to them go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mrss_provider.backend import Message, Role
from mrss_provider.errors import InvalidRequestError
from mrss_provider.openai_schema.checks import check_text, expect
from mrss_provider.openai_schema.keys import message_keys
from mrss_provider.openai_schema.tools import call_object, parse_calls

MAX_MESSAGES = 4096

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def parse_messages(known: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the chat of a body.

    Raises:
        InvalidRequestError: naming the message at fault.
    """
    raw = expect(known.get("messages"), list, "messages", "a list of messages")
    if not 0 < len(raw) <= MAX_MESSAGES:
        raise InvalidRequestError(
            f"messages must have 1 to {MAX_MESSAGES} entries, got {len(raw)}", param="messages"
        )
    messages = tuple(_parse_message(item, i) for i, item in enumerate(raw))
    _check_calls(messages)
    return messages


def texts_of(messages: Sequence[Message]) -> list[str]:
    """Return every text that a chat holds."""
    calls = [call.arguments for message in messages for call in message.tool_calls]
    return [*(message.content for message in messages), *calls]


def message_object(message: Message) -> dict[str, Any]:
    """Write what `parse_messages` reads."""
    written: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        written["tool_calls"] = [call_object(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        written["tool_call_id"] = message.tool_call_id
    return written


def _parse_message(item: object, i: int) -> Message:
    where = f"messages[{i}]"
    raw = expect(item, dict, where, "an object")
    role = raw.get("role")
    if role == "function":
        raise InvalidRequestError(
            f"{where}.role 'function' is refused: answer with role 'tool' and tool_call_id",
            param=where,
        )
    known = message_keys(i).select(raw)
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequestError(
            f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}", param=where
        )
    calls = _parse_tool_calls(known, role, where)
    call_id = _parse_call_id(known, role, where)
    content = known.get("content")
    if content is None and calls:
        content = ""
    return Message(ROLES[role], _parse_content(content, f"{where}.content"), calls, call_id)


def _parse_tool_calls(known: Mapping[str, Any], role: str, where: str) -> Any:
    if not known.get("tool_calls", ()):
        return ()
    if role != "assistant":
        raise InvalidRequestError(
            f"{where}.tool_calls are the assistant's, not those of {role!r}", param=where
        )
    return parse_calls(known["tool_calls"], f"{where}.tool_calls")


def _parse_call_id(known: Mapping[str, Any], role: str, where: str) -> str | None:
    call_id = known.get("tool_call_id")
    path = f"{where}.tool_call_id"
    if role == "tool":
        text: str = expect(call_id, str, path, "the id of the call that this answers")
        return check_text(text, path)
    if call_id is not None:
        raise InvalidRequestError(f"{path} is for role 'tool', not for {role!r}", param=path)
    return None


def _parse_content(content: object, where: str) -> str:
    if isinstance(content, str):
        return check_text(content, where)
    parts = expect(content, list, where, "a string or a list of text parts")
    texts = []
    for j, part in enumerate(parts):
        path = f"{where}[{j}]"
        fields_ = expect(part, dict, path, "a text part")
        if fields_.get("type") != "text":
            raise InvalidRequestError(
                f"{path}.type must be 'text', got {fields_.get('type')!r}; only text is read",
                param=path,
            )
        texts.append(check_text(expect(fields_.get("text"), str, path, "text"), path))
    return "".join(texts)


def _check_calls(messages: Sequence[Message]) -> None:
    """Return if each call has one answer, directly after the message that made it.

    Raises:
        InvalidRequestError: naming the message.
    """
    open_calls: dict[str, None] = {}
    for i, message in enumerate(messages):
        if message.role == "tool":
            if message.tool_call_id not in open_calls:
                raise InvalidRequestError(
                    f"messages[{i}].tool_call_id {message.tool_call_id!r:.80} answers no call of "
                    "the assistant's message before it, or one that is answered already",
                    param=f"messages[{i}].tool_call_id",
                )
            del open_calls[message.tool_call_id]
            continue
        _check_answered(open_calls, i)
        open_calls = dict.fromkeys(call.id for call in message.tool_calls)
    _check_answered(open_calls, len(messages))


def _check_answered(open_calls: Mapping[str, None], i: int) -> None:
    if open_calls:
        raise InvalidRequestError(
            "after a message with tool_calls comes one of role 'tool' for each of them; missing "
            f"before messages[{i}]: {', '.join(open_calls)}",
            param="messages",
        )
