"""Checks of an answer that stand in the prompt file: exact, contains, regex and json_schema.

Each is parsed once, before anything is asked, and then says of a text whether it passes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mrss_provider.errors import FileFormatError

TYPES = ("exact", "contains", "regex", "json_schema")


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        type: one of `TYPES`.
        passes: whether a text does.
    """

    type: str
    passes: Callable[[str], bool]


def parse_check(raw: object) -> Check:
    """Read one check.

    `exact` and `contains` take "value" and "ignore_case"; `regex` takes "pattern", which may be
    anywhere in the text; `json_schema` takes "schema", and the whole text must be such JSON.

    Raises:
        FileFormatError: an unknown type or key, or a value that no check can have.
    """
    if not isinstance(raw, dict) or raw.get("type") not in TYPES:
        raise FileFormatError(f'a check must have a "type" of {", ".join(TYPES)}, got {raw!r:.80}')
    fields = {key: value for key, value in raw.items() if key != "type"}
    parse: Callable[[Mapping[str, Any]], Callable[[str], bool]] = {
        "exact": _exact,
        "contains": _contains,
        "regex": _regex,
        "json_schema": _json_schema,
    }[raw["type"]]
    return Check(raw["type"], parse(fields))


def share_passed(checks: Sequence[Check], text: str) -> float:
    """Return the share of `checks`, at least one, that `text` passes, in [0, 1]."""
    return sum(check.passes(text) for check in checks) / len(checks)


def _exact(fields: Mapping[str, Any]) -> Callable[[str], bool]:
    value, folded = _value(fields)
    return lambda text: folded(text.strip()) == folded(value.strip())


def _contains(fields: Mapping[str, Any]) -> Callable[[str], bool]:
    value, folded = _value(fields)
    return lambda text: folded(value) in folded(text)


def _value(fields: Mapping[str, Any]) -> tuple[str, Callable[[str], str]]:
    _known(fields, ("value", "ignore_case"))
    value = _text(fields, "value")
    ignore_case = fields.get("ignore_case", False)
    if not isinstance(ignore_case, bool):
        raise FileFormatError(f"ignore_case must be true or false, got {ignore_case!r:.40}")
    return value, str.casefold if ignore_case else str


def _regex(fields: Mapping[str, Any]) -> Callable[[str], bool]:
    _known(fields, ("pattern",))
    try:
        pattern = re.compile(_text(fields, "pattern"))
    except re.error as exc:
        raise FileFormatError(f"the pattern of a regex check is none: {exc}") from exc
    return lambda text: pattern.search(text) is not None


def _json_schema(fields: Mapping[str, Any]) -> Callable[[str], bool]:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    _known(fields, ("schema",))
    schema = fields.get("schema")
    if not isinstance(schema, dict | bool):
        raise FileFormatError(f"schema must be a JSON schema, got {schema!r:.40}")
    cls = validator_for(schema)
    try:
        cls.check_schema(schema)
    except SchemaError as exc:
        raise FileFormatError(f"schema is no JSON schema: {exc.message}") from exc
    validator = cls(schema)

    def passes(text: str) -> bool:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return bool(validator.is_valid(value))

    return passes


def _known(fields: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in fields:
        if key not in known:
            raise FileFormatError(
                f"{key!r:.40} is no key of this check; known are {', '.join(known)}"
            )


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value:
        raise FileFormatError(f"{key} must be a text, got {value!r:.40}")
    return value
