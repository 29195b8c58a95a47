"""Prompt files and their checks: what is taken, and which line a refusal names."""

import json

import pytest

from mrss_provider.compare.checks import parse_check
from mrss_provider.compare.prompts import read_prompts
from mrss_provider.errors import FileFormatError

MESSAGES = [{"role": "user", "content": "Hi"}]
GOOD = {"id": "a", "messages": MESSAGES}


def read(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return read_prompts(path)


def test_prompts_keep_their_order_and_fields(tmp_path):
    first = {**GOOD, "params": {"top_p": 0.5}, "group": "greetings"}
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]
    chat = {"messages": [{"role": "user", "content": parts}]}
    found = read(tmp_path, first, "", chat, '{"prompt": "Once upon\u2028a time"}').prompts
    assert [prompt.id for prompt in found] == ["a", "3", "4"]
    assert found[0].params == {"top_p": 0.5}
    assert found[0].group == "greetings"
    assert found[1].question == "Who is it?"
    assert found[2].question == "Once upon\u2028a time"
    assert found[2].messages is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[]", "must be a JSON object"),
        ('{"prompt": "x", "params": {"top_p": NaN}}', "it holds NaN, which JSON does not have"),
        ({"id": "b"}, 'one of "messages"'),
        ({**GOOD, "prompt": "x"}, 'one of "messages"'),
        ({"messages": "Hi"}, "messages must be a list"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] must be an object with a role"),
        ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\] must have a content"),
        ({"prompt": ""}, "prompt must be a text"),
        ({**GOOD, "id": 3}, "id must be a text"),
        ({**GOOD, "pramas": {}}, "'pramas' is no key"),
        ({**GOOD, "params": {"seed": 1}}, "params may not hold 'seed'"),
        ({**GOOD, "checks": [{"type": "exat"}]}, "exact, contains, regex, json_schema"),
        ({**GOOD, "checks": [{"type": "regex", "pattern": "("}]}, "pattern of a regex"),
        ({**GOOD, "checks": [{"type": "exact", "valu": "x"}]}, "'valu' is no key of this check"),
        ({**GOOD, "checks": [{"type": "json_schema", "schema": {"type": 3}}]}, "no JSON schema"),
        ({**GOOD, "id": "first"}, "the id 'first' is that of line 1"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, said):
    with pytest.raises(FileFormatError, match=said) as error:
        read(tmp_path, {**GOOD, "id": "first"}, line)
    assert "line 2" in str(error.value)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="holds no prompts"):
        read(tmp_path, "")


@pytest.mark.parametrize(
    ("check", "passing", "failing"),
    [
        ({"type": "exact", "value": "Four"}, [" Four\n"], ["four", "Four!"]),
        ({"type": "exact", "value": "Four", "ignore_case": True}, ["FOUR"], ["4"]),
        ({"type": "contains", "value": "our"}, ["Four", "our"], ["OUR"]),
        ({"type": "regex", "pattern": r"^\d+$"}, ["42"], ["42a", ""]),
        (
            {
                "type": "json_schema",
                "schema": {"type": "object", "required": ["a"], "properties": {"a": {"const": 1}}},
            },
            ['{"a": 1}'],
            ['{"a": 2}', "{}", "a", '{"a": 1} and more', "[" * 100_000],
        ),
    ],
)
def test_checks_pass_what_they_say(check, passing, failing):
    passes = parse_check(check).passes
    assert [text for text in passing if not passes(text)] == []
    assert [text for text in failing if passes(text)] == []
