"""`tools`, `tool_choice`, `parallel_tool_calls`: read, checked as OpenAI checks them, written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mrss_provider.backend import Tool, ToolCall, ToolCallDelta, ToolChoice
from mrss_provider.errors import InvalidRequestError
from mrss_provider.openai_schema.checks import check_text, expect, kind_of
from mrss_provider.openai_schema.keys import CACHE_HINTS, KeyTable

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MODES = ("none", "auto", "required")


def parse_tools(known: Mapping[str, Any]) -> tuple[tuple[Tool, ...], ToolChoice]:
    """Return what a chat says of tools.

    Raises:
        InvalidRequestError: naming the key at fault in `param`.
    """
    raw = expect(known.get("tools", []), list, "tools", "a list of functions")
    if len(raw) > MAX_TOOLS:
        raise InvalidRequestError(
            f"tools may have {MAX_TOOLS} entries, got {len(raw)}", param="tools"
        )
    tools = tuple(_parse_tool(item, f"tools[{i}]") for i, item in enumerate(raw))
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidRequestError(
                f"tools[{i}].function.name {name!r} is taken by tools[{names.index(name)}]; "
                "give each function a name of its own",
                param=f"tools[{i}].function.name",
            )
    parallel = expect(
        known.get("parallel_tool_calls", True), bool, "parallel_tool_calls", "true or false"
    )
    if not tools:
        if known.get("tool_choice", "none") != "none":
            raise InvalidRequestError(
                "tool_choice needs tools; leave it out or give some", param="tool_choice"
            )
        return (), ToolChoice()
    return tools, _parse_choice(known.get("tool_choice", "auto"), names, parallel)


def write_tools(body: dict[str, Any], tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Write what `parse_tools` reads into `body`, which is modified."""
    if not tools:
        return
    body["tools"] = [_tool_object(tool) for tool in tools]
    if choice.name is not None:
        body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice.mode != "auto":
        body["tool_choice"] = choice.mode
    if not choice.parallel:
        body["parallel_tool_calls"] = False


def parse_calls(raw: object, where: str) -> tuple[ToolCall, ...]:
    """Return the `tool_calls` of an assistant's message that comes back.

    Raises:
        InvalidRequestError: one that no assistant of ours made.
    """
    items = expect(raw, list, where, "a list of calls")
    calls = tuple(_parse_call(item, f"{where}[{i}]") for i, item in enumerate(items))
    ids = [call.id for call in calls]
    for i, call_id in enumerate(ids):
        if call_id in ids[:i]:
            raise InvalidRequestError(
                f"{where}[{i}].id {call_id!r} is that of another call of this message",
                param=f"{where}[{i}].id",
            )
    return calls


def call_object(call: ToolCall) -> dict[str, Any]:
    """Write a whole call."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def delta_object(piece: ToolCallDelta) -> dict[str, Any]:
    """Write a piece of a call; the first one says whose piece it is."""
    function: dict[str, Any] = {"arguments": piece.arguments}
    if piece.id is None:
        return {"index": piece.position, "function": function}
    function = {"name": piece.name, **function}
    return {"index": piece.position, "id": piece.id, "type": "function", "function": function}


def read_deltas(raw: object) -> tuple[ToolCallDelta, ...]:
    """Read what `delta_object` wrote, a list of it or nothing.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise TypeError(f"tool_calls is {kind_of(raw)}")
    return tuple(
        ToolCallDelta(
            piece["index"],
            piece.get("id"),
            piece["function"].get("name"),
            piece["function"]["arguments"],
        )
        for piece in raw
    )


def with_deltas(
    calls: tuple[ToolCall, ...], pieces: Sequence[ToolCallDelta]
) -> tuple[ToolCall, ...]:
    """Return calls with pieces added to them, in the order in which they came."""
    for piece in pieces:
        if piece.position == len(calls):
            calls += (ToolCall(piece.id or "", piece.name or "", piece.arguments),)
        else:
            call = calls[piece.position]
            longer = replace(call, arguments=call.arguments + piece.arguments)
            calls = (*calls[: piece.position], longer, *calls[piece.position + 1 :])
    return calls


