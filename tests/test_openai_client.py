"""The `openai` package against a real server over a tiny model: completions, vectors, tokens."""

import asyncio
import base64
import math
from array import array

import httpx
import openai
import pytest
from fakes import serving
from ports import free_port
from tiny_engine import tiny_config

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import EmbedRequest, GenerateRequest, Message
from mrss_provider.client import Client
from mrss_provider.config import ServerConfig
from mrss_provider.errors import InvalidRequestError
from mrss_provider.sampling_params import SamplingParams

MIXTURES = [
    "knowledge+tone:0.5~delta~novelty",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("base", "knowledge+tone~linear", "knowledge+tone~route~posterior")
    ),
]
TEXT = "hello world, the cat is red; été"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_config(
        folder, max_rows=32, max_context_len=200, prefill_chunk_len=16, lazy_rows="off"
    )


@pytest.fixture(scope="module")
def engine(config):
    return AsyncEngine(config)


@pytest.fixture(scope="module")
def address(engine):
    server = ServerConfig(port=free_port(), request_timeout_s=30.0)
    with serving(engine, server):
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def tokens_of(client, text):
    return client.post("/tokenize", body={"prompt": text}, cast_to=object)["tokens"]


def given_logprobs(engine, model, context, continuation):
    """Return the log-probabilities of a given answer's tokens, from the engine itself."""

    async def main():
        sampling = SamplingParams(logprobs=True)
        stream = await engine.open(
            GenerateRequest(model, sampling, prompt=context, given=continuation)
        )
        return [token.logprob async for delta in stream for token in delta.logprobs]

    return asyncio.run(main())


