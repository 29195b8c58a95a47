"""The other routes, and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conformance.feature import GREEDY, HI, Ask, feature
from conformance.structured import COLOUR, is_thing

# Routes.


@feature("the list of models", "Other routes", "models")
def models(ask: Ask) -> None:
    assert ask.route.model("tone") in ask.models()


@feature("`/v1/responses`", "Other routes", "respond")
def responses(ask: Ask) -> None:
    text, usage = ask.respond(
        input="Where is the lighthouse?", temperature=0.0, max_output_tokens=12
    )
    assert text == ask.chat(messages=HI, **GREEDY).text
    assert 0 < usage["output_tokens"] <= 12


@feature("`/v1/responses`, streamed", "Other routes", "respond_stream")
def responses_streamed(ask: Ask) -> None:
    asked = {"input": "Where is the lighthouse?", "temperature": 0.0, "max_output_tokens": 12}
    text, usage = ask.respond_stream(**asked)
    assert text == ask.chat(messages=HI, **GREEDY).text
    assert 0 < usage["output_tokens"] <= 12


@feature("`/v1/messages`", "Other routes", "message")
def messages(ask: Ask) -> None:
    answer = ask.message(messages=HI, max_tokens=12, extra_body={"temperature": 0.0})
    assert [block.type for block in answer.content] == ["text"]
    assert 0 < answer.usage.output_tokens <= 12


@feature("`/v1/messages`, streamed", "Other routes", "message_stream")
def messages_streamed(ask: Ask) -> None:
    asked = {"messages": HI, "max_tokens": 12, "extra_body": {"temperature": 0.0}}
    streamed, whole = ask.message_stream(**asked), ask.message(**asked)
    assert streamed.content[0].text == whole.content[0].text
    assert streamed.usage.output_tokens == whole.usage.output_tokens


@feature("`/v1/messages` with tools", "Other routes", "message_stream")
def messages_tools(ask: Ask) -> None:
    tools = [{"name": "paint", "description": "Do paint.", "input_schema": COLOUR}]
    asked = {"messages": HI, "max_tokens": 200, "tools": tools, "tool_choice": {"type": "any"}}
    asked |= {"thinking": {"type": "disabled"}, "extra_body": {"seed": 7}}
    for answer in (ask.message(**asked), ask.message_stream(**asked)):
        calls = [block for block in answer.content if block.type == "tool_use"]
        assert calls
        assert all(is_thing(json.dumps(call.input)) for call in calls)
        assert answer.stop_reason == "tool_use"


@feature("`/v1/messages` with thinking", "Other routes", "message_stream")
def messages_thinking(ask: Ask) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    asked = {"messages": HI, "max_tokens": 1100, "thinking": thinking}
    asked["extra_body"] = {"seed": 7}
    for answer in (ask.message(**asked), ask.message_stream(**asked)):
        assert answer.content[0].type == "thinking"
        assert answer.content[0].thinking


@feature("tokenise and back", "Other routes", "post")
def tokenise(ask: Ask) -> None:
    body = {"model": "tone", "prompt": "The lighthouse."}
    told = ask.post("/tokenize", body).json()
    assert told["count"] == len(told["tokens"]) > 2
    again = ask.post("/detokenize", {"model": "tone", "tokens": told["tokens"]}).json()
    assert again["prompt"] == "The lighthouse."


# Errors.


def refused(ask: Ask, **params: Any) -> Exception:
    """Return the error that a chat ends with."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        ask.chat(messages=HI, **params)
    return caught.value


@feature("a bad value is a 400 that names it", "Errors", short=True)
def bad_value(ask: Ask) -> None:
    error = refused(ask, temperature=-3.0)
    assert error.status_code == 400
    assert "temperature" in str(error)


@feature("an unknown parameter is a 400 that names it", "Errors")
def unknown_parameter(ask: Ask) -> None:
    error = refused(ask, extra_body={"min_pp": 0.1})
    assert error.status_code == 400
    assert "min_p" in str(error)


@feature("an unknown model is told with the nearest name", "Errors", short=True)
def unknown_model(ask: Ask) -> None:
    error = refused(ask, model="knowledge+ton", **GREEDY)
    assert error.status_code in (400, 404)
    assert "tone" in str(error)


@feature("more tokens than fit are a 400", "Errors")
def too_long(ask: Ask) -> None:
    error = refused(ask, max_tokens=1_000_000)
    assert error.status_code == 400
    assert "tokens" in str(error)


@feature("a timeout is a 408", "Errors")
def timeout(ask: Ask) -> None:
    # No answer is as quick as that.
    error = refused(ask, max_tokens=200, extra_body={"timeout": 0.001, "ignore_eos": True})
    assert error.status_code == 408


@feature("a client that leaves frees its rows", "Errors", "leave")
def leave(ask: Ask) -> None:
    ask.leave(messages=HI, max_tokens=100_000, extra_body={"ignore_eos": True})
    ask.route.wait_for_no_rows()
