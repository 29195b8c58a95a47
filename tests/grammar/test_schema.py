"""JSON Schemas keyword by keyword: followed as the jsonschema library reads them, or refused."""

import functools
import json

import jsonschema
import pytest
from accepting import accepts, begin, new_grammars
from jsonschema_specifications import REGISTRY

from mrss_provider.errors import InvalidRequestError
from mrss_provider.grammar.schema import ANNOTATIONS, HONOURED, REFUSED

GRAMMARS = new_grammars()
WORD = {"type": "string"}
INT = {"type": "integer"}

# keyword -> a schema that uses it, and answers that it lets pass or not.
EXAMPLES = {
    "type": (INT, [1, -20], ["x", 1.5, None]),
    "const": ({"const": {"b": 1, "a": [2]}}, [{"b": 1, "a": [2]}], [{"b": 1, "a": [3]}, 1]),
    "enum": ({"enum": ["a", 1, None]}, ["a", 1, None], ["b", 2, False]),
    "properties": ({"type": "object", "properties": {"a": INT}}, [{"a": 1}, {}], [{"a": "x"}]),
    "required": (
        {"type": "object", "properties": {"a": INT}, "required": ["a", "b"]},
        [{"a": 1, "b": None}],
        [{"a": 1}, {}],
    ),
    "additionalProperties": (
        {"type": "object", "properties": {"a": INT}, "additionalProperties": False},
        [{"a": 1}],
        [{"b": 1}, {"a": 1, "b": 1}],
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^a": INT}, "additionalProperties": WORD},
        [{"ab": 1, "b": "x"}],
        [{"ab": "x"}, {"b": 1}],
    ),
    "minProperties": (
        {"type": "object", "properties": {"a": INT}, "required": ["a"], "minProperties": 2},
        [{"a": 1, "b": 2}],
        [{"a": 1}],
    ),
    "maxProperties": (
        {"type": "object", "additionalProperties": INT, "maxProperties": 1},
        [{}, {"a": 1}],
        [{"a": 1, "b": 2}],
    ),
    "items": ({"type": "array", "items": INT}, [[], [1, 2]], [["x"], [1, None]]),
    "prefixItems": (
        {"type": "array", "prefixItems": [INT, WORD], "items": False},
        [[1, "x"], [1], []],
        [["x"], [1, "x", 2]],
    ),
    "minItems": ({"type": "array", "minItems": 2}, [[1, 2]], [[1]]),
    "maxItems": ({"type": "array", "maxItems": 1}, [[1], []], [[1, 2]]),
    "minLength": ({"type": "string", "minLength": 2}, ["ab", "😀😀"], ["a", "😀"]),
    "maxLength": ({"type": "string", "maxLength": 1}, ["😀", '"', ""], ["ab", "\n\n"]),
    "pattern": ({"type": "string", "pattern": "^a+b"}, ["aab", "abc"], ["b", "xab"]),
    "format": ({"type": "string", "format": "date"}, ["2024-02-29"], ["2024-02-31", "x"]),
    "minimum": ({"type": "integer", "minimum": 5}, [5, 100], [4, -7]),
    "maximum": ({"type": "number", "maximum": 5.5}, [5.5, -100], [5.6, 1e9]),
    "exclusiveMinimum": ({"type": "number", "exclusiveMinimum": 0}, [0.1], [0, -1]),
    "exclusiveMaximum": ({"type": "integer", "exclusiveMaximum": 3}, [2], [3]),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, [0, 14, -21], [1, 15]),
    "anyOf": ({"anyOf": [INT, WORD]}, [1, "x"], [None, 1.5]),
    "allOf": (
        {"allOf": [{"minimum": 3, "type": "integer"}, {"maximum": 5}]},
        [3, 5],
        [2, 6, "x"],
    ),
    "oneOf": (
        {
            "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
            "$defs": {
                "A": {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]},
                "B": {"type": "object", "properties": {"k": {"enum": ["b"]}}, "required": ["k"]},
            },
        },
        [{"k": "a"}, {"k": "b"}],
        [{"k": "c"}, {}],
    ),
    "$ref": (
        {
            "$ref": "#/$defs/tree",
            "$defs": {
                "tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
            },
        },
        [[], [[], [[]]]],
        [[1], [[], [], []]],
    ),
    "$defs": ({"$defs": {"a": {"not": {}}, "b": INT}, "$ref": "#/$defs/b"}, [1], ["x"]),
}

