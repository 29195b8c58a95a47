"""A real `litellm` process with the shipped configuration, driven by the `openai` client."""

import asyncio
import re
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from engine_processes import own_engines, start_engine
from fakes import FINGERPRINT, PROMPT_TOKENS, ROWS, SUMMARY
from proxy_process import NUM_WORKERS
from scripted_engine import WAIT_S, WORDS, user

ANSWER = "".join(WORDS)
NO_RETRIES = {"x-litellm-num-retries": "0"}


@pytest.mark.parametrize(
    ("model", "mixture"),
    [
        ("mrss/base", "base"),
        ("mrss/knowledge+tone", "knowledge+tone"),
        ("mrss/tone:3+knowledge:1.5", "knowledge:0.5+tone"),
        ("mrss/base:0.2+tone:0.8~linear~fixed", "base:0.25+tone~linear~fixed"),
    ],
)
def test_chat_by_concrete_and_wildcard_name(client, model, mixture):
    raw = client.chat.completions.with_raw_response.create(model=model, messages=user())
    answer = raw.parse()
    assert answer.model == model
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, 3)
    assert answer.system_fingerprint == FINGERPRINT
    expected = {"mixture": mixture, "rows": ROWS}
    assert answer.mrss == expected
    assert answer.choices[0].message.provider_specific_fields == {"mrss": expected}
    assert raw.headers["llm_provider-x-mrss-mixture"] == mixture
    assert raw.headers["x-litellm-model-id"]


def test_streamed_chat_has_exact_usage_when_asked(chat):
    *chunks, last = chat(stream=True, stream_options={"include_usage": True})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    mrss = {"mixture": "tone", "rows": ROWS}
    assert chunks[0].provider_specific_fields == {"mrss": mrss}
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (PROMPT_TOKENS, 3)
    assert last.usage.total_tokens == PROMPT_TOKENS + 3
    everything = [*chunks, last]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in everything}) == 1


