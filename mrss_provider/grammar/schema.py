"""JSON Schemas: from what was sent to what llguidance honours whole, or an error that says why not.

llguidance refuses most of what it does not implement and passes over what it does not know. Nothing
is passed over here, and neither is what it would get wrong: with names that may occur twice in an
object, two of them need not be two properties.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from mrss_provider.errors import InvalidRequestError
from mrss_provider.grammar.disjoint import are_disjoint

MAX_DEPTH = 64
MAX_SUBSCHEMAS = 10_000
MAX_PROPERTIES = 1_000
MAX_PATTERN_PROPERTIES = 32
# Compiling regular expressions cannot be stopped, and takes more than in proportion to the length:
# so much is a second and 200 MB at worst.
MAX_REGEX_CHARS = 4_096
# That one string must match: their intersection is searched for.
MAX_PATTERNS_AT_ONCE = 8
# A multiple is told by its remainder: as many states as the number has, without its point.
MAX_MULTIPLE = 10_000

OPTIONS: Mapping[str, Any] = {
    # Enough for one line or an indented block; without a bound a model may write blanks for ever.
    "whitespace_pattern": r"[ ]|\n[ ]{0,24}",
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
    # Without "u": a name spelled in two ways would be two names to the grammar, one to a reader.
    "json_allowed_escapes": 'nrbtf\\"',
}
"""llguidance's options for JSON."""

_ONE = frozenset({"additionalProperties", "items", "additionalItems"})
_MANY = frozenset({"anyOf", "allOf", "oneOf", "prefixItems"})
_NAMED = frozenset({"properties", "patternProperties"})
_ASSERTIONS = frozenset(
    {
        "type",
        "const",
        "enum",
        "required",
        "minProperties",
        "maxProperties",
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
    }
)
_OLDER = frozenset({"additionalItems"})
HONOURED = (_ONE - _OLDER) | _MANY | _NAMED | _ASSERTIONS | {"$ref", "$defs"}
"""Keywords that every answer follows."""

ANNOTATIONS = frozenset(
    {
        "$schema",
        "$id",
        "$comment",
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "discriminator",
    }
)
"""Keywords that ask nothing of an answer, besides those that begin with `x-`."""

REFUSED = frozenset(
    {
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "propertyNames",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "unevaluatedProperties",
        "unevaluatedItems",
        "$anchor",
        "$dynamicRef",
        "$dynamicAnchor",
        "$recursiveRef",
        "$recursiveAnchor",
        "$vocabulary",
    }
)
"""Keywords that cannot be honoured."""

_NEUTRAL = {"uniqueItems": False, "unevaluatedProperties": True, "unevaluatedItems": True}
_DEFINITIONS = frozenset({"$defs", "definitions"})
_DRAFTS = ("draft-04", "draft-06", "draft-07", "2019-09", "2020-12")
_OPTIONS_KEY = "x-guidance"


def prepare_schema(schema: object, param: str) -> Any:
    """Return `schema`, *modified*, for llguidance: what asks for nothing is left out.

    Raises:
        InvalidRequestError: naming the keyword that cannot be honoured, and where it is.
    """
    if not isinstance(schema, dict | bool):
        raise InvalidRequestError(
            f"{param}: a JSON Schema is an object, got {type(schema).__name__}", param=param
        )
    return _Walk(schema, param).prepared()