@pytest.mark.parametrize("model", MIXTURES)
def test_lm_evaluation_harness_gets_the_engines_loglikelihood(address, client, engine, model):
    """The body and the sums are those of its `local-completions`, as it has them in 2026.

    lm_eval/models/openai_completions.py: `_create_payload` and `parse_logprobs`.
    """
    pairs = [("hello", " world"), ("hello", " world"), ("User:", " the cat is red; été")]
    encoded = [(tokens_of(client, a), tokens_of(client, a + b)) for a, b in pairs]
    body = {
        "model": model,
        "prompt": [whole for _, whole in encoded],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    outputs = httpx.post(f"{address}/v1/completions", json=body, timeout=30).json()
    choices = sorted(outputs["choices"], key=lambda choice: choice["index"])
    assert [len(whole) > len(context) for context, whole in encoded] == [True] * 3
    for choice, (context, whole), (start, rest) in zip(choices, encoded, pairs, strict=True):
        length = len(context)
        logprobs = choice["logprobs"]["token_logprobs"]
        tops = choice["logprobs"]["top_logprobs"]
        assert logprobs[0] is None
        given = given_logprobs(engine, model, context, rest)
        # JSON has no infinity for what the cut has removed.
        expected = [max(value, -9999.0) for value in given]
        assert sum(logprobs[length:-1]) == pytest.approx(sum(expected), abs=1e-3)
        greedy = [
            value == max(top.values()) for value, top in zip(logprobs, tops, strict=True) if top
        ]
        assert len(greedy) == len(whole)
        # The sampled token is greedy, as the temperature is 0.
        assert greedy[-1]
        assert choice["text"].startswith(start + rest)
    assert choices[0]["logprobs"] == choices[1]["logprobs"]
    assert outputs["usage"]["prompt_tokens"] == sum(len(whole) for _, whole in encoded)
    assert outputs["usage"]["completion_tokens"] == 3


def test_an_echo_alone_is_the_prompt_and_draws_nothing(client):
    answer = client.completions.create(
        model="knowledge+tone", prompt=TEXT, max_tokens=0, echo=True, logprobs=0, n=2
    )
    ids = tokens_of(client, TEXT)
    assert answer.usage.completion_tokens == 0
    assert answer.usage.prompt_tokens == len(ids)
    for choice in answer.choices:
        assert (choice.text, choice.finish_reason) == (TEXT, "length")
        assert choice.logprobs.token_ids == ids
        assert choice.logprobs.top_logprobs[0] is None
        # Asked for none of the best, one gets the token's own.
        assert all(len(top) == 1 for top in choice.logprobs.top_logprobs[1:])
        starts = choice.logprobs.text_offset
        assert starts == sorted(starts)
        assert starts[0] == 0
        assert starts[-1] <= len(TEXT)
    plain = client.completions.create(model="tone", prompt=TEXT, max_tokens=0, echo=True)
    assert plain.choices[0].text == TEXT
    assert plain.choices[0].logprobs is None


@pytest.mark.parametrize("logprobs", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_an_echo_is_streamed_and_changes_nothing_of_the_answer(client, logprobs):
    asked = {"model": "knowledge+tone", "prompt": TEXT, "max_tokens": 6, "seed": 3, "n": 2}
    asked |= {} if logprobs is None else {"logprobs": logprobs}
    plain = client.completions.create(**asked)
    echoed = client.completions.create(**asked, echo=True)
    texts, told = {0: "", 1: ""}, {0: [], 1: []}
    for chunk in client.completions.create(**asked, echo=True, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            told[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    for one, other in zip(plain.choices, echoed.choices, strict=True):
        assert other.text == TEXT + one.text == texts[one.index]
        if logprobs is not None:
            assert other.logprobs.token_logprobs[-6:] == one.logprobs.token_logprobs
            assert other.logprobs.token_logprobs == told[one.index]
            assert len(other.logprobs.tokens) == len(tokens_of(client, TEXT)) + 6


def test_the_best_of_several_answers_have_the_highest_mean(client):
    asked = {
        "model": "knowledge+tone",
        "prompt": TEXT,
        "max_tokens": 5,
        "seed": 3,
        "temperature": 2,
    }
    every = client.completions.create(**asked, n=6, logprobs=0)
    best = client.completions.create(**asked, n=2, best_of=6, echo=True)
    ranked = sorted(
        every.choices,
        key=lambda choice: -math.fsum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens),
    )
    assert [c.text for c in best.choices] == [TEXT + c.text for c in ranked[:2]]
    assert [c.index for c in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert best.usage == every.usage
    with pytest.raises(openai.BadRequestError, match="cannot be streamed"):
        client.completions.create(**asked, best_of=2, stream=True)
    with pytest.raises(openai.BadRequestError, match=r"\[n, 16\]"):
        client.completions.create(**asked, n=3, best_of=2)


def test_of_several_prompts_the_one_at_fault_is_named(client):
    answer = client.completions.create(
        model="base", prompt=[[104, 105], [33]], n=2, max_tokens=2, echo=True, seed=1
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text[:1] for c in answer.choices] == ["g", "g", " ", " "]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    with pytest.raises(
        openai.BadRequestError, match=r"prompt\[1\]: prompt must have token ids"
    ) as bad:
        client.completions.create(model="base", prompt=[[1], [9999]])
    assert bad.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match=r"prompt\[1\]: prompt and answer must fit"):
        client.completions.create(model="base", prompt=["a", "b" * 300])


@pytest.mark.slow
def test_chat_logprobs_are_sorted_and_have_bytes(client):
    answer = client.chat.completions.create(
        model="knowledge+tone~linear",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=8,
        n=2,
        seed=5,
        logprobs=True,
        top_logprobs=20,
        temperature=1.5,
        # The end of the text, which would have no entry.
        logit_bias={"0": -100},
    )
    for choice in answer.choices:
        assert len(choice.logprobs.content) == 8
        for token in choice.logprobs.content:
            values = [top.logprob for top in token.top_logprobs]
            assert len(values) == 20
            assert values == sorted(values, reverse=True)
            assert bytes(token.bytes).decode(errors="replace") == token.token
            assert all(
                bytes(top.bytes).decode(errors="replace") == top.token for top in token.top_logprobs
            )
    with pytest.raises(
        openai.BadRequestError, match=r"top_logprobs must be an integer in \[0, 20\]"
    ):
        client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": "x"}],
            logprobs=True,
            top_logprobs=21,
        )


def test_a_completions_best_tokens_have_the_chosen_one_among_them(client):
    answer = client.completions.create(
        model="knowledge+tone~linear",
        prompt="hello",
        max_tokens=20,
        seed=5,
        logprobs=2,
        temperature=2,
        top_p=1,
    )
    logprobs = answer.choices[0].logprobs
    assert {len(top) for top in logprobs.top_logprobs} == {2, 3}
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == value
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_a_seed_and_a_fingerprint_say_the_same_by_every_route(client):
    message = {"role": "user", "content": "hello"}
    ids = client.post("/tokenize", body={"messages": [message]}, cast_to=object)["tokens"]
    shared = {"model": "knowledge+tone", "seed": 7, "max_tokens": 6}
    chats = [client.chat.completions.create(messages=[message], **shared) for _ in range(2)]
    text = client.completions.create(prompt=ids, **shared)
    chunks = list(client.completions.create(prompt=ids, stream=True, **shared))
    said = [chat.choices[0].message.content for chat in chats]
    assert said[0] == said[1]
    # A chat's lead is no part of its answer.
    assert text.choices[0].text.removeprefix(" ") == said[0]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text.choices[0].text
    vector = client.embeddings.create(model="tone", input="x")
    prints = {each.system_fingerprint for each in (*chats, text, *chunks)}
    assert len(prints) == 1
    assert vector.system_fingerprint not in prints
    other = client.completions.create(prompt=ids, **{**shared, "model": "knowledge+tone:0.5"})
    assert other.system_fingerprint not in prints


def test_vectors_are_the_same_as_numbers_and_as_base64(client, address):
    texts = ["hello world", "the cat", "x"]
    shown = client.embeddings.create(model="knowledge", input=texts, encoding_format="float")
    # The client asks for base64 where nothing is said.
    packed = client.embeddings.create(model="knowledge", input=texts)
    assert [item.index for item in shown.data] == [0, 1, 2]
    num_tokens = sum(len(tokens_of(client, text)) for text in texts)
    assert shown.usage.prompt_tokens == shown.usage.total_tokens == num_tokens
    for one, other in zip(shown.data, packed.data, strict=True):
        assert len(one.embedding) == 128
        assert array("f", one.embedding) == array("f", other.embedding)
        assert math.hypot(*one.embedding) == pytest.approx(1, abs=1e-6)
    raw = httpx.post(
        f"{address}/v1/embeddings",
        json={"model": "knowledge", "input": "hello world", "encoding_format": "base64"},
    ).json()
    little_endian = base64.b64decode(raw["data"][0]["embedding"])
    assert len(little_endian) == 4 * 128
    assert array("f", little_endian) == array("f", shown.data[0].embedding)


def test_a_vector_is_of_its_state_its_pooling_and_its_first_dimensions(client):
    def vector(model="base", content="hello world", **extra):
        return client.embeddings.create(model=model, input=content, **extra).data[0].embedding

    whole = vector()
    assert vector(content=tokens_of(client, "hello world")) == whole
    assert vector(content=[tokens_of(client, "hello world")]) == whole
    assert vector(model="tone") != whole
    assert vector(extra_body={"mrss": {"pooling": "last"}}) != whole
    norm = math.hypot(*whole[:10])
    assert vector(dimensions=10) == pytest.approx([x / norm for x in whole[:10]], abs=1e-6)


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"model": "knowledge+tone"}, "model", "has 3"),
        ({"model": "nobody"}, "model", "nobody"),
        ({"input": ""}, "input", "not empty"),
        ({"input": []}, "input", "1 to 2048"),
        ({"input": ["a", ""]}, "input", r"input\[1\]"),
        ({"input": [[]]}, "input", "empty list"),
        ({"input": ["a"] * 2049}, "input", "1 to 2048"),
        ({"input": ["a", "b" * 300]}, "input", r"input\[1\]: prompt and answer must fit"),
        ({"input": [1, 9999]}, "input", "token ids in"),
        ({"dimensions": 129}, "dimensions", r"\[1, 128\]"),
        ({"dimensions": 0}, "dimensions", "above 0"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"extra_body": {"mrss": {"pooling": "max"}}}, "mrss.pooling", "'mean' or 'last'"),
        ({"extra_body": {"mrss": {"gate": "novelty"}}}, "mrss.gate", "no parameter"),
        ({"extra_body": {"stream": True}}, "stream", "no parameter"),
    ],
)
def test_a_bad_embedding_is_refused_by_name(client, extra, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.embeddings.create(**({"model": "base", "input": "x"} | extra))
    assert refused.value.param == param


def test_a_chat_is_counted_as_it_is_answered(client, address):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello\n\nworld"},
    ]
    for turns in (messages, [*messages, {"role": "assistant", "content": "the cat"}]):
        body = {"model": "tone", "messages": turns}
        counted = httpx.post(f"{address}/tokenize", json=body).json()
        answer = client.chat.completions.create(**body, max_tokens=1)
        assert counted["count"] == len(counted["tokens"]) == answer.usage.prompt_tokens
        assert counted["max_model_len"] == 200
        # Whatever else a request has, it can be counted as it is.
        assert httpx.post(f"{address}/v1/tokenize", json={**body, "n": 2}).json() == counted