def test_streamed_chat_has_no_usage_unasked(chat):
    chunks = list(chat(stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_streamed_choices_all_finish_and_keep_their_logprobs(chat):
    chunks = list(chat(stream=True, n=3, logprobs=True))
    texts, tokens, finished = Counter(), Counter(), {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += len(choice.delta.content or "")
        tokens[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
        if choice.finish_reason:
            finished[choice.index] = choice.finish_reason
    assert texts == dict.fromkeys(range(3), len(ANSWER))
    assert tokens == dict.fromkeys(range(3), 3)
    assert finished == dict.fromkeys(range(3), "stop")


def test_trace_survives_the_proxy_whole_and_streamed(chat):
    traced = {"extra_body": {"mrss": {"trace": True}}}
    message = chat(**traced).choices[0].message
    whole = message.provider_specific_fields["mrss"]
    found = []
    for chunk in chat(stream=True, **traced):
        fields = getattr(chunk.choices[0].delta, "provider_specific_fields", None) or {}
        found.append(fields.get("mrss", {}))
    streamed = [token for mrss in found for token in mrss.get("tokens", ())]
    assert [token["token"] for token in whole["tokens"]] == list(WORDS)
    assert streamed == whole["tokens"]
    (share,) = [mrss["spoken_share"] for mrss in found if "spoken_share" in mrss]
    assert share == whole["spoken_share"] == SUMMARY.spoken_share


def test_completion_answers_every_prompt_raw(client, backend, unique):
    prompts = [f"Once {unique}", f"Twice {unique}"]
    raw = client.completions.with_raw_response.create(
        model="mrss/base", prompt=prompts, n=2, logprobs=1
    )
    answer = raw.parse()
    assert answer.mrss == {"mixture": "base", "rows": ROWS}
    assert raw.headers["llm_provider-x-mrss-mixture"] == "base"
    assert [choice.text for choice in answer.choices] == [ANSWER] * 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[3].logprobs.tokens == list(WORDS)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2 * PROMPT_TOKENS, 12)
    for prompt in prompts:
        ((request, _),) = backend.asked(prompt)
        assert request.messages is None


def test_streamed_completion(client):
    chunks = list(client.completions.create(model="mrss/base", prompt="Once", stream=True))
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="n=1"):
        client.completions.create(model="mrss/base", prompt="Once", stream=True, n=2)


def test_parameters_reach_the_engine(chat, backend, unique):
    chat(
        f"parameters {unique}",
        model="mrss/knowledge+tone",
        user="bob",
        temperature=0.25,
        stop=["\n\n"],
        extra_body={"top_k": 5, "mrss": {"weights": {"tone": 3}, "gate": "fixed"}},
    )
    ((request, _),) = backend.asked(f"parameters {unique}")
    assert request.sampling.temperature == 0.25
    assert request.sampling.stop == ("\n\n",)
    assert request.sampling.top_k == 5
    assert request.mixture.weights == {"tone": 3.0}
    assert request.mixture.gate == "fixed"
    # The configuration's request_timeout.
    assert request.timeout_s == 600.0


def test_request_wins_over_the_deployments_presets(chat, backend, unique):
    chat(f"preset {unique}", model="preset", extra_body={"top_k": 9})
    ((request, _),) = backend.asked(f"preset {unique}")
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.5, 9, 0.25)


def test_models_lists_the_concrete_entries(client):
    names = {model.id for model in client.models.list()}
    assert {"mrss/base", "mrss/knowledge", "mrss/tone", "mrss/knowledge+tone", "mrss-ab"} <= names
    # LiteLLM expands no wildcard: what has no entry of its own is not listed.
    assert not any("*" in name for name in names)


def test_ab_group_spreads_and_tells_the_arm(client):
    arms = {"mrss-ab-knowledge": "knowledge", "mrss-ab-knowledge-tone": "knowledge+tone"}
    seen = Counter()
    for _ in range(24):
        raw = client.chat.completions.with_raw_response.create(model="mrss-ab", messages=user())
        arm = raw.headers["x-litellm-model-id"]
        assert raw.parse().mrss["mixture"] == arms[arm]
        seen[arm] += 1
    # A fair coin leaves one side empty once in eight million times.
    assert set(seen) == set(arms)


def test_list_of_models_is_answered_by_each(chat):
    answers = chat(model="mrss/tone,mrss/base")
    assert [answer.mrss["mixture"] for answer in answers] == ["tone", "base"]


def test_second_backend_answers_over_openais_wire(chat, backend, unique):
    # Here it is our own engine's server: the other way in, without our provider.
    answer = chat(f"other {unique}", model="other")
    assert answer.choices[0].message.content == ANSWER
    assert len(backend.asked(f"other {unique}")) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_and_responses_bridges(client, proxy, stream):
    body = {"model": "mrss/tone", "max_tokens": 9, "messages": user(), "stream": stream}
    message = httpx.post(f"{proxy.url}/v1/messages", json=body)
    assert message.status_code == 200
    # How many events an answer takes is the proxy's to say.
    pieces = re.findall(r'"text": ?"([^"]+)"', message.text)
    assert "".join(pieces) == ANSWER
    assert '"output_tokens":3' in message.text.replace(" ", "")
    response = client.responses.create(model="mrss/tone", input="Hi", stream=stream)
    final = list(response)[-1].response if stream else response
    assert final.output_text == ANSWER
    assert final.usage.output_tokens == 3


def test_cache_tells_mixtures_and_our_parameters_apart(proxy, backend, unique):
    prompt = f"cached {unique}"
    bodies = [
        {"mrss": {"gate": "fixed"}},
        {"mrss": {"gate": "novelty"}},
        {"top_k": 3},
        {"model": "mrss/base"},
    ]
    # Each worker has a cache of its own; one connection stays with one worker.
    with httpx.Client(base_url=proxy.url) as http:
        ids = []
        for extra in [*bodies, *bodies]:
            body = {"model": "mrss/knowledge+tone", "messages": user(prompt), **extra}
            body["cache"] = {"use-cache": True}
            ids.append(http.post("/v1/chat/completions", json=body).json()["id"])
    assert len(set(ids)) == len(bodies)
    assert ids[len(bodies) :] == ids[: len(bodies)]
    assert len(backend.asked(prompt)) == len(bodies)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("mrss/knowledge+ton", "unknown state 'ton' at position 10; did you mean 'tone'?"),
        ("mrss/knowledge++tone", "position 10: expected a state name, got '+'"),
        ("mrss/tone:much", "position 5: expected a weight"),
        ("mrss/", "model must have 1 to"),
    ],
)
def test_bad_name_is_a_400_with_the_place_and_the_remedy(chat, model, told, stream):
    with pytest.raises(openai.BadRequestError) as error:
        chat(model=model, stream=stream)
    assert told in error.value.body["message"]
    assert error.value.body["param"] == "model"


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"top_p": 3}, "top_p"),
        ({"extra_body": {"mrss": {"gait": "fixed"}}}, "mrss.gait"),
        ({"extra_body": {"min_pp": 0.1}}, "min_pp"),
    ],
)
def test_refused_parameter_is_a_400_that_names_it(chat, params, param):
    with pytest.raises(openai.BadRequestError) as error:
        chat(**params)
    assert error.value.body["param"] == param
    assert error.value.body["type"] == "invalid_request_error"


