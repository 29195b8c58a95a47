"""Whether no JSON value can satisfy two of several schemas: then `oneOf` is `anyOf`.

Seen are what people write: branches of different types, and objects that are told apart by a
required property with different values in each (a tagged union).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

Resolve = Callable[[str], Any]
"""What a reference leads to, or None."""

# A reference that leads to itself would be followed for ever.
_MAX_STEPS = 16
# Every two of so many are compared; more must list their values.
_MAX_COMPARED = 128


def are_disjoint(schemas: Sequence[Any], resolve: Resolve) -> bool:
    """Tell whether every two of `schemas` surely share no value; False also where it is unknown."""
    known = [_follow(schema, resolve) for schema in schemas]
    if len(known) > _MAX_COMPARED:
        values = [_values(schema) if isinstance(schema, dict) else None for schema in known]
        listed = [each for each in values if each is not None]
        is_disjoint = sum(map(len, listed)) == len(set().union(*listed))
        return is_disjoint and len(listed) == len(known)
    return all(_exclude(a, b, resolve) for a, b in itertools.combinations(known, 2))


def _exclude(a: Any, b: Any, resolve: Resolve) -> bool:
    if not isinstance(a, dict) or not isinstance(b, dict):
        return False
    kinds_a, kinds_b = _kinds(a), _kinds(b)
    if kinds_a is not None and kinds_b is not None and not kinds_a & kinds_b:
        return True
    values_a, values_b = _values(a), _values(b)
    if values_a is not None and values_b is not None:
        return not values_a & values_b
    if kinds_a != {"object"} or kinds_b != {"object"}:
        return False
    shared = _required(a) & _required(b)
    return any(_tells_apart(name, a, b, resolve) for name in shared)


def _tells_apart(name: str, a: dict[str, Any], b: dict[str, Any], resolve: Resolve) -> bool:
    found = [_follow(schema["properties"].get(name), resolve) for schema in (a, b)]
    values = [_values(each) if isinstance(each, dict) else None for each in found]
    return values[0] is not None and values[1] is not None and not values[0] & values[1]


def _follow(schema: Any, resolve: Resolve) -> Any:
    for _ in range(_MAX_STEPS):
        if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
            return schema
        schema = resolve(schema["$ref"])
    return None


def _required(schema: dict[str, Any]) -> set[str]:
    required, properties = schema.get("required"), schema.get("properties")
    if not isinstance(required, list) or not isinstance(properties, dict):
        return set()
    return {name for name in required if isinstance(name, str) and name in properties}


def _kinds(schema: dict[str, Any]) -> set[str] | None:
    """Return the types that a schema's values may have, an integer being a number; None if any."""
    kinds = schema.get("type")
    if isinstance(kinds, str):
        kinds = [kinds]
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        return None
    return {"number" if kind == "integer" else kind for kind in kinds}


def _values(schema: dict[str, Any]) -> set[str] | None:
    """Return a schema's values as JSON text, None if it does not list them.

    Numbers that are equal have one text, as 1 and 1.0 are one value.
    """
    if "const" in schema:
        values = [schema["const"]]
    elif isinstance(schema.get("enum"), list):
        values = schema["enum"]
    else:
        return None
    return {json.dumps(_canonical(value), sort_keys=True) for value in values}


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    return value
