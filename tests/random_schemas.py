"""Random JSON Schemas (2020-12), as a hypothesis strategy: every keyword, also where it asks much.

In the style of the strategies that hypothesis-jsonschema is itself tested with, whose published
package makes instances from schemas but no schemas.
"""

import json

from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "name", "id", "x y", 'q"', "é", "tags", "0", ""])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-1000, 1000)
    | st.floats(-1e6, 1e6, allow_nan=False).map(lambda number: round(number, 3))
    | st.text(max_size=6)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=4,
)
PATTERNS = ["^a", "b$", "^[a-z]{2,4}$", "[0-9]+", "^(x|yy)*$", r"^\d{3}-\w+$", "é", "."]
FORMATS = ["date", "date-time", "time", "email", "ipv4", "ipv6", "uuid", "uri", "hostname"]


@st.composite
def _sized(draw, least, most, *, up_to=6):
    """Bounds of a size: either, both or none, in order."""
    low, high = sorted((draw(st.integers(0, up_to)), draw(st.integers(0, up_to))))
    bounds = {least: low, most: high}
    return {key: bounds[key] for key in draw(st.sets(st.sampled_from([least, most])))}


@st.composite
def _string(draw):
    schema = {"type": "string", **draw(_sized("minLength", "maxLength", up_to=12))}
    kind = draw(st.sampled_from(["plain", "plain", "pattern", "format"]))
    if kind == "pattern":
        schema["pattern"] = draw(st.sampled_from(PATTERNS))
    elif kind == "format":
        schema["format"] = draw(st.sampled_from(FORMATS))
    return schema


@st.composite
def _number(draw):
    kind = draw(st.sampled_from(["integer", "number"]))
    bounds = st.integers(-50, 50)
    if kind == "number":
        bounds |= st.floats(-50, 50).map(lambda number: round(number, 2))
    low, high = sorted((draw(bounds), draw(bounds)))
    schema = {"type": kind}
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["minimum", "exclusiveMinimum"]))] = low
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["maximum", "exclusiveMaximum"]))] = high
    if draw(st.integers(0, 4)) == 0:
        schema["multipleOf"] = draw(st.sampled_from([1, 2, 3, 7, 10] + [0.5] * (kind == "number")))
    return schema


def _array(inner):
    @st.composite
    def arrays(draw):
        schema = {"type": "array", **draw(_sized("minItems", "maxItems", up_to=4))}
        if draw(st.booleans()):
            schema["items"] = draw(inner | st.booleans())
        if draw(st.integers(0, 3)) == 0:
            schema["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=3))
        if draw(st.integers(0, 19)) == 19:
            schema["uniqueItems"] = True
        if draw(st.integers(0, 19)) == 19:
            schema["contains"] = draw(inner)
        return schema

    return arrays()


def _object(inner):
    @st.composite
    def objects(draw):
        properties = draw(st.dictionaries(NAMES, inner, max_size=4))
        schema = {"type": "object", "properties": properties}
        names = [*sorted(properties), "extra"]
        schema["required"] = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
        if draw(st.booleans()):
            schema["additionalProperties"] = draw(inner | st.booleans())
        rare = draw(st.integers(0, 29))
        if rare <= 2:
            schema["patternProperties"] = {draw(st.sampled_from(PATTERNS)): draw(inner)}
        elif rare <= 5:
            schema |= draw(_sized("minProperties", "maxProperties", up_to=4))
        elif rare == 28:
            schema["propertyNames"] = {"maxLength": 3}
        elif rare == 29:
            schema["dependentRequired"] = {names[0]: [names[-1]]}
        return schema

    return objects()


def _combined(inner):
    @st.composite
    def combined(draw):
        common = ["anyOf", "allOf", "oneOf", "$ref"]
        keyword = draw(st.sampled_from([*common * 4, "not", "if"]))
        if keyword == "not":
            return {"not": draw(inner)}
        if keyword == "if":
            return {"if": draw(inner), "then": draw(inner)}
        if keyword == "$ref":
            # The definitions are put at the top by `schemas`.
            return {"$ref": f"#/$defs/{draw(st.sampled_from(['tree', 'word']))}"}
        schema = {keyword: draw(st.lists(inner, min_size=1, max_size=3))}
        if draw(st.integers(0, 3)) == 0:
            schema |= draw(inner)
        return schema

    return combined()


_LEAVES = (
    _string()
    | _number()
    | st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["string", "null"]}])
    | st.builds(lambda value: {"const": value}, VALUES)
    | st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=4))
)
_SCHEMAS = st.recursive(
    _LEAVES, lambda inner: _object(inner) | _array(inner) | _combined(inner), max_leaves=6
)
DEFINITIONS = {
    "word": {"type": "string", "minLength": 1, "maxLength": 5},
    "tree": {
        "type": "object",
        "properties": {"leaf": {"type": "integer"}, "next": {"$ref": "#/$defs/tree"}},
        "required": ["leaf"],
        "additionalProperties": False,
    },
}


@st.composite
def schemas(draw):
    """Draw a schema; most ask for an object, as people's do."""
    schema = draw(_object(_SCHEMAS) | _object(_SCHEMAS) | _SCHEMAS)
    if "$ref" in json.dumps(schema):
        schema = {**schema, "$defs": DEFINITIONS}
    return schema