def test_openais_client_gets_embeddings_without_a_word_about_their_encoding(client):
    # It asks for base64 by itself, which LiteLLM refuses unless the entry has it dropped.
    answer = client.embeddings.create(model="mrss/tone", input=["one", "four"])
    assert [entry.embedding for entry in answer.data] == [[3.0, 1.0], [4.0, 1.0]]
    assert answer.usage.prompt_tokens == PROMPT_TOKENS


def test_reasoning_effort_reaches_the_engine(chat, backend, unique):
    # LiteLLM refuses it for a provider that it does not know, unless the entry allows it.
    for effort in ("none", "high"):
        chat(f"thinking {unique}", reasoning_effort=effort)
    asked = [request for request, _ in backend.asked(f"thinking {unique}")]
    assert [request.thinking for request in asked] == [False, True]


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_and_reasoning_survive_the_proxy(chat, unique, stream):
    tools = [{"type": "function", "function": {"name": "paint", "parameters": {}}}]
    answer = chat(f"call {unique}", tools=tools, stream=stream)
    if stream:
        deltas = [choice.delta for chunk in answer for choice in chunk.choices]
        pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
        reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert {piece.index for piece in pieces} == {0, 1}
    else:
        pieces = answer.choices[0].message.tool_calls
        reasoning = answer.choices[0].message.reasoning_content
        assert answer.choices[0].finish_reason == "tool_calls"
    assert reasoning == "Hm."
    assert [piece.function.name for piece in pieces if piece.id] == ["paint", "paint"]
    assert "".join(piece.function.arguments for piece in pieces) == '{"a": 1}{}'


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_is_a_429_that_tells_when_to_come_back(chat, stream):
    with pytest.raises(openai.RateLimitError, match="the queue is full") as error:
        chat("full", stream=stream, extra_headers=NO_RETRIES)
    assert error.value.response.headers["llm_provider-retry-after"] == "2"


@pytest.mark.parametrize("stream", [False, True])
def test_long_prompt_is_litellms_context_window_error(chat, stream):
    with pytest.raises(openai.BadRequestError, match="ContextWindowExceededError") as error:
        chat("too long", stream=stream)
    assert "9000 tokens are more than the limit of 4096" in error.value.body["message"]


def test_defect_is_a_500_with_an_id_and_no_traceback(chat):
    with pytest.raises(openai.InternalServerError) as error:
        chat("break")
    text = error.value.response.text
    assert "under chatcmpl-" in text
    with pytest.raises(openai.APIError) as stream_error:
        list(chat("break", stream=True))
    for told in (text, str(stream_error.value)):
        assert "a secret" not in told
        assert "Traceback" not in told