class _Walk:
    """One pass over a schema, which it changes, and over what its references lead to."""

    def __init__(self, root: Any, param: str) -> None:
        self._root = root
        self._param = param
        self._seen: set[int] = set()
        self._num_properties = 0
        self._num_regex_chars = 0
        self._is_older = False

    def prepared(self) -> Any:
        """Check and rewrite all that can be reached from the top."""
        if isinstance(self._root, dict):
            self._read_dialect(self._root)
        self._visit(self._root, "#", 0)
        return self._root

    def _read_dialect(self, root: dict[str, Any]) -> None:
        dialect = root.get("$schema")
        if dialect is not None:
            named = [draft for draft in _DRAFTS if draft in str(dialect)]
            if not named or "json-schema.org" not in str(dialect):
                self._refuse("$schema", "#", f"it must be one of {', '.join(_DRAFTS)}")
            self._is_older = named[0] != "2020-12"

    def _visit(self, schema: Any, path: str, depth: int) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            self._fail(f"{path} must be a schema (an object), got {type(schema).__name__}")
        if id(schema) in self._seen:
            return
        self._seen.add(id(schema))
        if depth > MAX_DEPTH or len(self._seen) > MAX_SUBSCHEMAS:
            self._fail(
                f"a schema may be {MAX_DEPTH} levels deep and have {MAX_SUBSCHEMAS} subschemas; "
                f"make it smaller at {path}"
            )
        for keyword in list(schema):
            self._check_keyword(schema, keyword, path)
        _check_spelling(schema, path, self._param)
        self._check_sizes(schema, path)
        for child, where in self._children(schema, path):
            self._visit(child, where, depth + 1)
        self._rewrite_one_of(schema)

    def _check_keyword(self, schema: dict[str, Any], keyword: str, path: str) -> None:
        if keyword in _NEUTRAL and schema[keyword] is _NEUTRAL[keyword]:
            del schema[keyword]
        elif keyword in REFUSED:
            self._refuse(keyword, path, "leave it out, or check it after the answer")
        elif keyword == _OPTIONS_KEY:
            self._refuse(keyword, path, "how JSON is spaced is not asked for by the schema")
        elif keyword == "$id" and path != "#":
            self._refuse(keyword, path, "a schema has one name, at the top")
        elif keyword == "definitions" or (keyword in _OLDER and self._is_older):
            return
        elif keyword not in HONOURED | ANNOTATIONS and not keyword.startswith("x-"):
            near = difflib.get_close_matches(keyword, sorted(HONOURED), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out, or call it 'x-...'"
            self._refuse(keyword, path, f"it is no keyword of JSON Schema; {hint}")

    def _children(self, schema: dict[str, Any], path: str) -> Iterator[tuple[Any, str]]:
        for keyword, value in list(schema.items()):
            where = f"{path}/{keyword}"
            if keyword == "items" and isinstance(value, list):
                if not self._is_older:
                    self._refuse("items", path, "a list of schemas is 'prefixItems' since 2020-12")
                yield from ((item, f"{where}/{i}") for i, item in enumerate(value))
            elif keyword in _ONE:
                yield value, where
            elif keyword in _MANY:
                if not isinstance(value, list) or not value:
                    self._fail(f"{where} must be a list of schemas, not empty")
                yield from ((item, f"{where}/{i}") for i, item in enumerate(value))
            elif keyword in _NAMED:
                if not isinstance(value, dict):
                    self._fail(f"{where} must be an object of schemas")
                yield from ((item, f"{where}/{name}") for name, item in value.items())
            elif keyword == "$ref":
                yield self._target(value, path), str(value)

    def _target(self, reference: object, path: str) -> Any:
        if not isinstance(reference, str) or not reference.startswith("#"):
            self._refuse("$ref", path, "only '#/...' within the schema is followed")
        found = resolve(self._root, reference)
        if found is None:
            self._refuse("$ref", path, f"nothing is at {reference!r}")
        return found

    def _check_patterns(self, schema: dict[str, Any], path: str) -> None:
        named = schema.get("patternProperties")
        patterns = [schema.get("pattern"), *(named if isinstance(named, dict) else ())]
        self._num_regex_chars += sum(len(text) for text in patterns if isinstance(text, str))
        if self._num_regex_chars > MAX_REGEX_CHARS:
            self._refuse("pattern", path, f"all of a schema may have {MAX_REGEX_CHARS} characters")
        if "allOf" in schema and self._num_patterns(schema, set()) > MAX_PATTERNS_AT_ONCE:
            self._refuse("allOf", path, f"a text may meet {MAX_PATTERNS_AT_ONCE} patterns at once")

    def _num_patterns(self, schema: Any, seen: set[int]) -> int:
        """Return how many patterns a text may have to match that a schema describes."""
        if not isinstance(schema, dict) or id(schema) in seen:
            return 0
        seen.add(id(schema))
        inner = [
            part for key in _MANY if isinstance(found := schema.get(key), list) for part in found
        ]
        if isinstance(schema.get("$ref"), str):
            inner.append(resolve(self._root, schema["$ref"]))
        return ("pattern" in schema) + sum(self._num_patterns(part, seen) for part in inner)

    def _check_sizes(self, schema: dict[str, Any], path: str) -> None:
        named = [schema.get("properties"), schema.get("patternProperties")]
        num_named = [len(each) if isinstance(each, dict) else 0 for each in named]
        self._num_properties += num_named[0]
        if self._num_properties > MAX_PROPERTIES:
            self._refuse("properties", path, f"a schema may have {MAX_PROPERTIES} in all")
        if num_named[1] > MAX_PATTERN_PROPERTIES:
            self._refuse("patternProperties", path, f"it may have {MAX_PATTERN_PROPERTIES}")
        self._check_patterns(schema, path)
        multiple = schema.get("multipleOf")
        if multiple is not None and not _is_small_multiple(multiple):
            self._refuse("multipleOf", path, "4 digits are followed, zeros around them apart")
        least, required = schema.get("minProperties", 0), schema.get("required", ())
        # What is no name is refused where it is compiled.
        known = required if isinstance(required, list) else []
        names = {name for name in known if isinstance(name, str)}
        if isinstance(least, int) and least > len(names) + 1:
            self._refuse(
                "minProperties",
                path,
                f"names that are free may occur twice, so it may be one more than there are "
                f"'required' ones, which is {len(names) + 1}; got {least}",
            )

    def _rewrite_one_of(self, schema: dict[str, Any]) -> None:
        """Say `anyOf` where no value can be of two branches: it asks for the same."""
        branches = schema.get("oneOf")
        if branches is None or not are_disjoint(branches, lambda ref: resolve(self._root, ref)):
            return
        if "anyOf" not in schema:
            renamed = {"anyOf" if key == "oneOf" else key: value for key, value in schema.items()}
            schema.clear()
            schema.update(renamed)
        elif "allOf" not in schema:
            schema["allOf"] = [{"anyOf": schema.pop("oneOf")}]

    def _refuse(self, keyword: str, path: str, why: str) -> NoReturn:
        shown = keyword if len(keyword) <= 64 else keyword[:61] + "..."
        self._fail(f"the schema keyword {shown!r} at {path} cannot be honoured: {why}")

    def _fail(self, message: str) -> NoReturn:
        # What a key may be spelled with, an error's JSON may not.
        safe = message.encode(errors="backslashreplace").decode()
        raise InvalidRequestError(f"{self._param}: {safe}", param=self._param)


def resolve(root: Any, reference: str) -> Any:
    """Return what a JSON pointer within `root` (`#/...`) leads to, None if nothing is there."""
    found = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isascii() and name.isdigit():
            if int(name) >= len(found):
                return None
            found = found[int(name)]
        else:
            return None
    is_pointer = reference in ("#", "#/") or reference.startswith("#/")
    return found if is_pointer and isinstance(found, dict | bool) else None


def _is_small_multiple(multiple: object) -> bool:
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or multiple <= 0:
        # llguidance says what is wrong with it.
        return True
    digits = json.dumps(multiple)
    if "e" in digits:
        return False
    return int(digits.replace(".", "").strip("0") or 1) < MAX_MULTIPLE


def _check_spelling(schema: dict[str, Any], path: str, param: str) -> None:
    """Refuse values and names with characters that an answer cannot spell.

    Raises:
        InvalidRequestError: naming the keyword.
    """
    spelled = {
        "const": schema.get("const"),
        "enum": schema.get("enum"),
        "required": schema.get("required"),
        "properties": list(schema["properties"]) if _has_names(schema) else None,
    }
    for keyword, value in spelled.items():
        if any(_is_unspelled(text) for text in _texts(value)):
            raise InvalidRequestError(
                f"{param}: the schema keyword {keyword!r} at {path} cannot be honoured: it has a "
                "control character, which answers do not spell",
                param=param,
            )


def _has_names(schema: Mapping[str, Any]) -> bool:
    return isinstance(schema.get("properties"), dict)


def _texts(value: Any) -> Iterator[str]:
    """Yield every string within a JSON value."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            waiting += item


def _is_unspelled(text: str) -> bool:
    return any((char < " " and char not in "\n\r\b\t\f") or char == "\x7f" for char in text)