def _parse_tool(item: object, where: str) -> Tool:
    fields = _select_of_function(item, where)
    function = _select(
        fields.get("function"), f"{where}.function", {"name", "description", "parameters", "strict"}
    )
    where = f"{where}.function"
    name = expect(function.get("name"), str, f"{where}.name", "a text")
    if not NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{where}.name must have 1 to 64 letters, digits, '_' and '-', got {name!r:.80}",
            param=f"{where}.name",
        )
    description = expect(function.get("description", ""), str, f"{where}.description", "a text")
    return Tool(
        name=name,
        description=check_text(description, f"{where}.description"),
        parameters=_parse_parameters(function.get("parameters", {}), f"{where}.parameters"),
        strict=expect(function.get("strict", False), bool, f"{where}.strict", "true or false"),
    )


def _parse_parameters(raw: object, where: str) -> dict[str, Any]:
    """Return a schema of arguments, which are an object; what it says inside is for the grammar."""
    schema: dict[str, Any] = expect(raw, dict, where, "a JSON Schema, an object")
    if schema and schema.get("type") != "object":
        raise InvalidRequestError(
            f'{where} must be a JSON Schema of type "object", got type {schema.get("type")!r:.80}',
            param=where,
        )
    check_text(json.dumps(schema, ensure_ascii=False), where)
    return schema


def _parse_choice(raw: object, names: Sequence[str], parallel: bool) -> ToolChoice:
    if isinstance(raw, str):
        if raw not in _MODES:
            raise InvalidRequestError(
                f"tool_choice must be one of {', '.join(_MODES)} or a function, got {raw!r:.80}",
                param="tool_choice",
            )
        return ToolChoice(mode=raw, parallel=parallel)  # type: ignore[arg-type]
    fields = _select_of_function(raw, "tool_choice")
    function = _select(fields.get("function"), "tool_choice.function", {"name"})
    name = function.get("name")
    if name not in names:
        raise InvalidRequestError(
            f"tool_choice.function.name must be one of {', '.join(names)}, got {name!r:.80}",
            param="tool_choice",
        )
    return ToolChoice("required", str(name), parallel)


def _parse_call(item: object, where: str) -> ToolCall:
    # Clients that put a stream together leave its `index` in.
    table = KeyTable(
        where,
        frozenset({"id", "type", "function"}),
        CACHE_HINTS | {"index", "provider_specific_fields", "caller"},
        {},
    )
    fields = table.select(expect(item, dict, where, "a call"))
    _expect_function(fields.get("type", "function"), where)
    function = _select(fields.get("function"), f"{where}.function", {"name", "arguments"})
    call_id = expect(fields.get("id"), str, f"{where}.id", "a text")
    name = expect(function.get("name"), str, f"{where}.function.name", "a text")
    path = f"{where}.function.arguments"
    # Other servers write no arguments as no text, and a chat may move from them to here.
    arguments = expect(function.get("arguments"), str, path, "a JSON object, as text") or "{}"
    if not _is_object(arguments):
        raise InvalidRequestError(
            f"{path} must be a JSON object, as text, got {arguments!r:.80}", param=path
        )
    return ToolCall(
        check_text(call_id, f"{where}.id"),
        check_text(name, f"{where}.function.name"),
        check_text(arguments, path),
    )


def _is_object(text: str) -> bool:
    """Tell whether `text` is a JSON object that can be written again, also in UTF-8."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict)


def _tool_object(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = dict(tool.parameters)
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _select(
    raw: object, where: str, keys: set[str], accepted: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Return an object's entries, none but `keys`; null stands for absent."""
    table = KeyTable(where, frozenset(keys), accepted, {})
    return table.select(expect(raw, dict, where, "an object"))


def _select_of_function(raw: object, where: str) -> dict[str, Any]:
    """Return the entries of a function; of anything else, its type is what is wrong."""
    found = expect(raw, dict, where, "an object")
    _expect_function(found.get("type"), where)
    return _select(found, where, {"type", "function"}, CACHE_HINTS)


def _expect_function(kind: object, where: str) -> None:
    if kind != "function":
        shown = repr(kind) if isinstance(kind, str) else kind_of(kind)
        raise InvalidRequestError(
            f"{where}.type must be 'function', got {shown}; only functions are called",
            param=f"{where}.type",
        )