def test_timeout_is_a_408_without_a_second_try_and_frees_the_rows(chat, backend, unique):
    prompt = f"wait first {unique}"
    with pytest.raises(openai.APIStatusError) as error:
        chat(prompt, extra_body={"timeout": 0.2})
    assert error.value.status_code == 408
    ((_, stream),) = backend.asked(prompt)
    assert stream.ended.wait(WAIT_S)
    assert stream.aborted


@pytest.mark.parametrize("moment", ["first", "later"])
def test_silent_stream_times_out_and_frees_the_rows(chat, backend, moment, unique):
    prompt = f"wait {moment} {unique}"
    with pytest.raises(openai.APIError, match=r"nothing came for 0\.2 s"):
        list(chat(prompt, stream=True, extra_body={"timeout": 0.2}))
    ((_, stream),) = backend.asked(prompt)
    assert stream.ended.wait(WAIT_S)
    assert stream.aborted


@pytest.mark.parametrize("moment", ["first", "later"])
@pytest.mark.parametrize("stream", [False, True])
def test_client_that_hangs_up_frees_the_rows(proxy, backend, stream, moment, unique):
    prompt = f"wait {moment} {unique}"

    async def leave():
        async with proxy.client(openai.AsyncOpenAI) as client:
            create = client.chat.completions.create
            asking = asyncio.create_task(
                create(model="mrss/tone", messages=user(prompt), stream=stream)
            )
            answer = await asyncio.to_thread(backend.blocked, prompt)
            if stream and moment == "later":
                chunks = await asking
                assert (await anext(chunks)).choices[0].delta.content == WORDS[0]
                await chunks.close()
            else:
                asking.cancel()
            return answer

    answer = asyncio.run(leave())
    assert answer.ended.wait(WAIT_S)
    assert answer.aborted


def test_all_workers_share_one_engine(proxy, engine):
    body = {"model": "mrss/tone", "messages": user()}
    workers = {child.pid for child in psutil.Process(proxy.process.pid).children(recursive=True)}
    for _ in range(200):
        # A connection each: the kernel deals them out.
        assert httpx.post(f"{proxy.url}/v1/chat/completions", json=body).status_code == 200
        if len(engine.peers & workers) == NUM_WORKERS:
            break
    assert len(engine.peers & workers) == NUM_WORKERS


def test_killed_engine_is_a_503_and_its_successor_serves(chat, folder):
    ask = {"model": "killable", "extra_headers": NO_RETRIES}
    first = start_engine(folder / "killable.sock")
    assert chat(**ask).choices[0].message.content == "Hello, world"
    first.send_signal(signal.SIGKILL)
    first.wait(WAIT_S)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="no engine answers") as error:
            chat(**ask, stream=stream)
        assert error.value.status_code == 503
    second = start_engine(folder / "killable.sock")
    try:
        assert chat(**ask).choices[0].message.content == "Hello, world"
    finally:
        second.terminate()
        second.wait(WAIT_S)


@pytest.mark.slow
def test_engine_is_started_once_for_all_and_again_after_sigkill(chat, folder):
    def ask(_=None):
        return chat("Who are you?", model="auto/knowledge+tone", max_tokens=4, seed=1)

    def ask_eight_times():
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(ask, range(8)))

    first = ask_eight_times()
    (engine,) = own_engines(folder)
    assert all(answer.usage.completion_tokens > 0 for answer in first)
    assert {answer.mrss["mixture"] for answer in first} == {"knowledge+tone"}
    stream = chat("Who are you?", model="auto/tone", max_tokens=100_000, stream=True)
    next(stream)
    engine.kill()
    with pytest.raises(openai.APIError):
        list(stream)
    again = ask_eight_times()
    (successor,) = own_engines(folder)
    assert successor.pid != engine.pid
    assert again[0].choices[0].message.content == first[0].choices[0].message.content
