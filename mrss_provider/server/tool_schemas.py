"""JSON schemas of tools, calls and thoughts, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from mrss_provider.openai_schema.keys import CACHE_HINTS
from mrss_provider.openai_schema.reasoning import EFFORTS
from mrss_provider.openai_schema.tools import MAX_TOOLS, NAME

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_OPTIONAL_TEXT: Schema = {"type": ["string", "null"]}


def _object(required: dict[str, Schema], **optional: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


_FUNCTION = {"const": "function"}
_HINTS: dict[str, Schema] = {key: {} for key in sorted(CACHE_HINTS)}

_TOOL = _object(
    {
        "type": _FUNCTION,
        "function": _object(
            {"name": {"type": "string", "pattern": f"^{NAME.pattern}$"}},
            description=_OPTIONAL_TEXT,
            parameters={
                "type": ["object", "null"],
                "description": 'A JSON Schema of type "object".',
            },
            strict={"type": ["boolean", "null"]},
        ),
    },
    **_HINTS,
)

_NAMED = _object({"type": _FUNCTION, "function": _object({"name": _TEXT})}, **_HINTS)

CALL: Schema = {
    "type": "object",
    "properties": {
        "id": _TEXT,
        "type": _FUNCTION,
        "function": {
            "type": "object",
            "properties": {"name": _TEXT, "arguments": _TEXT},
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "function"],
}

REQUEST: dict[str, Schema] = {
    "tools": {"type": ["array", "null"], "items": _TOOL, "maxItems": MAX_TOOLS},
    "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required", None]}, _NAMED]},
    "parallel_tool_calls": {"type": ["boolean", "null"]},
    "reasoning_effort": {"enum": [*EFFORTS, None]},
    "thinking": {
        "anyOf": [
            {"type": "null"},
            _object({"type": {"enum": ["enabled", "adaptive", "disabled"]}}),
        ]
    },
}
"""Keys of a chat."""

MESSAGE: dict[str, Schema] = {
    "tool_calls": {"type": ["array", "null"], "items": CALL},
    "tool_call_id": _OPTIONAL_TEXT,
}
"""Keys of a message."""

SAID: dict[str, Schema] = {
    "reasoning_content": _TEXT,
    "tool_calls": {"type": "array", "items": CALL},
}
"""What an answer may have beside its content."""