# keyword -> the part of a schema that asks something of it.
USES = {
    "not": {"not": {"type": "string"}},
    "if": {"if": INT, "then": {"minimum": 3}},
    "then": {"then": INT},
    "else": {"else": INT},
    "contains": {"contains": INT},
    "minContains": {"minContains": 1},
    "maxContains": {"maxContains": 1},
    "uniqueItems": {"uniqueItems": True},
    "propertyNames": {"propertyNames": {"maxLength": 3}},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"dependentSchemas": {"a": {"required": ["b"]}}},
    "dependencies": {"dependencies": {"a": ["b"]}},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "unevaluatedItems": {"unevaluatedItems": False},
    "$anchor": {"$anchor": "here"},
    "$dynamicRef": {"$dynamicRef": "#here"},
    "$dynamicAnchor": {"$dynamicAnchor": "here"},
    "$recursiveRef": {"$recursiveRef": "#"},
    "$recursiveAnchor": {"$recursiveAnchor": True},
    "$vocabulary": {"$vocabulary": {}},
}


def keywords_of_2020_12():
    uri = "https://json-schema.org/draft/2020-12/"
    pages = [uri + "schema"]
    pages += [REGISTRY[uri + "schema"].contents["allOf"][i]["$ref"] for i in range(7)]
    found = set()
    for page in pages:
        address = page if page.startswith("http") else uri + page
        found |= set(REGISTRY[address].contents.get("properties", {}))
    return found


def refusal(schema):
    with pytest.raises(InvalidRequestError) as caught:
        begin(GRAMMARS, schema)
    assert caught.value.param == "response_format"
    return str(caught.value)


def test_every_keyword_of_the_standard_is_followed_passed_over_or_refused():
    known = keywords_of_2020_12()
    assert len(known) > 50
    assert known - {"definitions"} == (known & HONOURED) | (known & ANNOTATIONS) | (known & REFUSED)
    assert set(EXAMPLES) == HONOURED
    assert set(USES) == REFUSED


@pytest.mark.parametrize("keyword", EXAMPLES)
def test_a_keyword_is_followed_as_the_standard_says(keyword):
    schema, good, bad = EXAMPLES[keyword]
    assert keyword in json.dumps(schema)
    constraint = begin(GRAMMARS, schema)
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for value in good:
        assert validator.is_valid(value), value
        assert accepts(constraint, json.dumps(value, ensure_ascii=False)), value
    for value in bad:
        assert not validator.is_valid(value), value
        assert not accepts(constraint, json.dumps(value, ensure_ascii=False)), value


@pytest.mark.parametrize("keyword", USES)
@pytest.mark.parametrize("depth", [0, 1])
def test_a_keyword_that_cannot_be_followed_is_refused_by_name(keyword, depth):
    schema = USES[keyword]
    if depth:
        schema = {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, schema]}}}
    told = refusal(schema)
    assert repr(keyword) in told
    assert ("#/properties/a/anyOf/1" in told) == bool(depth)


