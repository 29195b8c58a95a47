"""What an answer is to conform to: `response_format`, `mrss.regex` and `mrss.grammar`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mrss_provider.backend import Grammar
from mrss_provider.errors import InvalidRequestError
from mrss_provider.openai_schema.checks import check_text, expect
from mrss_provider.openai_schema.keys import FORMAT_KEYS, JSON_SCHEMA_KEYS

FORMATS = ("text", "json_object", "json_schema")

_FORMAT = "response_format"
_ANY_OBJECT = json.dumps({"type": "object"})
_NAME = "answer"


def parse_grammar(known: Mapping[str, Any]) -> Grammar | None:
    """Return what an answer is to conform to; None if it is any text.

    Raises:
        InvalidRequestError: naming the key at fault, or two where one is asked for.
    """
    mrss = known.get("mrss", {})
    asked = [
        _parse_format(known.get(_FORMAT)),
        _parse_text(mrss.get("regex"), "mrss.regex"),
        _parse_text(mrss.get("grammar"), "mrss.grammar"),
    ]
    found = [grammar for grammar in asked if grammar is not None]
    if len(found) > 1:
        raise InvalidRequestError(
            f"an answer conforms to one thing: give {found[0].param} or {found[1].param}, not both",
            param=found[1].param,
        )
    return found[0] if found else None


def write_grammar(body: dict[str, Any], mrss: dict[str, Any], grammar: Grammar | None) -> None:
    """Write the keys that parse back to `grammar` to a body and its `mrss` object."""
    if grammar is None:
        return
    if grammar.kind == "regex":
        mrss["regex"] = grammar.text
    elif grammar.kind == "lark":
        mrss["grammar"] = grammar.text
    elif grammar.text == _ANY_OBJECT:
        body[_FORMAT] = {"type": "json_object"}
    else:
        schema = {"name": _NAME, "schema": json.loads(grammar.text), "strict": True}
        body[_FORMAT] = {"type": "json_schema", "json_schema": schema}


def _parse_format(raw: object) -> Grammar | None:
    if raw is None:
        return None
    fields = FORMAT_KEYS.select(expect(raw, dict, _FORMAT, "an object"))
    kind = fields.get("type")
    if kind not in FORMATS:
        raise InvalidRequestError(
            f"response_format.type must be one of {', '.join(FORMATS)}, got {kind!r}",
            param=_FORMAT,
        )
    if kind == "json_schema":
        return Grammar("json_schema", _parse_schema(fields.get("json_schema")), _FORMAT)
    if "json_schema" in fields:
        raise InvalidRequestError(
            f"response_format.json_schema goes with the type 'json_schema', got the type {kind!r}",
            param=_FORMAT,
        )
    return Grammar("json_schema", _ANY_OBJECT, _FORMAT) if kind == "json_object" else None


def _parse_schema(raw: object) -> str:
    where = "response_format.json_schema"
    fields = JSON_SCHEMA_KEYS.select(expect(raw, dict, where, "an object with 'name' and 'schema'"))
    for key, kind, allowed in (
        ("name", str, "a text"),
        ("description", str, "a text"),
        ("strict", bool, "true or false"),
    ):
        if key in fields:
            expect(fields[key], kind, f"{where}.{key}", allowed)
    schema = expect(fields.get("schema"), dict, f"{where}.schema", "a JSON Schema")
    check_text(json.dumps(schema, ensure_ascii=False), f"{where}.schema")
    # What else it must be is known where it is compiled.
    return json.dumps(schema)


def _parse_text(raw: object, where: str) -> Grammar | None:
    if raw is None:
        return None
    text = check_text(expect(raw, str, where, "a text"), where)
    if not text:
        raise InvalidRequestError(
            f"{where} must be a text that is not empty, got ''; leave it out", param=where
        )
    return Grammar("regex" if where == "mrss.regex" else "lark", text, where)
