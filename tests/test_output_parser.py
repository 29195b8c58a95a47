"""Answers to content, thoughts and calls: the same however the text was cut."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mrss_provider.async_engine.answer_reader import AnswerReader
from mrss_provider.async_engine.json_scanner import ObjectScanner
from mrss_provider.async_engine.output_parser import OutputParser, new_call_id
from mrss_provider.backend import TokenLogprob
from mrss_provider.openai_schema.tools import with_deltas

MARKS = {
    "thought": ("<think>", "</think>"),
    "opens_thought": "<think",
    "tool_call": ("<tool_call>", "</tool_call>"),
    "names": frozenset({"f", "get_weather"}),
}


def parser_of(state="start", **changed):
    ids = (f"id{i}" for i in itertools.count())
    return OutputParser(state, new_id=lambda: next(ids), **{**MARKS, **changed})


def parse(pieces, state="start", **changed):
    """Return content, thought, calls as (name, arguments) and characters told of."""
    parser = parser_of(state, **changed)
    found = [piece for text in pieces for piece in parser.push(text)] + parser.flush()
    calls = ()
    for piece in found:
        calls = with_deltas(calls, piece.calls)
    return (
        "".join(piece.text for piece in found if piece.kind == "content"),
        "".join(piece.text for piece in found if piece.kind == "thought"),
        [(call.name, call.arguments) for call in calls],
        sum(piece.num_chars for piece in found),
    )


def call_text(name="f", arguments='{"a": 1}', gap="\n"):
    head = f'{{"name": {json.dumps(name)}, "arguments": '
    return f"<tool_call>{gap}{head}{arguments}}}{gap}</tool_call>"


@pytest.mark.parametrize(
    ("text", "content", "thought", "calls"),
    [
        ("Hello.", "Hello.", "", []),
        ("<think>\nHm.\n\nYes.\n</think>\n\nHello.\n", "Hello.\n", "Hm.\n\nYes.", []),
        (" <think></think>", "", "", []),
        # Only the beginning of an answer is a thought.
        ("I say <think>no</think>", "I say <think>no</think>", "", []),
        # Cut while it thinks: there is no content.
        ("<think>I wonder", "", "I wonder", []),
        ("<thinker>", "<thinker>", "", []),
        (call_text(), "", "", [("f", '{"a": 1}')]),
        (f"Sure.\n{call_text()}\n", "Sure.", "", [("f", '{"a": 1}')]),
        (
            f"{call_text(gap='')}\n{call_text('get_weather', '{}')} Done.",
            "Done.",
            "",
            [("f", '{"a": 1}'), ("get_weather", "{}")],
        ),
        (f"<think>{call_text()}</think>{call_text()}", "", call_text(), [("f", '{"a": 1}')]),
        # The mark within a string ends nothing.
        (
            call_text(arguments='{"a": "</tool_call>}\\"{"}'),
            "",
            "",
            [("f", '{"a": "</tool_call>}\\"{"}')],
        ),
        # The end of the answer may stand for the mark.
        (call_text()[: -len("</tool_call>")], "", "", [("f", '{"a": 1}')]),
    ],
)
def test_an_answer_is_read(text, content, thought, calls):
    assert parse([text]) == (content, thought, calls, len(text))
    assert parse(text) == (content, thought, calls, len(text))


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>{bad}</tool_call>",
        "<tool_call>no</tool_call>",
        "<tool_call>[]</tool_call>",
        call_text()[:-20],
        call_text("unknown"),
        call_text(arguments="[1]"),
        call_text(arguments='"x"'),
        call_text(arguments='{"x": NaN}'),
        call_text(arguments='{"x": 1e999}'),
        call_text(arguments='{"x": "\\ud83d"}'),
        call_text().replace('"name"', '"nom"'),
        call_text().replace("</tool_call>", "</tool>"),
        '<tool_call>{"name": "f"}</tool_call>',
        "a <tool_cal",
    ],
)
def test_a_call_that_is_none_stays_text(text):
    assert parse([text]) == (text, "", [], len(text))
    # And what comes after it is looked at.
    after = f"{text} {call_text('get_weather', '{}')}"
    assert parse(after)[2] == [("get_weather", "{}")]


def test_an_answer_that_does_nothing_but_begin_calls_is_read_in_time():
    text = "<tool_call>{" * 20_000 + call_text()
    assert parse([text, "}"]) == (f"{text}}}", "", [], len(text) + 1)


def test_a_thought_that_the_prompt_began_is_one():
    assert parse([">\nHm.\n</think>\nHello"], "opened")[:2] == ("Hello", "Hm.")
    assert parse(["> Hm."], "opened")[:2] == ("", "Hm.")
    assert parse(["Hm.</think>Hello"], "thought")[:2] == ("Hello", "Hm.")


def test_without_tools_their_marks_are_text():
    text = call_text()
    assert parse([text], tool_call=None, names=frozenset()) == (text, "", [], len(text))


def test_an_answer_that_may_call_once_ends_with_its_call():
    parser = parser_of("content", is_single=True)
    assert [piece.kind for piece in parser.push(call_text())] == ["call"]
    assert parser.has_ended
    assert parser.push(call_text()) == []
    assert parser.flush() == []


def test_arguments_that_keep_to_a_grammar_come_out_as_they_come():
    parser = parser_of("content", is_constrained=True)
    text = call_text(arguments='{"city": "Paris"}')
    told = [[(d.id, d.name, d.arguments) for p in parser.push(c) for d in p.calls] for c in text]
    pieces = [piece for found in told for piece in found]
    assert pieces[0] == ("id0", "f", "")
    assert [arguments for _, _, arguments in pieces[1:]] == list('{"city": "Paris"}')
    assert {(id_, name) for id_, name, _ in pieces[1:]} == {(None, None)}


@pytest.mark.parametrize("size", [1, 5, 100])
def test_a_mark_in_what_follows_a_schema_is_text(size):
    ways = {"is_constrained": True, "calls_first": True}
    for text in ('{"a": "<tool_call>"}', f" {json.dumps({'a': call_text()})}", '"<tool_call>\\n{"'):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert parse(pieces, "content", **ways) == (text, "", [], len(text))
    call = f"{call_text()}\n{call_text()}"
    assert len(parse([call], "content", **ways)[2]) == 2


@pytest.mark.parametrize("size", range(1, len(call_text())))
def test_a_forced_call_that_is_cut_short_is_never_text(size):
    content, _, calls, num_chars = parse(
        [call_text()[:size]], "content", is_constrained=True, must_call=True
    )
    assert (content, num_chars) == ("", size)
    assert not calls or '{"a": 1}'.startswith(calls[0][1])


parts = st.lists(
    st.sampled_from(
        [
            *("<think>", "</think>", "<tool_call>", "</tool_call>", "<think", "</", "<", "\n", " "),
            *('{"name": "f", "arguments": {}}', '{"a', '"', "\\", "}", "Hello", "é😀"),
            *(call_text(), call_text("get_weather", '{"x": {"y": "}"}}', gap="")),
        ]
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(
    parts=parts,
    cuts=st.sets(st.integers(0, 400), max_size=12),
    state=st.sampled_from(["start", "opened", "thought", "content"]),
    is_single=st.booleans(),
    is_constrained=st.booleans(),
)
@example(["Hello", "\n", "<tool_call>", "}"], {6}, "start", False, False)
def test_what_is_read_does_not_depend_on_how_it_was_cut(
    parts, cuts, state, is_single, is_constrained
):
    text = "".join(parts)
    kinds = {"is_single": is_single, "is_constrained": is_constrained}
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    whole = parse([text], state, **kinds)
    assert parse([text[i:j] for i, j in itertools.pairwise(bounds)], state, **kinds) == whole
    assert parse(text, state, **kinds) == whole
    # Every character is told of, but for those after an answer's end.
    assert whole[3] == len(text) or is_single


@settings(max_examples=25)
@given(
    content=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20),
    thought=st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<")),
    calls=st.lists(
        st.tuples(
            st.sampled_from(["f", "get_weather"]),
            st.dictionaries(
                st.text(max_size=5),
                st.recursive(
                    st.text(max_size=8) | st.integers() | st.booleans() | st.none(),
                    lambda inner: (
                        st.lists(inner, max_size=3)
                        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
                    ),
                    max_leaves=5,
                ),
                max_size=3,
            ),
        ),
        max_size=3,
    ),
)
def test_what_was_written_is_read(content, thought, calls):
    written = [call_text(name, json.dumps(arguments)) for name, arguments in calls]
    text = "" if thought is None else f"<think>{thought}</think>"
    found = parse([text + "\n".join([content, *written])])
    assert found[1] == (thought or "").strip()
    expected = content.lstrip().rstrip() if calls else content.lstrip()
    assert found[0] == expected
    assert [(name, json.loads(arguments)) for name, arguments in found[2]] == calls


@settings(max_examples=25)
@given(
    value=st.dictionaries(
        st.text(max_size=5), st.text(max_size=9) | st.lists(st.integers(), max_size=2), max_size=4
    ),
    after=st.text(max_size=5),
    cut=st.integers(0, 60),
)
def test_the_end_of_an_object_is_found(value, after, cut):
    text = json.dumps(value)
    assert ObjectScanner().feed(text + after) == len(text)
    scanner = ObjectScanner()
    if cut < len(text):
        assert scanner.feed(text[:cut]) is None
        assert scanner.feed(text[cut:] + after) == len(text) - cut
    assert ObjectScanner().feed("[1]") == 0


def tokens_of(reader, pieces):
    """Read pieces as tokens; return the news of all, and which pieces were content."""
    listed, text = [], ""
    for i, piece in enumerate(pieces):
        reader.add(len(piece), TokenLogprob(i, piece.encode(), -1.0))
        news = reader.read(piece, is_last=i == len(pieces) - 1)
        listed += [pieces[entry.token_id] for entry in news.logprobs]
        text += news.text
    return text, listed


def test_only_the_contents_tokens_have_log_probabilities():
    reader = AnswerReader(parser_of("opened"))
    pieces = [">\n", "Hm", "", "é", ".</th", "ink>", "\nHel", "lo", " <tool", "_call>", "{}", ""]
    text, listed = tokens_of(reader, pieces)
    assert text == "Hello <tool_call>{}"
    assert listed == ["\nHel", "lo", " <tool", "_call>", "{}", ""]
    assert reader.num_reasoning == 6
    called = AnswerReader(parser_of("content"))
    assert tokens_of(called, ["Yes", "\n", *call_text(), ""]) == ("Yes", ["Yes"])
    assert called.num_reasoning == 0


def test_an_answer_that_called_ends_so_unless_its_tool_was_named():
    for is_named, expected in ((False, "tool_calls"), (True, "stop")):
        reader = AnswerReader(parser_of("content"), is_named=is_named)
        reader.read(call_text(), is_last=True)
        assert reader.reason("stop") == expected
        assert reader.reason("length") == "length"
    assert AnswerReader(parser_of("content")).reason("stop") == "stop"


@pytest.mark.parametrize("first", ["", call_text() + "\n"])
@pytest.mark.parametrize("size", range(1, len(call_text()) + 1))
def test_an_answer_that_a_stop_string_cut_within_a_call_has_not_called(first, size):
    text = first + call_text()[:size]
    ways = {"is_constrained": True, "must_call": True}
    calls = parse([text], "content", **ways)[2]
    reader = AnswerReader(parser_of("content", **ways))
    reader.read(text, is_last=True)
    is_whole = [arguments == '{"a": 1}' for _, arguments in calls]
    assert reader.reason("stop") == ("tool_calls" if calls and all(is_whole) else "stop")


def test_ids_are_such_as_openais():
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(id_.startswith("call_") and id_[5:].isalnum() and len(id_) == 29 for id_ in ids)
