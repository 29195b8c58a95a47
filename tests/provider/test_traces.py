"""Traces through LiteLLM's SDK: where they arrive, whole or in a stream, and where they cannot."""

import asyncio
from dataclasses import replace

import litellm
import pytest
from fakes import ROWS, SUMMARY, token_trace, traced

from mrss_provider.backend import Delta, Usage
from mrss_provider.openai_schema.traces import read_trace

pytestmark = pytest.mark.usefixtures("provider")

HI = [{"role": "user", "content": "Hi"}]
TRACED = {"mrss": {"trace": True}}
TOKENS = ("a", "b", "c")
TRACE = tuple(token_trace(token.encode()) for token in TOKENS)
SCRIPT = [
    *(traced(token) for token in TOKENS[:2]),
    replace(traced("c"), finish_reason="stop", trace_summary=SUMMARY),
    Delta(usage=Usage(7, 3)),
]


@pytest.fixture(params=["sync", "async"])
def chat(request, backend):
    """Send a traced chat, in either of the SDK's ways; a stream comes as a list of chunks."""
    backend.script = SCRIPT

    async def collect(call):
        answer = await litellm.acompletion(**call)
        return [chunk async for chunk in answer] if call.get("stream") else answer

    def send(**kwargs):
        call = {"model": "mrss/knowledge+tone", "messages": HI, **TRACED, **kwargs}
        if request.param == "async":
            return asyncio.run(collect(call))
        answer = litellm.completion(**call)
        return list(answer) if call.get("stream") else answer

    return send


def traces_of(chunks):
    """Return the `mrss` objects that came in deltas, as a user would pick them up."""
    found = []
    for chunk in chunks:
        for choice in chunk.choices:
            fields = getattr(choice.delta, "provider_specific_fields", None) or {}
            if "trace" in fields.get("mrss", {}) or "spoken_share" in fields.get("mrss", {}):
                found.append(fields["mrss"])
    return found


def test_message_has_the_trace_and_its_summary(chat, backend):
    message = chat().choices[0].message
    assert backend.requests[0].mixture.trace
    mrss = message.provider_specific_fields["mrss"]
    assert (mrss["mixture"], mrss["rows"]) == ("knowledge+tone", ROWS)
    assert read_trace(mrss) == (TRACE, SUMMARY)


def test_stream_has_each_tokens_trace_and_the_summary_at_its_end(chat):
    found = traces_of(chat(stream=True))
    assert sum((read_trace(mrss)[0] for mrss in found), ()) == TRACE
    assert [read_trace(mrss)[1] for mrss in found if "spoken_share" in mrss] == [SUMMARY]
    assert "spoken_share" in found[-1]


def test_streamed_text_logprobs_and_usage_are_as_ever_beside_a_trace(chat):
    chunks = chat(stream=True, stream_options={"include_usage": True})
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "abc"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] != [None, None]
    (usage,) = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert usage.completion_tokens == 3


def test_token_without_text_does_not_lose_its_trace_in_a_stream(chat, backend):
    backend.script = [replace(SCRIPT[0], text=""), *SCRIPT[1:]]
    found = traces_of(chat(stream=True))
    assert sum((read_trace(mrss)[0] for mrss in found), ()) == TRACE


def test_choices_of_a_stream_keep_their_own_traces(backend, chat):
    backend.script = [traced("a"), replace(traced("b"), trace_summary=SUMMARY)]
    by_choice = dict.fromkeys(range(3), 0)
    for chunk in chat(stream=True, n=3):
        for choice in chunk.choices:
            fields = getattr(choice.delta, "provider_specific_fields", None) or {}
            by_choice[choice.index] += len(fields.get("mrss", {}).get("tokens", ()))
    assert by_choice == dict.fromkeys(range(3), 2)


def test_completion_has_the_trace_in_its_choice(backend):
    backend.script = SCRIPT
    response = litellm.text_completion(model="mrss/base", prompt="x", **TRACED)
    assert read_trace(response.choices[0].mrss) == (TRACE, SUMMARY)


def test_streamed_completion_with_a_trace_is_refused_since_litellm_would_drop_it():
    with pytest.raises(litellm.BadRequestError, match="dropped by LiteLLM"):
        litellm.text_completion(model="mrss/base", prompt="x", stream=True, **TRACED)


def test_given_text_reaches_the_engine(chat, backend):
    chat(mrss={"trace": True, "given": "Arr."})
    assert backend.requests[0].given == "Arr."


def test_untraced_answer_carries_nothing_of_it(backend):
    response = litellm.completion(model="mrss/base", messages=HI)
    assert response.choices[0].message.provider_specific_fields == {
        "mrss": {"mixture": "base", "rows": ROWS}
    }
    chunks = list(litellm.completion(model="mrss/base", messages=HI, stream=True))
    assert traces_of(chunks) == []
