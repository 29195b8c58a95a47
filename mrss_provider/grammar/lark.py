"""Lark texts: their JSON Schemas prepared like any other, and refused what masks cannot do."""

from __future__ import annotations

import json
import re
from typing import NoReturn

from mrss_provider.errors import InvalidRequestError
from mrss_provider.grammar.schema import MAX_REGEX_CHARS, OPTIONS, prepare_schema

_JSON = re.compile(r"%json(?![\w-])\s*")
_OPTIONS = re.compile(r"%llguidance(?![\w-])")
# A string, a regular expression (which may have lines) or a comment, as llguidance reads them: what
# is in it means nothing to us.
_OPAQUE = re.compile(r'"(?:[^"\\\n]|\\.)*"i?|/(?!/)(?:[^/\\]|\\.)+/[imslux]*|//[^\n]*|#[^\n]*')
_ATTRIBUTES = re.compile(r"(?m)^[ \t]*[?!]?[\w-]+(?:::\w+)?[ \t]*\[([^\]\n]*)\][ \t]*:")
_TOKEN = re.compile(r"<[^<>\s]+>")
_REFERENCE = re.compile(r"@[\w-]+")
# Each is compiled by itself, and slower the more there are.
_MAX_SCHEMAS = 256
# They change how a token is drawn, take text back, or count tokens of one tokeniser.
_REFUSED_ATTRIBUTES = ("stop", "temperature", "max_tokens", "stop_capture")


def prepare_lark(text: str, param: str) -> str:
    """Return a Lark text for llguidance.

    Raises:
        InvalidRequestError: a `%json` schema that cannot be honoured, an attribute of a rule or a
            token by its id, which nothing here follows, or no Lark.
    """
    pieces: list[str] = []
    plain: list[str] = []
    num_schemas = num_regex_chars = 0
    at = 0
    while at < len(text):
        found = _JSON.match(text, at)
        if found is not None:
            num_schemas += 1
            if num_schemas > _MAX_SCHEMAS:
                _fail(param, f"a text may have {_MAX_SCHEMAS} %json; make it smaller")
            schema, at = _read_json(text, found.end(), param)
            pieces.append(f"%json {schema}")
            continue
        opaque = _OPAQUE.match(text, at)
        if opaque is None and text[at] in '"/':
            _fail(param, f"what begins with {text[at : at + 20]!r} has no end")
        end = at + 1 if opaque is None else opaque.end()
        if opaque is not None and opaque[0][0] == "/" and opaque[0][:2] != "//":
            num_regex_chars += end - at
            if num_regex_chars > MAX_REGEX_CHARS:
                _fail(
                    param, f"its regular expressions may have {MAX_REGEX_CHARS} characters in all"
                )
        plain.append(text[at:end] if opaque is None else " ")
        pieces.append(text[at:end])
        at = end
    _check_plain("".join(plain), param)
    return "".join(pieces)


def _read_json(text: str, start: int, param: str) -> tuple[str, int]:
    try:
        schema, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequestError(
            f"{param}: %json must be followed by a JSON Schema, got "
            f"{text[start : start + 40]!r} ({exc})",
            param=param,
        ) from exc
    prepared = prepare_schema(schema, param)
    if isinstance(prepared, bool):
        _fail(param, "%json must be followed by an object")
    return json.dumps({"x-guidance": dict(OPTIONS), **prepared}), end


def _check_plain(text: str, param: str) -> None:
    """Refuse what would be followed only in part; `text` has no strings, regexes and comments."""
    if _OPTIONS.search(text):
        _fail(param, "%llguidance options are not taken")
    for attributes in _ATTRIBUTES.finditer(text):
        for name in _REFUSED_ATTRIBUTES:
            if re.search(rf"(?<![\w-]){name}(?![\w-])", attributes[1]):
                _fail(param, f"the attribute {name!r} of a rule cannot be honoured; use lazy")
    token = _TOKEN.search(text)
    if token:
        _fail(param, f"the special token {token[0]!r} cannot be asked for; write its text")
    reference = _REFERENCE.search(text)
    if reference:
        _fail(param, f"{reference[0]!r} is another grammar, and there is one; use %json")


def _fail(param: str, why: str) -> NoReturn:
    raise InvalidRequestError(f"{param}: {why}", param=param)