@pytest.mark.parametrize("keyword", sorted(ANNOTATIONS - {"$schema"}))
def test_an_annotation_asks_nothing(keyword):
    constraint = begin(GRAMMARS, {"type": "integer", keyword: "x", "x-mine": {"not": 1}})
    assert accepts(constraint, "12")
    assert not accepts(constraint, '"x"')


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"requred": ["a"]}, "did you mean 'required'?"),
        ({"nullable": True}, "'nullable'"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "'x-guidance'"),
        ({"$ref": "#/$defs/nobody"}, "'$ref' at #"),
        ({"$ref": "https://example.com/schema"}, "'$ref' at #"),
        ({"$ref": "#name"}, "'$ref' at #"),
        ({"$schema": "http://example.com/mine"}, "'$schema'"),
        ({"properties": {"a": {"$id": "http://a/b"}}}, "'$id'"),
        ({"items": [INT]}, "prefixItems"),
        ({"type": "string", "format": "uri-reference"}, "'format'"),
        ({"type": "string", "pattern": "(?=a)b"}, "'pattern'"),
        ({"type": "string", "pattern": "("}, "'pattern'"),
        ({"type": "strin"}, "'type'"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "'oneOf'"),
        ({"additionalProperties": INT, "minProperties": 2}, "'minProperties'"),
        ({"multipleOf": 999983, "type": "integer"}, "'multipleOf'"),
        ({"multipleOf": 1e-7, "type": "number"}, "'multipleOf'"),
        ({"type": "string", "pattern": "a?" * 2049}, "'pattern'"),
        ({"allOf": [{"type": "string", "pattern": f"[a-z]*{i}"} for i in range(9)]}, "'allOf'"),
        ({"const": "a\u0000"}, "'const'"),
        ({"properties": {"\u0001": INT}}, "'properties'"),
        ({"enum": []}, "anyOf is empty"),
        ({"anyOf": []}, "#/anyOf must be a list"),
        ({"properties": {"a": 3}}, "#/properties/a must be a schema"),
        ({"properties": 3}, "#/properties must be an object"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
        (
            {"type": "object", "required": ["a"], "additionalProperties": False},
            "'required'",
        ),
        ({"properties": {f"p{i}": {} for i in range(1001)}}, "'properties'"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "response_format"),
        ({"maximum": 10**400}, "the schema cannot be honoured"),
        (
            {"const": functools.reduce(lambda inner, _: [inner], range(500), 1)},
            "cannot be honoured",
        ),
        ({"required": [[]]}, "'required'"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_followed_is_refused_by_keyword(schema, told):
    assert told in refusal(schema)


def test_a_deep_schema_is_refused_in_a_sentence():
    schema = INT
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    assert "64 levels" in refusal(schema)
    assert "the schema is no JSON that can be read" in refusal("[" * 60_000 + "]" * 60_000)
    assert "1 to 131072 characters" in refusal(json.dumps({"enum": ["x" * 140_000]}))


def test_as_many_properties_as_a_schema_may_have_are_followed():
    constraint = begin(
        GRAMMARS, {"type": "object", "properties": {f"p{i}": INT for i in range(1000)}}
    )
    assert accepts(constraint, '{"p5": 1, "p999": 2}')
    assert not accepts(constraint, '{"p999": "x"}')


def test_a_name_has_one_spelling_so_no_value_slips_past_its_schema():
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "additionalProperties": INT,
    }
    constraint = begin(GRAMMARS, schema)
    assert accepts(constraint, '{"a": "x", "b": 1}')
    assert not accepts(constraint, r'{"\u0061": 1}')
    assert not accepts(constraint, '{"b": 1, "a": "x"}')


def test_white_space_is_bounded_and_of_the_usual_kinds():
    constraint = begin(GRAMMARS, {"type": "object"})
    for text in ('{"a":1,"b":[1,2]}', '{"a": 1, "b": [1, 2]}', '{\n  "a": 1,\n  "b": []\n}'):
        assert accepts(constraint, text)
    for text in ('{"a":  1}', '{\n\n"a":1}', ' {"a":1}', '{"a":1}\n', '{\t"a":1}'):
        assert not accepts(constraint, text)


def test_an_older_draft_is_read_as_it_was_meant():
    draft = "http://json-schema.org/draft-07/schema#"
    schema = {"$schema": draft, "type": "array", "items": [INT], "additionalItems": WORD}
    constraint = begin(GRAMMARS, schema)
    assert accepts(constraint, '[1,"x"]')
    assert not accepts(constraint, "[1,2]")
    old = {"$schema": draft, "$ref": "#/definitions/a", "definitions": {"a": INT}}
    assert accepts(begin(GRAMMARS, old), "3")


def test_a_schema_is_not_changed():
    schema = {"uniqueItems": False, "oneOf": [INT, WORD]}
    text = json.dumps(schema)
    begin(GRAMMARS, schema)
    assert json.dumps(schema) == text


TAGGED = {"type": "object", "required": ["a"]}


@pytest.mark.parametrize(
    ("branches", "is_known"),
    [
        ([INT, WORD, {"type": "null"}], True),
        ([INT, {"type": "number"}], False),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"const": 1}, {"enum": [2, "1"]}], True),
        ([{"enum": ["a", "b"]}, {"enum": ["b"]}], False),
        ([INT, {}], False),
        ([INT, True], False),
        ([{"const": i} for i in range(2000)], True),
        ([{"const": i % 1999} for i in range(2000)], False),
        ([{**TAGGED, "properties": {"a": {"const": i}}} for i in range(900)], False),
    ],
)
def test_one_of_is_followed_where_no_value_has_two_branches(branches, is_known):
    schema = {"type": "array", "items": {"oneOf": branches, "title": "t"}}
    if is_known:
        begin(GRAMMARS, schema)
    else:
        assert "'oneOf'" in refusal(schema)
