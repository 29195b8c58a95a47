"""Answers with a form: structured output, tools, reasoning."""

from __future__ import annotations

import json
import re
from typing import Any

from conformance.feature import GREEDY, HI, Ask, feature
from conformance.replies import Choice

# Structured output.


COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "size": {"enum": ["s", "m", "l"]}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
STRICT = {
    "type": "json_schema",
    "json_schema": {"name": "thing", "strict": True, "schema": COLOUR},
}
# Without a thought, which a small model would not end.
PLAIN = {"reasoning_effort": "none"}
ENOUGH = {"temperature": 1.0, "seed": 7, "max_tokens": 200, "extra_body": PLAIN}


def is_thing(text: str) -> bool:
    """Whether a text is JSON of the schema above."""
    value = json.loads(text)
    return (
        list(value) == ["colour", "size"]
        and value["colour"] in ("red", "green")
        and value["size"] in ("s", "m", "l")
    )


@feature("`response_format` json_object", "Structured output")
def json_object(ask: Ask) -> None:
    asked = {**ENOUGH, "temperature": 0.0}
    reply = ask.chat(messages=HI, response_format={"type": "json_object"}, **asked)
    assert reply.choices[0].finish == "stop"
    assert isinstance(json.loads(reply.text), dict)


@feature("`response_format` json_schema, strict", "Structured output", short=True)
def json_schema(ask: Ask) -> None:
    reply = ask.chat(messages=HI, response_format=STRICT, **ENOUGH)
    assert reply.choices[0].finish == "stop"
    assert is_thing(reply.text)


@feature("json_schema, streamed", "Structured output", "stream")
def json_schema_streamed(ask: Ask) -> None:
    reply = ask.stream(messages=HI, response_format=STRICT, **ENOUGH)
    assert is_thing(reply.text)
    assert reply.num_chunks > 1


@feature("`mrss.regex`", "Structured output", short=True)
def regex(ask: Ask) -> None:
    wanted = {**PLAIN, "mrss": {"regex": "[0-9]{4}-[a-c]+x"}}
    reply = ask.chat(messages=HI, **{**ENOUGH, "extra_body": wanted})
    assert re.fullmatch("[0-9]{4}-[a-c]+x", reply.text)


@feature("`mrss.grammar` (Lark)", "Structured output")
def grammar(ask: Ask) -> None:
    wanted = {**PLAIN, "mrss": {"grammar": 'start: "yes" | "no, " /[a-z]{3}/'}}
    reply = ask.chat(messages=HI, **{**ENOUGH, "extra_body": wanted})
    assert re.fullmatch("yes|no, [a-z]{3}", reply.text)


# Tools.


def tool(name: str) -> dict[str, Any]:
    """Return a tool with the arguments of `COLOUR`."""
    return {
        "type": "function",
        "function": {"name": name, "description": f"Do {name}.", "parameters": COLOUR},
    }


TOOLS = [tool("paint"), tool("buy")]


def check_calls(choice: Choice, *, names: tuple[str, ...] = ("paint", "buy")) -> None:
    """Assert that there are calls, of known tools, with good arguments."""
    assert choice.calls
    for call in choice.calls.values():
        assert call.name in names
        assert is_thing(call.arguments)


@feature("`tools`, `tool_choice` auto", "Tools")
def tools_auto(ask: Ask) -> None:
    choice = ask.chat(messages=HI, tools=TOOLS, **ENOUGH).choices[0]
    # A small model calls when it likes.
    if choice.calls:
        check_calls(choice)
        assert choice.finish == "tool_calls"
    else:
        assert choice.text
        assert choice.finish in ("stop", "length")


@feature("`tool_choice` none", "Tools")
def tools_none(ask: Ask) -> None:
    choice = ask.chat(messages=HI, tools=TOOLS, tool_choice="none", **ENOUGH).choices[0]
    assert choice.text
    assert not choice.calls


@feature("`tool_choice` required", "Tools")
def tools_required(ask: Ask) -> None:
    choice = ask.chat(messages=HI, tools=TOOLS, tool_choice="required", **ENOUGH).choices[0]
    check_calls(choice)
    assert choice.finish == "tool_calls"
    assert all(re.fullmatch(r"call_\w{24}", call.id) for call in choice.calls.values())


@feature("`tool_choice` by name", "Tools")
def tools_named(ask: Ask) -> None:
    wanted = {"type": "function", "function": {"name": "buy"}}
    choice = ask.chat(messages=HI, tools=TOOLS[::-1], tool_choice=wanted, **ENOUGH).choices[0]
    check_calls(choice, names=("buy",))
    assert len(choice.calls) == 1
    assert choice.finish in ("stop", "tool_calls")


@feature("`parallel_tool_calls`", "Tools")
def tools_parallel(ask: Ask) -> None:
    # Without the token that ends a text it calls until it is cut off, perhaps within a call.
    endless = {**ENOUGH, "logit_bias": {"0": -100}, "max_tokens": 230}
    asked = {"messages": HI, "tools": TOOLS, "tool_choice": "required", **endless}
    several = ask.chat(**asked, parallel_tool_calls=True).choices[0]
    assert len(several.calls) > 1
    check_calls(Choice(calls={0: several.calls[0]}))
    single = ask.chat(**asked, parallel_tool_calls=False).choices[0]
    assert len(single.calls) == 1
    check_calls(single)


@feature("tool calls, streamed", "Tools", "stream", short=True)
def tools_streamed(ask: Ask) -> None:
    asked = {"messages": HI, "tools": TOOLS, "tool_choice": "required", **ENOUGH}
    asked["parallel_tool_calls"] = False
    streamed, whole = ask.stream(**asked), ask.chat(**asked)
    check_calls(streamed.choices[0])
    assert [json.loads(call.arguments) for call in streamed.calls] == [
        json.loads(call.arguments) for call in whole.calls
    ]
    assert streamed.num_chunks > 1


@feature("a tool's answer", "Tools")
def tool_result(ask: Ask) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "paint", "arguments": '{"colour": "red", "size": "s"}'},
    }
    turns = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is red now."},
    ]
    asked = {"tools": TOOLS, "tool_choice": "none", "extra_body": PLAIN, **GREEDY}
    reply = ask.chat(messages=turns, **asked)
    assert reply.text
    assert reply.usage["prompt_tokens"] > ask.chat(messages=HI, **asked).usage["prompt_tokens"]


# Reasoning.


THINK = {"temperature": 1.0, "seed": 7, "max_tokens": 24, "reasoning_effort": "high"}


@feature("`reasoning_content`", "Reasoning", short=True)
def reasoning(ask: Ask) -> None:
    choice = ask.chat(messages=HI, **THINK).choices[0]
    assert choice.reasoning
    assert "think>" not in choice.reasoning + choice.text


@feature("`reasoning_content`, streamed", "Reasoning", "stream")
def reasoning_streamed(ask: Ask) -> None:
    streamed, whole = (way(messages=HI, **THINK).choices[0] for way in (ask.stream, ask.chat))
    assert streamed.reasoning == whole.reasoning != ""
    assert streamed.text == whole.text


@feature("`reasoning_effort` none", "Reasoning")
def no_reasoning(ask: Ask) -> None:
    choice = ask.chat(messages=HI, **{**THINK, "reasoning_effort": "none"}).choices[0]
    assert choice.text
    assert not choice.reasoning
