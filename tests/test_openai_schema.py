"""Requests on the OpenAI wire. Oracles: exact round trips, and the `openai` package's own types."""

import json
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import EmbeddingCreateParams
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams
from openai_bodies import CHAT, TEXT, parse, texts

from mrss_provider import openai_schema as schema
from mrss_provider.backend import EmbedRequest, GenerateRequest, Message, MixtureOptions
from mrss_provider.errors import InvalidRequestError
from mrss_provider.sampling_params import SamplingParams

stops = st.lists(texts.filter(bool), max_size=4).map(tuple)


def numbers(low, high, **kwargs):
    return st.floats(low, high, allow_nan=False, **kwargs)


samplings = st.builds(
    lambda logprobs, top, **rest: SamplingParams(
        logprobs=logprobs, top_logprobs=top if logprobs else 0, **rest
    ),
    logprobs=st.booleans(),
    top=st.integers(0, 20),
    temperature=st.none() | numbers(0, 100),
    top_p=st.none() | numbers(0, 1, exclude_min=True),
    top_k=st.integers(0, 2**31 - 1),
    min_p=numbers(0, 1),
    presence_penalty=numbers(-2, 2),
    frequency_penalty=numbers(-2, 2),
    repetition_penalty=numbers(0, 10, exclude_min=True),
    penalty_decay=numbers(0, 1, exclude_min=True),
    logit_bias=st.dictionaries(st.integers(0, 65535), numbers(-100, 100), max_size=3),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    stop=stops,
    ignore_eos=st.booleans(),
    sampling_order=st.sampled_from([None, "openai", "rwkv"]),
)
weights = numbers(0, 1e6)
options = st.builds(
    MixtureOptions,
    weights=st.none() | st.dictionaries(texts, weights, max_size=3),
    merge=st.sampled_from([None, "linear", "power:-0.5", "contrast"]),
    gate=st.sampled_from([None, "fixed", "novelty:0.1,2", "schedule:a=0@0,1@9+b=1@3,turns"]),
    cut=st.none() | numbers(0, 1, exclude_max=True),
    trace=st.booleans(),
    reinject=st.sampled_from([None, "never", "turn"]),
) | st.builds(MixtureOptions, gating_weights=st.lists(weights, max_size=4).map(tuple))
messages = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts),
    min_size=1,
    max_size=4,
).map(tuple)
prompts = texts | st.lists(st.integers(0, 2**31), min_size=1, max_size=5).map(tuple)
shared = {
    "model": texts.filter(lambda name: name and not name.startswith("mrss/")),
    "sampling": samplings,
    "n": st.integers(1, 16),
    "mixture": options,
    "timeout_s": st.none() | numbers(0.001, 1e6),
}
requests = st.builds(GenerateRequest, messages=messages, **shared) | st.builds(
    GenerateRequest, prompt=prompts, echo=st.booleans(), **shared
)
embed_requests = st.builds(
    EmbedRequest,
    model=shared["model"],
    inputs=st.lists(prompts.filter(len), min_size=1, max_size=4).map(tuple),
    pooling=st.sampled_from(["mean", "last"]),
    dimensions=st.none() | st.integers(1, 2**31 - 1),
    timeout_s=shared["timeout_s"],
)
streams = st.builds(
    schema.StreamOptions,
    stream=st.just(True),
    include_usage=st.booleans(),
    include_num_tokens=st.booleans(),
)


@given(requests, streams)
def test_a_request_survives_the_wire(request, stream):
    body = json.loads(json.dumps(schema.request_to_body(request, stream)))
    parsed = parse(body)
    assert parsed.request == request
    assert parsed.stream == stream


@given(st.integers(1, 16).flatmap(lambda n: st.tuples(st.just(n), st.integers(n + 1, 17))))
def test_the_choice_of_the_best_survives_the_wire(numbers):
    n, best_of = numbers
    sampling = SamplingParams(max_tokens=0, logprobs=True)
    request = GenerateRequest("a", sampling, prompt="x", n=n, best_of=best_of, echo=True)
    stream = schema.StreamOptions(stream=True, include_num_tokens=True)
    body = schema.request_to_body(request, stream)
    if best_of <= schema.MAX_N:
        assert parse(body).request == request
        return
    with pytest.raises(InvalidRequestError):
        parse(body)


@given(embed_requests, st.sampled_from(["float", "base64"]))
def test_an_embedding_request_survives_the_wire(request, encoding):
    body = json.loads(json.dumps(schema.embed_request_to_body(request, encoding)))
    parsed = schema.parse_embed_request(body)
    assert (parsed.request, parsed.encoding) == (request, encoding)


@pytest.mark.parametrize(
    ("table", "params"),
    [
        (schema.EMBEDDING_KEYS, EmbeddingCreateParams),
        (schema.CHAT_KEYS, CompletionCreateParamsNonStreaming),
        (schema.COMPLETION_KEYS, TextParams),
    ],
)
def test_every_parameter_of_the_openai_client_has_a_kind(table, params):
    known = table.honoured | table.accepted | set(table.refused)
    assert set(get_type_hints(params)) <= known


@pytest.mark.parametrize("table", [schema.CHAT_KEYS, schema.COMPLETION_KEYS, schema.MRSS_KEYS])
def test_no_key_has_two_kinds(table):
    kinds = [table.honoured, table.accepted, set(table.refused)]
    assert sum(map(len, kinds)) == len(set().union(*kinds))


@pytest.mark.parametrize("key", sorted(schema.CHAT_KEYS.accepted))
def test_harmless_keys_change_nothing(key):
    assert parse({**CHAT, key: {"any": "thing"}}) == parse(CHAT)


def test_null_is_as_if_absent():
    nulls = dict.fromkeys(schema.CHAT_KEYS.honoured - {"model", "messages"})
    assert parse({**CHAT, **nulls}) == parse(CHAT)


def test_roles_parts_and_prefix_are_understood():
    body = {
        "model": "mrss/knowledge+tone",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": t} for t in "ab"]},
            {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None},
        ],
    }
    request = parse(body).request
    assert request.model == "knowledge+tone"
    assert request.messages == (
        Message("system", "be brief"),
        Message("user", "ab"),
        Message("assistant", "c"),
    )


def test_what_users_of_rwkv_infer_send_is_honoured():
    body = {
        **CHAT,
        "mrss_gatingweight": ["0.01", 0.3, "4e-1"],
        "penalty_decay": 0.996,
        "params": {"temperature": 0.5, "top_p": 0.3},
        "temperature": 1.5,
    }
    request = parse(body).request
    assert request.mixture.gating_weights == (0.01, 0.3, 0.4)
    assert request.sampling.penalty_decay == 0.996
    assert (request.sampling.temperature, request.sampling.top_p) == (1.5, 0.3)
    # Null says nothing, so it hides nothing.
    assert parse({**body, "temperature": None}).request.sampling.temperature == 0.5
    with pytest.raises(InvalidRequestError, match="'heat' is no parameter"):
        parse({**body, "heat": None})


def test_messages_at_the_completion_route_are_a_chat():
    assert schema.parse_completion_request(CHAT) == schema.parse_chat_request(CHAT)


def test_several_prompts_are_several_requests():
    for prompt, expected in (
        (["a", "b"], ["a", "b"]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        ([1, 2], [(1, 2)]),
        ("", [""]),
    ):
        parsed = parse({**TEXT, "prompt": prompt, "n": 2, "best_of": 2})
        assert [request.prompt for request in parsed.requests] == expected
        assert all(request.n == 2 for request in parsed.requests)
