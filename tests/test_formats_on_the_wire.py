"""`response_format`, `mrss.regex` and `mrss.grammar`: read, written back, refused by name."""

import json

import pytest

from mrss_provider.backend import Grammar
from mrss_provider.errors import InvalidRequestError
from mrss_provider.openai_schema import (
    parse_chat_request,
    parse_completion_request,
    request_to_body,
)

CHAT = {"model": "tone", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tone", "prompt": "hi"}
SCHEMA = {"type": "object", "properties": {"b": {"const": "é"}, "a": {"minimum": 0.5}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}

ASKED = [
    ({"response_format": FORMAT}, Grammar("json_schema", json.dumps(SCHEMA))),
    (
        {"response_format": {"type": "json_object"}},
        Grammar("json_schema", '{"type": "object"}'),
    ),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "mrss": {"regex": None}}, None),
    ({"mrss": {"regex": "a|é"}}, Grammar("regex", "a|é", "mrss.regex")),
    ({"mrss": {"grammar": 'start: "a"'}}, Grammar("lark", 'start: "a"', "mrss.grammar")),
]


@pytest.mark.parametrize(
    ("parse", "base"), [(parse_chat_request, CHAT), (parse_completion_request, TEXT)]
)
@pytest.mark.parametrize(("keys", "grammar"), ASKED, ids=range(len(ASKED)))
def test_a_format_is_read_and_written_back(parse, base, keys, grammar):
    request = parse({**base, **keys}).request
    assert request.grammar == grammar
    assert parse(request_to_body(request)).request == request


def test_the_order_of_properties_is_kept():
    grammar = parse_chat_request({**CHAT, "response_format": FORMAT}).request.grammar
    assert list(json.loads(grammar.text)["properties"]) == ["b", "a"]


@pytest.mark.parametrize("strict", [True, False, None])
def test_a_schema_is_followed_whatever_strict_says(strict):
    wanted = {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": strict}}
    assert parse_chat_request({**CHAT, "response_format": wanted}).request.grammar is not None


@pytest.mark.parametrize(
    ("keys", "param", "told"),
    [
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {}}, "response_format", "must be one of text, json_object"),
        ({"response_format": {"type": "xml"}}, "response_format", "got 'xml'"),
        (
            {"response_format": {"type": "text", "json_schema": {}}},
            "response_format",
            "goes with the type 'json_schema'",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "an object with 'name' and 'schema'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "must be a JSON Schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"scheme": {}}}},
            "response_format.json_schema.scheme",
            "did you mean 'response_format.json_schema.schema'",
        ),
        (
            {"response_format": {**FORMAT, "json_schema": {"schema": {}, "strict": 1}}},
            "response_format.json_schema.strict",
            "true or false",
        ),
        (
            {"response_format": {**FORMAT, "json_schema": {"schema": {"enum": ["\ud800"]}}}},
            "response_format.json_schema.schema",
            "surrogate",
        ),
        ({"mrss": {"regex": 3}}, "mrss.regex", "must be a text"),
        ({"mrss": {"regex": ""}}, "mrss.regex", "not empty"),
        ({"mrss": {"grammar": "\ud800"}}, "mrss.grammar", "surrogate"),
        ({"mrss": {"regex": "a", "grammar": "b"}}, "mrss.grammar", "not both"),
        ({"response_format": FORMAT, "mrss": {"regex": "a"}}, "mrss.regex", "not both"),
    ],
    ids=range(14),
)
def test_what_is_no_format_is_refused_by_name(keys, param, told):
    for parse, base in ((parse_chat_request, CHAT), (parse_completion_request, TEXT)):
        with pytest.raises(InvalidRequestError) as caught:
            parse({**base, **keys})
        assert caught.value.param == param
        assert told in str(caught.value)