def test_tokens_are_text_again(address):
    with httpx.Client(base_url=address) as http:
        tokens = http.post("/tokenize", json={"prompt": TEXT, "add_special_tokens": False}).json()
        assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {
            "prompt": TEXT
        }
        assert http.post("/v1/detokenize", json={"tokens": []}).json() == {"prompt": ""}
        for path, body, words in (
            ("detokenize", {"tokens": [1, 320]}, "[0, 320)"),
            ("detokenize", {"tokens": ["a"]}, "a token id is"),
            ("detokenize", {"tokens": None}, "a list of token ids"),
            ("tokenize", {"prompt": ["a", "b"]}, "one prompt"),
            ("tokenize", {"prompt": "a", "model": "nobody"}, "nobody"),
            ("tokenize", {"prompt": "a", "return_token_strs": True}, "/detokenize"),
            ("tokenize", {"prompt": [1, 320]}, "[0, 320)"),
            ("tokenize", {"prompt": "a", "mrss": {"session": "s"}}, "not counted"),
            ("tokenize", {"messages": [], "add_generation_prompt": False}, "as it would be"),
        ):
            refused = http.post(f"/{path}", json=body)
            assert refused.status_code == 400
            assert words in refused.json()["error"]["message"]
        assert http.get("/tokenizer_info").json()["eos_token"] is None


