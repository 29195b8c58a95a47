"""Tools, calls, thoughts on the wire. Oracles: round trips, the `openai` package's models."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mrss_provider import openai_schema as schema
from mrss_provider.backend import (
    Delta,
    GenerateRequest,
    Message,
    StreamInfo,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    Usage,
)
from mrss_provider.errors import InvalidRequestError
from mrss_provider.sampling_params import SamplingParams

INFO = StreamInfo("tone", 3, "mrss-abc", 7)
CHAT = {"model": "tone", "messages": [{"role": "user", "content": "hi"}]}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
ASKED = {"role": "user", "content": "hi"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "c1", "content": "12:00"}


def function(**fields):
    return {"tools": [{"type": "function", "function": {"name": "clock", **fields}}]}


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
names = st.from_regex(r"[a-zA-Z0-9_-]{1,8}", fullmatch=True)
objects = st.dictionaries(texts, texts | st.integers() | st.booleans(), max_size=3)
tools = st.lists(
    st.builds(
        Tool,
        names,
        texts,
        st.just({}) | objects.map(lambda value: {**value, "type": "object"}),
        st.booleans(),
    ),
    max_size=3,
    unique_by=lambda tool: tool.name,
).map(tuple)


@st.composite
def chats(draw):
    """Chats whose calls are all answered, in any order."""
    messages = [Message("user", draw(texts))]
    for turn in range(draw(st.integers(0, 2))):
        calls = tuple(
            ToolCall(f"c{turn}.{i}", draw(names), json.dumps(draw(objects)))
            for i in range(draw(st.integers(0, 2)))
        )
        messages.append(Message("assistant", draw(texts), calls))
        ids = draw(st.permutations([call.id for call in calls]))
        messages += [Message("tool", draw(texts), (), call_id) for call_id in ids]
        messages.append(Message("user", draw(texts)))
    return tuple(messages)


@st.composite
def requests(draw):
    told = draw(tools)
    choice = ToolChoice()
    if told:
        name = draw(st.none() | st.sampled_from([tool.name for tool in told]))
        modes = st.sampled_from(["none", "auto", "required"])
        choice = ToolChoice("required" if name else draw(modes), name, draw(st.booleans()))
    return GenerateRequest(
        "tone",
        SamplingParams(),
        messages=draw(chats()),
        tools=told,
        tool_choice=choice,
        thinking=draw(st.sampled_from([None, True, False])),
    )


@settings(max_examples=20)
@given(requests())
def test_a_request_with_tools_survives_the_wire(request):
    body = json.loads(json.dumps(schema.request_to_body(request)))
    assert schema.parse_chat_request(body).request == request


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, (ToolChoice("auto"), ["clock"])),
        ({"tool_choice": "none"}, (ToolChoice("none"), ["clock"])),
        ({"tool_choice": "required"}, (ToolChoice("required"), ["clock"])),
        ({"tool_choice": CLOCK}, (ToolChoice("required", "clock"), ["clock"])),
        ({"parallel_tool_calls": False}, (ToolChoice(parallel=False), ["clock"])),
        ({"tools": [], "tool_choice": "none", "parallel_tool_calls": True}, (ToolChoice(), [])),
        ({"tools": None, "tool_choice": None}, (ToolChoice(), [])),
    ],
)
def test_a_choice_is_read(extra, expected):
    request = schema.parse_chat_request({**CHAT, "tools": [CLOCK], **extra}).request
    assert (request.tool_choice, [tool.name for tool in request.tools]) == expected


@pytest.mark.parametrize("hint", ["cache_control", "prompt_cache_breakpoint"])
def test_hints_for_another_servers_cache_change_nothing(hint):
    told = {hint: {"type": "ephemeral"}}
    plain = {**CHAT, "messages": [ASKED, CALLED, TOLD], "tools": [CLOCK]}
    parts = [{"type": "text", "text": "hi", **told}]
    hinted = {
        **plain,
        "messages": [{**ASKED, "content": parts, **told}, {**CALLED, **told}, {**TOLD, **told}],
        "tools": [{**CLOCK, **told}],
    }
    assert schema.parse_chat_request(hinted) == schema.parse_chat_request(plain)


def test_a_call_of_another_server_without_arguments_is_one_with_none():
    call = {**CALL, "function": {"name": "clock", "arguments": ""}}
    body = {**CHAT, "messages": [ASKED, {**CALLED, "tool_calls": [call]}, TOLD]}
    messages = schema.parse_chat_request(body).request.messages
    assert messages[1].tool_calls[0].arguments == "{}"


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"tools": {}}, "tools", "a list"),
        ({"tools": [CLOCK] * 129}, "tools", "128"),
        ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name", "a name of its own"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "only functions"),
        ({"tools": [{**CLOCK, "x": 1}]}, "tools[0].x", "no parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "an object"),
        (function(name="two words"), "tools[0].function.name", "letters, digits"),
        (function(name=""), "tools[0].function.name", "1 to 64"),
        (function(name="x" * 65), "tools[0].function.name", "1 to 64"),
        (function(name="clock\n"), "tools[0].function.name", "letters, digits"),
        (function(parameters=[]), "tools[0].function.parameters", "an object"),
        (function(parameters={"type": "array"}), "tools[0].function.parameters", '"object"'),
        (function(parameters={"x": 1}), "tools[0].function.parameters", "got type None"),
        (function(strict="yes"), "tools[0].function.strict", "true or false"),
        (function(strictly=True), "tools[0].function.strictly", "strict"),
        (function(description="\ud800"), "tools[0].function.description", "surrogate"),
        ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice", "one of none, auto, required"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
            "tool_choice.type",
            "only",
        ),
        (
            {
                "tools": [CLOCK],
                "tool_choice": {"type": "function", "function": {"name": "alarm"}},
            },
            "tool_choice",
            "one of clock, got 'alarm'",
        ),
        ({"tool_choice": "auto"}, "tool_choice", "needs tools"),
        ({"tools": [CLOCK], "parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
        ({"functions": [{}]}, "functions", "use tools"),
        ({"function_call": "auto"}, "function_call", "use tools"),
        ({"messages": [ASKED, TOLD]}, "messages[1].tool_call_id", "answers no call"),
        ({"messages": [ASKED, CALLED, TOLD, TOLD]}, "messages[3].tool_call_id", "already"),
        ({"messages": [ASKED, CALLED]}, "messages", "missing before messages[2]: c1"),
        ({"messages": [ASKED, CALLED, ASKED, TOLD]}, "messages", "missing before messages[2]"),
        ({"messages": [{**ASKED, "tool_calls": [CALL]}]}, "messages[0]", "the assistant's"),
        ({"messages": [{**ASKED, "tool_call_id": "x"}]}, "messages[0].tool_call_id", "for role"),
        (
            {"messages": [ASKED, {**CALLED, "tool_calls": [CALL, CALL]}, TOLD]},
            "messages[1].tool_calls[1].id",
            "another call",
        ),
        *(
            (
                {
                    "messages": [
                        ASKED,
                        {
                            **CALLED,
                            "tool_calls": [{**CALL, "function": {"name": "f", "arguments": sent}}],
                        },
                    ]
                },
                "messages[1].tool_calls[0].function.arguments",
                "a JSON object, as text",
            )
            for sent in ("[]", "{", '{"x": NaN}', '{"x": "\\ud800"}')
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "string"),
        ({"messages": [{**ASKED, "function_call": {}}]}, "messages[0].function_call", "tool_calls"),
        ({"reasoning_effort": "much"}, "reasoning_effort", "one of none, minimal"),
        ({"reasoning_effort": 3}, "reasoning_effort", "one of none"),
        ({"thinking": "enabled"}, "thinking", "an object"),
        ({"thinking": {"type": "some"}}, "thinking", "one of enabled"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking", "budget_tokens"),
        ({"thinking": {"type": "enabled", "x": 9}}, "thinking", "type only"),
        (
            {"thinking": {"type": "enabled"}, "reasoning_effort": "none"},
            "thinking",
            "must say the same",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(extra, param, words):
    with pytest.raises(InvalidRequestError) as caught:
        schema.parse_chat_request({**CHAT, **extra})
    assert caught.value.param == param
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "thinking"),
    [
        ({}, None),
        ({"reasoning_effort": None, "thinking": None}, None),
        *(({"reasoning_effort": e}, True) for e in ("minimal", "low", "medium", "high", "xhigh")),
        ({"reasoning_effort": "none"}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "low"}, True),
    ],
)
def test_efforts_say_whether_the_model_thinks(extra, thinking):
    assert schema.parse_chat_request({**CHAT, **extra}).request.thinking is thinking


def test_a_call_as_clients_send_it_back_is_read():
    replayed = {**CALL, "index": 0, "provider_specific_fields": None}
    called = {**CALLED, "tool_calls": [replayed], "refusal": None, "reasoning_content": "Hm."}
    parsed = schema.parse_chat_request({**CHAT, "messages": [ASKED, called, TOLD]}).request
    assert parsed.messages == (
        Message("user", "hi"),
        Message("assistant", "", (ToolCall("c1", "clock", "{}"),)),
        Message("tool", "12:00", (), "c1"),
    )


def test_only_chats_call_tools():
    body = {"model": "tone", "prompt": "hi", "tools": [CLOCK]}
    with pytest.raises(InvalidRequestError, match="only chats call tools"):
        schema.parse_completion_request(body)
    schema.parse_completion_request({**body, "tools": [], "tool_choice": "none"})


DELTAS = [
    Delta(reasoning="Hm", num_tokens=1),
    Delta(reasoning="m.", text="Yes.", num_tokens=3),
    Delta(tool_calls=(ToolCallDelta(0, "c1", "clock"),), num_tokens=1),
    Delta(tool_calls=(ToolCallDelta(0, arguments='{"a"'),), num_tokens=2),
    Delta(
        tool_calls=(ToolCallDelta(0, arguments=": 1}"), ToolCallDelta(1, "c2", "alarm", "{}")),
        num_tokens=2,
    ),
    Delta(num_tokens=1, finish_reason="tool_calls"),
    Delta(usage=Usage(7, 10, 0, 4)),
]


def test_deltas_survive_the_wire_and_openai_reads_each_chunk():
    options = schema.StreamOptions(stream=True, include_usage=True, include_num_tokens=True)
    writer = schema.ChunkWriter(schema.new_head("chat", INFO), options)
    chunks = [chunk for delta in DELTAS for chunk in writer.chunks(delta)]
    assert [schema.read_chunk(json.loads(json.dumps(chunk))) for chunk in chunks] == DELTAS
    read = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks]
    deltas = [chunk.choices[0].delta for chunk in read if chunk.choices]
    # Where it only thinks or calls there is no content, as OpenAI has it.
    assert [delta.content for delta in deltas] == [None, "Yes.", None, None, None, ""]
    assert [delta.reasoning_content for delta in deltas[:2]] == ["Hm", "m."]
    call = deltas[2].tool_calls[0]
    assert (call.index, call.id, call.type, call.function.name) == (0, "c1", "function", "clock")
    assert deltas[3].tool_calls[0].id is None
    assert read[-1].usage.completion_tokens_details.reasoning_tokens == 4


@pytest.mark.parametrize("with_text", [True, False])
def test_openai_reads_a_whole_answer_with_calls(with_text):
    answer = schema.Answer()
    for delta in DELTAS if with_text else DELTAS[2:]:
        answer.add(delta)
    response = schema.chat_response(schema.new_head("chat", INFO), answer)
    read = ChatCompletion.model_validate(json.loads(json.dumps(response)))
    message = read.choices[0].message
    assert message.content == ("Yes." if with_text else None)
    assert read.choices[0].finish_reason == "tool_calls"
    calls = [(c.id, c.type, c.function.name, c.function.arguments) for c in message.tool_calls]
    assert calls == [
        ("c1", "function", "clock", '{"a": 1}'),
        ("c2", "function", "alarm", "{}"),
    ]
    if with_text:
        assert message.reasoning_content == "Hmm."
        # What we answer can be sent back as it is.
        told = [{**TOLD, "tool_call_id": id_} for id_ in ("c1", "c2")]
        again = {**CHAT, "messages": [ASKED, message.model_dump(), *told]}
        calls = schema.parse_chat_request(again).request.messages[1].tool_calls
        assert calls == answer.choices[0].tool_calls


def test_an_answer_that_was_cut_while_it_thought_has_empty_content():
    answer = schema.Answer()
    answer.add(Delta(reasoning="Hm", num_tokens=1, finish_reason="length"))
    message = answer.ordered()[0].message
    assert message == {"role": "assistant", "content": "", "reasoning_content": "Hm"}
