"""Whole answers through LiteLLM's SDK, synchronous and not, against a scripted backend."""

import asyncio
import math

import litellm
import pytest
from fakes import FINGERPRINT, ROWS, Wait, text
from openai.types.chat import ChatCompletion

from mrss_provider.backend import Delta, Message, TokenLogprob, TopLogprob, Usage

pytestmark = pytest.mark.usefixtures("provider")

HI = [{"role": "user", "content": "Hi"}]


def complete(**kwargs):
    return litellm.completion(**{"model": "mrss/knowledge+tone", "messages": HI, **kwargs})


async def acomplete(**kwargs):
    return await litellm.acompletion(**{"model": "mrss/knowledge+tone", "messages": HI, **kwargs})


def logprob(token, value, *top):
    return TokenLogprob(1, token, value, tuple(TopLogprob(2, *entry) for entry in top))


def test_answer_is_the_engines_to_the_token(backend):
    backend.script = [
        text("Hello"),
        Delta(text=" you", num_tokens=2, finish_reason="length", usage=Usage(11, 3, 8)),
    ]
    response = complete()
    (choice,) = response.choices
    assert choice.message.content == "Hello you"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    usage = response.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (11, 3, 14)
    assert usage.prompt_tokens_details.cached_tokens == 8
    assert response.system_fingerprint == FINGERPRINT


def test_answer_names_its_mixture_everywhere_it_survives():
    response = complete(model="mrss/tone:2+knowledge:1")
    expected = {"mixture": "knowledge:0.5+tone", "rows": ROWS}
    assert response.model == "mrss/knowledge:0.5+tone"
    assert response.mrss == expected
    assert response.choices[0].message.provider_specific_fields == {"mrss": expected}
    headers = response._hidden_params["additional_headers"]
    assert headers["llm_provider-x-mrss-mixture"] == "knowledge:0.5+tone"
    assert headers["llm_provider-x-mrss-rows"] == str(ROWS)


def test_async_answer_equals_the_sync_one():
    sync, other = complete(n=2), asyncio.run(acomplete(n=2))
    for response in (sync, other):
        assert [choice.index for choice in response.choices] == [0, 1]
        assert [choice.message.content for choice in response.choices] == ["Hello, world"] * 2
        assert response.usage.completion_tokens == 6


def test_logprobs_are_read_by_the_openai_client(backend):
    token = logprob(b"Hello", -0.25, (b"Hello", -0.25), (b"\xe4\xbd", -math.inf))
    backend.script = [Delta(text="Hello", num_tokens=1, logprobs=(token,))]
    response = complete(logprobs=True, top_logprobs=2)
    assert backend.requests[0].sampling.top_logprobs == 2
    parsed = ChatCompletion.model_validate(response.model_dump())
    (content,) = parsed.choices[0].logprobs.content
    assert (content.token, content.logprob, content.bytes) == ("Hello", -0.25, list(b"Hello"))
    assert content.top_logprobs[1].bytes == [0xE4, 0xBD]
    assert content.top_logprobs[1].logprob == -9999.0


def test_completion_takes_each_prompt_raw_and_answers_all(backend):
    backend.script = lambda request: [text(f"<{request.prompt}>")]
    response = litellm.text_completion(model="mrss/base", prompt=["one", "two\n"], n=2)
    assert [request.prompt for request in backend.requests] == ["one", "two\n"]
    assert all(request.messages is None for request in backend.requests)
    texts = [(choice.index, choice.text) for choice in response.choices]
    assert texts == [(0, "<one>"), (1, "<one>"), (2, "<two\n>"), (3, "<two\n>")]
    assert response.object == "text_completion"
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (14, 4)