@pytest.mark.slow
def test_our_own_client_does_all_of_it(address, engine):
    async def vectors(backend):
        request = EmbedRequest("tone", ("hello", (1, 2)), "last", 8, timeout_s=20.0)
        with pytest.raises(InvalidRequestError, match="has 3"):
            await backend.embed(EmbedRequest("knowledge+tone", ("x",)))
        return await backend.embed(request)

    async def tokens(backend):
        chat = (Message("user", "hi"),)
        for asked in ({"prompt": "hello world"}, {"messages": chat}):
            yield await backend.tokenize(GenerateRequest("base", SamplingParams(), **asked))
        yield await backend.detokenize((200, 90, 91))

    async def answer(backend):
        sampling = SamplingParams(max_tokens=4, seed=1, logprobs=True, top_logprobs=3)
        asked = GenerateRequest("tone", sampling, prompt=(200, 1, 90), n=2, echo=True, best_of=5)
        deltas = [delta async for delta in await backend.open(asked)]
        tops = [[token.top for token in delta.logprobs] for delta in deltas]
        return [(d.text, d.finish_reason, d.usage) for d in deltas], tops

    async def main():
        client = Client(address)
        assert await vectors(client) == await vectors(engine)
        assert [x async for x in tokens(client)] == [x async for x in tokens(engine)]
        assert await answer(client) == await answer(engine)

    asyncio.run(main())
