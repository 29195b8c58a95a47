"""Reasoning and tool calls through LiteLLM's SDK, streamed, against a scripted backend."""

import asyncio
import json

import litellm
import pytest
from fakes import text

from mrss_provider.backend import Delta, TokenLogprob, ToolCallDelta, Usage

pytestmark = pytest.mark.usefixtures("provider")

HI = [{"role": "user", "content": "Hi"}]
CALL = {"model": "mrss/tone", "messages": HI, "stream": True}


def thought(piece, index=0):
    return Delta(index, reasoning=piece, num_tokens=1)


def call(position, *, name=None, arguments="", index=0):
    made = ToolCallDelta(position, None if name is None else f"call_{position}", name, arguments)
    return Delta(index, tool_calls=(made,), num_tokens=1)


TWO_CALLS = [
    call(0, name="weather"),
    call(0, arguments='{"city":'),
    call(0, arguments=' "Ulm"}'),
    call(1, name="time", arguments="{}"),
    Delta(num_tokens=1, finish_reason="tool_calls", usage=Usage(7, 5)),
]


@pytest.fixture(params=["sync", "async", "together"])
def read(request, monkeypatch):
    """Read a whole stream; "together" has everything come before the first chunk is made."""

    async def read_async(**kwargs):
        stream = await litellm.acompletion(**CALL, **kwargs)
        return [chunk async for chunk in stream]

    if request.param == "sync":
        return lambda **kwargs: list(litellm.completion(**CALL, **kwargs))
    if request.param == "together":
        monkeypatch.setattr("mrss_provider.provider.answers.RunningAnswer.take", _take_everything)
    return lambda **kwargs: asyncio.run(read_async(**kwargs))


async def _take_everything(answer):
    await asyncio.wrap_future(answer._pump_task)
    return answer._take_or_arm(lambda: None)


def deltas(chunks, index=0):
    return [c.delta for chunk in chunks for c in chunk.choices if c.index == index]


def finish_reasons(chunks):
    return {c.index: c.finish_reason for k in chunks for c in k.choices if c.finish_reason}


def called(chunks, index=0):
    """Put tool calls together as OpenAI's documents tell clients to."""
    calls = {}
    for delta in deltas(chunks, index):
        for piece in delta.tool_calls or ():
            entry = calls.setdefault(piece.index, {"arguments": ""})
            if piece.id is not None:
                assert "id" not in entry
                entry |= {"id": piece.id, "name": piece.function.name, "type": piece.type}
            entry["arguments"] += piece.function.arguments
    return calls


WEATHER = {"id": "call_0", "type": "function", "name": "weather", "arguments": '{"city": "Ulm"}'}
TIME = {"id": "call_1", "type": "function", "name": "time", "arguments": "{}"}


def test_streamed_calls_are_put_together_by_index(read, backend):
    backend.script = TWO_CALLS
    chunks = read(stream_options={"include_usage": True})
    assert called(chunks) == {0: WEATHER, 1: TIME}
    assert finish_reasons(chunks) == {0: "tool_calls"}
    assert not any(delta.content for delta in deltas(chunks))
    assert chunks[-1].usage.completion_tokens == 5


def test_streamed_reasoning_comes_before_the_text_and_apart_from_it(read, backend):
    backend.script = [
        thought("Let me"),
        thought(" see."),
        Delta(reasoning=" So:", text="It", num_tokens=2),
        text(" is."),
    ]
    chunks = read()
    said = [
        (getattr(delta, "reasoning_content", None), delta.content)
        for delta in deltas(chunks)
        if getattr(delta, "reasoning_content", None) or delta.content
    ]
    assert not any(reasoning and content for reasoning, content in said)
    assert "".join(reasoning or "" for reasoning, _ in said) == "Let me see. So:"
    assert "".join(content or "" for _, content in said) == "It is."
    assert said == sorted(said, key=lambda pair: pair[0] is None)
    assert finish_reasons(chunks) == {0: "stop"}


def test_text_before_calls_is_kept(read, backend):
    backend.script = [text("One moment."), *TWO_CALLS]
    chunks = read()
    assert "".join(delta.content or "" for delta in deltas(chunks)) == "One moment."
    assert called(chunks) == {0: WEATHER, 1: TIME}


def test_every_choice_of_a_stream_has_its_own_calls(read, backend, monkeypatch):
    monkeypatch.setattr("fakes._complete", lambda script, n: list(script))
    backend.script = [
        call(0, name="weather", arguments="{}"),
        call(0, name="time", index=1),
        call(0, arguments="{}", index=1),
        Delta(1, finish_reason="tool_calls"),
        Delta(0, finish_reason="tool_calls"),
        Delta(usage=Usage(7, 3)),
    ]
    chunks = read(n=2)
    assert called(chunks, 0)[0]["name"] == "weather"
    assert called(chunks, 1)[0] == {
        "id": "call_0",
        "type": "function",
        "name": "time",
        "arguments": "{}",
    }
    assert finish_reasons(chunks) == {0: "tool_calls", 1: "tool_calls"}


def test_logprobs_of_reasoning_and_calls_are_all_there(read, backend):
    tokens = [TokenLogprob(i, bytes([97 + i]), -float(i)) for i in range(4)]
    pieces = [{"reasoning": "a"}, {}, {"text": "c"}, {"tool_calls": (ToolCallDelta(0, "i", "f"),)}]
    backend.script = [
        Delta(num_tokens=1, logprobs=(token,), **piece)
        for token, piece in zip(tokens, pieces, strict=True)
    ]
    told = [
        entry["token"]
        for chunk in read(logprobs=True)
        if getattr(chunk.choices[0], "logprobs", None)
        for entry in chunk.choices[0].logprobs.model_dump()["content"]
    ]
    assert told == ["a", "b", "c", "d"]


def test_litellms_log_gets_reasoning_text_and_calls_of_a_stream(read, backend):
    backend.script = [thought("Hm."), text("Wait."), *TWO_CALLS]
    message = litellm.stream_chunk_builder(read()).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "Wait.")
    calls = [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls]
    assert calls == [("call_0", "weather", '{"city": "Ulm"}'), ("call_1", "time", "{}")]


@pytest.mark.slow
def test_anthropics_wire_gets_every_block_of_a_stream(backend):
    # LiteLLM's bridge reads one kind of thing, and one call, from a chunk.
    backend.script = [Delta(reasoning="Hm.", text="Wait.", num_tokens=2), *TWO_CALLS]

    async def main():
        stream = await litellm.anthropic.messages.acreate(max_tokens=9, **CALL)
        return b"".join([data async for data in stream])

    lines = asyncio.run(main()).decode().splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    blocks = {
        e["index"]: e["content_block"]["type"] for e in events if e["type"] == "content_block_start"
    }
    told = {}
    for event in events:
        if event["type"] == "content_block_delta":
            value = event["delta"]
            piece = value.get("thinking") or value.get("text") or value.get("partial_json") or ""
            told[event["index"]] = told.get(event["index"], "") + piece
    # Older versions begin with a block of text that stays empty.
    assert [(blocks[index], piece) for index, piece in told.items() if piece] == [
        ("thinking", "Hm."),
        ("text", "Wait."),
        ("tool_use", '{"city": "Ulm"}'),
        ("tool_use", "{}"),
    ]
    (stop,) = [e["delta"]["stop_reason"] for e in events if e["type"] == "message_delta"]
    assert stop == "tool_use"