def test_completion_logprobs_have_the_text_form(backend):
    tokens = (logprob(b"a", -1.0, (b"a", -1.0)), logprob(b"b", -2.0, (b"c", -0.5)))
    backend.script = [Delta(text="ab", num_tokens=2, logprobs=tokens)]
    response = litellm.text_completion(model="mrss/base", prompt="x", logprobs=1)
    logprobs = response.choices[0].logprobs
    assert logprobs.tokens == ["a", "b"]
    assert logprobs.token_logprobs == [-1.0, -2.0]
    assert logprobs.text_offset == [0, 1]
    # The chosen token stands last where it is none of the best, as with OpenAI.
    assert logprobs.top_logprobs == [{"a": -1.0}, {"c": -0.5, "b": -2.0}]


def test_parameters_arrive_flat_or_nested_and_flat_wins(backend):
    complete(
        temperature=0.5,
        top_k=7,
        extra_body={"top_k": 9, "min_p": 0.25, "mrss": {"gate": "fixed"}},
        stop=["\n"],
        seed=3,
        max_completion_tokens=5,
        logit_bias={"12": -100},
    )
    (request,) = backend.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.5, 7, 0.25)
    assert (sampling.stop, sampling.seed, sampling.max_tokens) == (("\n",), 3, 5)
    assert sampling.logit_bias == {12: -100}
    assert request.mixture.gate == "fixed"
    assert request.messages == (Message("user", "Hi"),)


def test_what_litellm_adds_itself_is_no_parameter(backend):
    response = complete(
        user="bob",
        metadata={"a": "b"},
        max_retries=2,
        num_retries=0,
        store=True,
        parallel_tool_calls=False,
    )
    assert response.choices[0].message.content == "Hello, world"
    assert len(backend.requests) == 1


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"top_p": 1.7}, "top_p"),
        ({"temprature": 1}, "temprature"),
        ({"mrss": {"gait": "fixed"}}, "mrss.gait"),
        ({"extra_body": {"mrss": 3}}, "mrss"),
        ({"extra_body": {"nonsense": 3}}, "nonsense"),
        ({"timeout": -1}, "timeout"),
        ({"model": "mrss/knowledge++tone"}, "position 10"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_names_it(backend, params, named):
    for call in (complete, lambda **kwargs: asyncio.run(acomplete(**kwargs))):
        with pytest.raises(litellm.BadRequestError, match=named.replace(".", r"\.")) as caught:
            call(**params)
        assert caught.value.llm_provider == "mrss"
    assert not backend.streams


def test_timeout_covers_the_whole_answer_and_stops_it(backend):
    backend.script = lambda request: [text("a"), Wait()]
    for call in (complete, lambda **kwargs: asyncio.run(acomplete(**kwargs))):
        with pytest.raises(litellm.Timeout, match=r"0\.05 s") as caught:
            call(timeout=0.05)
        assert caught.value.status_code == 408
    assert all(stream.ended.wait(5) and stream.aborted for stream in backend.streams)
    assert [request.timeout_s for request in backend.requests] == [0.05, 0.05]


def test_one_failing_prompt_aborts_the_others(backend):
    wait = Wait()
    backend.script = lambda request: (
        [text("a"), wait] if request.prompt == "one" else [ValueError("boom")]
    )
    with pytest.raises(litellm.InternalServerError):
        litellm.text_completion(model="mrss/base", prompt=["one", "two"])
    assert backend.streams[0].ended.wait(5)
    assert backend.streams[0].aborted


def test_cancelling_a_call_aborts_the_answer(backend):
    wait = Wait()
    backend.script = [text("a"), wait]

    async def main():
        task = asyncio.ensure_future(acomplete())
        await asyncio.to_thread(wait.reached.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert backend.streams[0].ended.wait(5)
    assert backend.streams[0].aborted


def test_answer_that_stops_short_is_an_error_and_not_a_stop(backend, monkeypatch):
    monkeypatch.setattr("fakes._complete", lambda script, n: list(script))
    with pytest.raises(litellm.ServiceUnavailableError, match="before the answer's end"):
        complete()
