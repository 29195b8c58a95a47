"""LiteLLM's traps, each sprung by a provider that does the obvious, and avoided by ours.

Where the first half of such a test fails, LiteLLM has mended something: a recipe of ours may go.
"""

import asyncio

import litellm
import pytest
from fakes import text
from litellm.llms.custom_llm import CustomLLM
from litellm.types.utils import Delta as LiteLLMDelta
from litellm.types.utils import ModelResponseStream, StreamingChoices
from litellm.types.utils import Usage as LiteLLMUsage
from litellm.utils import custom_llm_setup

from mrss_provider.backend import Delta, Usage

HI = [{"role": "user", "content": "Hi"}]
USAGE = {"stream_options": {"include_usage": True}}


def chunk(*choices, usage=None):
    made = ModelResponseStream(id="x", created=1, model="m", choices=list(choices))
    if usage is not None:
        made.usage = usage
    return made


def choice(index=0, *, content=None, finish=None):
    return StreamingChoices(
        index=index, delta=LiteLLMDelta(content=content, role=None), finish_reason=finish
    )


class Naive(CustomLLM):
    """Streams `chunks`, whatever is asked."""

    chunks = ()

    async def astreaming(self, **kwargs):
        for one in self.chunks:
            yield one


@pytest.fixture
def naive(provider, monkeypatch):
    naive = Naive()
    entries = [*litellm.custom_provider_map, {"provider": "naive", "custom_handler": naive}]
    monkeypatch.setattr(litellm, "custom_provider_map", entries)
    custom_llm_setup()
    return naive


def stream(model, **kwargs):
    async def read():
        answer = await litellm.acompletion(model, messages=HI, stream=True, **kwargs)
        return [one async for one in answer]

    return asyncio.run(read())


def finish_reasons(chunks):
    return {c.index: c.finish_reason for k in chunks for c in k.choices if c.finish_reason}


def test_trap_usage_after_the_finish_is_lost_and_guessed(naive, backend):
    naive.chunks = [
        chunk(choice(content="Hello")),
        chunk(choice(finish="stop")),
        chunk(usage=LiteLLMUsage(prompt_tokens=700, completion_tokens=40, total_tokens=740)),
    ]
    assert stream("naive/x", **USAGE)[-1].usage.prompt_tokens != 700
    backend.script = [text("Hello"), Delta(finish_reason="stop", usage=Usage(700, 40))]
    usage = stream("mrss/tone", **USAGE)[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (700, 40)


def test_trap_only_the_first_answer_of_a_stream_finishes(naive):
    naive.chunks = [
        chunk(choice(0, content="a")),
        chunk(choice(1, content="b")),
        chunk(choice(1, finish="length")),
        chunk(choice(0, finish="stop")),
    ]
    assert finish_reasons(stream("naive/x", n=2)).get(1) is None
    assert finish_reasons(stream("mrss/tone", n=2)) == {0: "stop", 1: "stop"}


def test_trap_a_model_that_repeats_itself_is_cut_off(naive):
    again = {
        "text": "same ",
        "is_finished": False,
        "finish_reason": "",
        "usage": None,
        "index": 0,
        "tool_use": None,
    }
    # The other kind of chunk that a provider may stream; ours is never looked at for repetition,
    # which test_streams.py shows.
    naive.chunks = [dict(again) for _ in range(litellm.REPEATED_STREAMING_CHUNK_LIMIT + 2)]
    with pytest.raises(litellm.exceptions.MidStreamFallbackError, match="repeating the same chunk"):
        stream("naive/x")


def test_trap_reasoning_effort_is_refused_unless_it_is_allowed(provider, backend):
    for params in ({"reasoning_effort": "high"}, {"thinking": {"type": "enabled"}}):
        with pytest.raises(litellm.UnsupportedParamsError, match=next(iter(params))):
            litellm.completion("mrss/tone", messages=HI, **params)
        litellm.completion("mrss/tone", messages=HI, **params, allowed_openai_params=list(params))
    assert [request.thinking for request in backend.requests] == [True, True]


@pytest.mark.usefixtures("provider")
def test_trap_prompts_of_a_completion_are_turns_of_one_chat(backend):
    litellm.text_completion(model="mrss/tone", prompt=["one", "two"])
    assert [request.prompt for request in backend.requests] == ["one", "two"]


@pytest.mark.slow
def test_trap_the_proxy_serialises_known_fields_only(backend):
    # Importing the proxy takes seconds.
    from litellm.proxy.proxy_server import _fast_serialize_simple_model_response_stream as fast

    extra = chunk(choice(content="a"))
    extra.mrss = {"mixture": "tone"}
    assert b"mixture" not in fast(extra)
    # Of ours every chunk that tells more than text takes the other way.
    known = chunk(choice(content="a"))
    known.provider_specific_fields = {"mrss": {"mixture": "tone"}}
    assert fast(known) is None
