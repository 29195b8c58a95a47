"""The OpenAI wire. Oracles: exact round trips, and the `openai` package's own models."""

import json
import math
from array import array
from dataclasses import replace
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion, EmbeddingCreateParams, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.completion_create_params import (
    CompletionCreateParamsNonStreaming as TextParams,
)

from mrss_provider import openai_schema as schema
from mrss_provider.backend import (
    Delta,
    Embeddings,
    EmbedRequest,
    GenerateRequest,
    Message,
    MixtureOptions,
    ModelCard,
    StreamInfo,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mrss_provider.errors import (
    ContextLengthError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    MRSSError,
    QueueFullError,
    UnknownNameError,
)
from mrss_provider.sampling_params import SamplingParams

CHAT = {"model": "tone", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tone", "prompt": "hi"}
INFO = StreamInfo("knowledge+tone", 3, "mrss-abc", 7)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
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


def parse(body):
    """Parse as the route of the body's kind does."""
    if "messages" in body:
        return schema.parse_chat_request(body)
    return schema.parse_completion_request(body)


def refusal(body) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse(body)
    return caught.value


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


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False), max_size=5), max_size=4))
def test_vectors_survive_the_wire_as_base64_and_as_numbers(vectors):
    found = Embeddings("tone", "print", tuple(array("f", v) for v in vectors), 9)
    assert (
        schema.read_embeddings(json.loads(b"".join(schema.embeddings_pieces(found, "base64"))))
        == found
    )
    if not any(math.isinf(x) for v in vectors for x in v):
        shown = json.loads(b"".join(schema.embeddings_pieces(found, "float")))
        assert tuple(array("f", each["embedding"]) for each in shown["data"]) == found.vectors


def test_an_answer_that_is_none_is_an_error_of_the_engine():
    for read, body in (
        (schema.read_embeddings, {"data": [{"index": 0, "embedding": "%"}], "model": "a"}),
        (schema.read_embeddings, None),
        (schema.read_tokens, {"tokens": 3}),
        (schema.read_detokenized, {"prompt": None}),
    ):
        with pytest.raises(EngineError, match="the engine sent"):
            read(body)


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


@pytest.mark.parametrize("key", sorted(schema.CHAT_KEYS.refused))
def test_refused_chat_keys_are_named_unless_neutral(key):
    refused = refusal({**CHAT, key: ["x"]})
    assert key in str(refused)
    assert refused.param == key
    for neutral in (None, *schema.CHAT_KEYS.refused[key].neutral):
        assert parse({**CHAT, key: neutral}) == parse(CHAT)


@pytest.mark.parametrize("key", sorted(schema.COMPLETION_KEYS.refused))
def test_refused_completion_keys_are_named_unless_neutral(key):
    assert refusal({**TEXT, key: ["x"]}).param == key
    for neutral in (None, *schema.COMPLETION_KEYS.refused[key].neutral):
        assert parse({**TEXT, key: neutral}) == parse(TEXT)


def test_null_is_as_if_absent():
    nulls = dict.fromkeys(schema.CHAT_KEYS.honoured - {"model", "messages"})
    assert parse({**CHAT, **nulls}) == parse(CHAT)


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"mrss_gate": "x"}, "mrss_gate", "no parameter"),
        ({"mrss": {"wieghts": {}}}, "mrss.wieghts", "did you mean 'mrss.weights'"),
        ({"mrss": {"trace": 1}}, "mrss.trace", "true or false"),
        ({"mrss": {"given": ["x"]}}, "mrss.given", "a text"),
        ({"mrss": {"given": ""}}, "mrss.given", "a text"),
        ({"mrss": {"given": "\ud800"}}, "mrss.given", "surrogate"),
        ({"mrss": {"given": "x"}, "n": 2}, "n", "left out with mrss.given"),
        ({"mrss": {"given": "x"}, "max_tokens": 5}, "max_tokens", "left out with mrss.given"),
        ({"mrss": {"given": "x"}, "stop": "."}, "stop", "left out with mrss.given"),
        ({"mrss": {"reinject": "always"}}, "mrss.reinject", "one of never, turn, got 'always'"),
        ({"mrss": {"merge": "mean"}}, "mrss.merge", "one of linear, geometric, product"),
        ({"mrss": {"gate": 1}}, "mrss.gate", "fixed, schedule, novelty"),
        ({"mrss": {"cut": 1.0}}, "mrss.cut", "[0, 1)"),
        ({"mrss": {"weights": {"a": 1e999}}}, "mrss.weights", "finite"),
        ({"mrss": {"sampling_order": "top"}}, "sampling_order", "'rwkv'"),
        ({"mrss": "linear"}, "mrss", "an object"),
        ({"mrss_gatingweight": ["x"]}, "mrss_gatingweight", "a number"),
        ({"mrss_gatingweight": ["nan"]}, "mrss_gatingweight", "finite"),
        ({"mrss_gatingweight": 1}, "mrss_gatingweight", "a list"),
        ({"mrss_gatingweight": [1], "mrss": {"weights": {"a": 1}}}, "mrss_gatingweight", "both"),
        ({"n": 0}, "n", "[1, 16]"),
        ({"n": True}, "n", "[1, 16]"),
        ({"n": 17}, "n", "[1, 16]"),
        ({"timeout": 0}, "timeout", "above 0"),
        ({"timeout": "5"}, "timeout", "above 0"),
        ({"timeout": 10**400}, "timeout", "above 0"),
        ({"timeout": 1.1e9}, "timeout", "above 0"),
        ({"timeout": float("nan")}, "timeout", "above 0"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", "true"),
        (
            {"stream_options": {"include_usge": True}},
            "stream_options.include_usge",
            "include_usage",
        ),
        ({"stop": [1]}, "stop", "strings"),
        ({"stop": ""}, "stop", "1 to"),
        ({"stop": 5}, "stop", "list"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "[-100, 100]"),
        ({"logit_bias": {"٣": 1}}, "logit_bias", "token ids"),
        ({"logprobs": 1}, "logprobs", "true or false"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "equal"),
        ({"max_completion_tokens": 0}, "max_tokens", "integer in [1"),
        ({"temperature": float("inf")}, "temperature", "[0, 100]"),
        ({"temperature": "1"}, "temperature", "[0, 100]"),
        ({"params": 5}, "params", "an object"),
        ({"model": ""}, "model", "1 to"),
        ({"model": None}, "model", "got nothing"),
        ({"model": "x" * 2000}, "model", "1 to"),
        ({"messages": []}, "messages", "1 to"),
        ({"messages": "hi"}, "messages", "a list"),
        ({"messages": [5]}, "messages[0]", "an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "the id"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0]", "tool_call_id"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0]", "one of system"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages[0]", "one of system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "a string"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "only text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
            "an object",
        ),
        ({"messages": [{"role": "user", "content": "", "x": 1}]}, "messages[0].x", "no parameter"),
    ],
)
def test_a_bad_chat_is_refused_by_name(extra, param, words):
    refused = refusal({**CHAT, **extra})
    assert refused.param == param
    assert words in str(refused)
    assert refused.status_code == 400


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"prompt": []}, "prompt", "1 to"),
        ({"prompt": None}, "prompt", "text, token ids"),
        ({"prompt": [[]]}, "prompt", "empty list"),
        ({"prompt": [1, -2]}, "prompt", ">= 0"),
        ({"prompt": [[1, True]]}, "prompt", ">= 0"),
        ({"prompt": [1, "x"]}, "prompt", "prompt: a token id is an integer >= 0, got 'x'"),
        ({"prompt": [1.0, 2.0]}, "prompt", "prompt: a token id is an integer >= 0, got 1.0"),
        ({"prompt": [True, 2]}, "prompt", "prompt: a token id is an integer >= 0, got True"),
        ({"prompt": [-(10**5000)]}, "prompt", "got an integer of thousands of digits"),
        ({"logit_bias": {10**5000: 1}}, "logit_bias", "got an integer of thousands of digits"),
        ({"logit_bias": {"1": 5, "01": 3}}, "logit_bias", "has token 1 twice"),
        ({"prompt": [[1], [2, -3]]}, "prompt", "prompt[1]: a token id is an integer >= 0"),
        ({"prompt": ["x", 1]}, "prompt[1]", "a list of token ids"),
        ({"prompt": ["x"] * 129}, "prompt", "1 to 128"),
        ({"best_of": 1, "n": 2}, "best_of", "[n, 16]"),
        ({"best_of": 17}, "best_of", "[n, 16]"),
        ({"best_of": 2, "stream": True}, "best_of", "streamed"),
        ({"best_of": 2, "mrss": {"session": "s"}}, "best_of", "one answer"),
        ({"echo": 1}, "echo", "true or false"),
        ({"echo": True, "mrss": {"given": "x"}}, "mrss.given", "echo"),
        ({"echo": True, "mrss": {"session": "s"}}, "mrss.session", "echo"),
        ({"max_tokens": 0}, "max_tokens", "integer in [1"),
        ({"suffix": "x"}, "suffix", "only writes forward"),
        ({"logprobs": True}, "logprobs", "[0, 20]"),
        ({"logprobs": 21}, "logprobs", "[0, 20]"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "max_tokens"),
    ],
)
def test_a_bad_completion_is_refused_by_name(extra, param, words):
    refused = refusal({**TEXT, **extra})
    assert refused.param == param
    assert words in str(refused)


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_a_body_that_is_no_object_is_refused(body):
    for parse_body in (schema.parse_chat_request, schema.parse_completion_request):
        with pytest.raises(InvalidRequestError, match="JSON object"):
            parse_body(body)


def test_too_many_characters_are_a_context_error():
    long = "x" * (schema.MAX_CHARS // 2 + 1)
    for body in (
        {**CHAT, "messages": [{"role": "user", "content": long}] * 2},
        {**TEXT, "prompt": [long, long]},
    ):
        with pytest.raises(ContextLengthError, match="in all"):
            parse(body)


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


tokens = st.binary(min_size=0, max_size=5) | texts.map(str.encode)
logprobs = st.floats(-9999, 0, allow_nan=False)


@st.composite
def token_logprobs(draw):
    top = draw(st.lists(tokens, unique=True, max_size=3))
    return TokenLogprob(
        draw(st.integers(0, 65535)),
        draw(tokens),
        draw(logprobs),
        tuple(TopLogprob(i, token, draw(logprobs)) for i, token in enumerate(top)),
    )


content_deltas = st.builds(
    Delta,
    index=st.integers(0, 3),
    text=texts,
    num_tokens=st.integers(1, 5),
    logprobs=st.lists(token_logprobs(), max_size=3).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length"]),
)
usages = st.builds(Usage, *[st.integers(0, 10**6)] * 3)
FULL = schema.StreamOptions(stream=True, include_usage=True, include_num_tokens=True)


def told_in_chats(delta):
    """The end of the text, which has no bytes, has no part in a chat's content."""
    return replace(delta, logprobs=tuple(token for token in delta.logprobs if token.token))


@given(st.sampled_from(["chat", "text"]), st.lists(content_deltas, max_size=5), usages)
def test_deltas_survive_the_wire_and_openai_reads_every_chunk(kind, deltas, usage):
    writer = schema.ChunkWriter(schema.new_head(kind, INFO), FULL)
    sent = [*deltas, Delta(usage=usage)]
    chunks = json.loads(json.dumps([c for delta in sent for c in writer.chunks(delta)]))
    expected = [told_in_chats(delta) for delta in sent] if kind == "chat" else sent
    assert [schema.read_chunk(chunk) for chunk in chunks] == expected
    for chunk in chunks:
        model = ChatCompletionChunk if kind == "chat" else Completion
        # A chunk of a completion may be unfinished, which OpenAI's model of it does not know.
        unfinished = kind == "text" and [c for c in chunk["choices"] if not c["finish_reason"]]
        if not unfinished:
            read = model.model_validate(chunk)
            assert read.usage is None or read.usage.total_tokens == usage.total_tokens
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_the_first_chunk_tells_role_and_mixture_once():
    writer = schema.ChunkWriter(schema.new_head("chat", INFO), schema.StreamOptions(stream=True))
    deltas = [Delta(i, text, 1) for i, text in ((0, "a"), (1, "b"), (0, "c"))]
    first, second, third = (writer.chunks(delta)[0] for delta in deltas)
    mrss = {"mixture": "knowledge+tone", "rows": 3}
    assert first["mrss"] == mrss
    assert first["choices"][0]["delta"]["provider_specific_fields"] == {"mrss": mrss}
    assert [c["choices"][0]["delta"].get("role") for c in (first, second, third)] == [
        "assistant",
        "assistant",
        None,
    ]
    assert "mrss" not in second
    assert "num_tokens" not in first["choices"][0]


def test_usage_is_sent_only_when_asked_for():
    delta = Delta(usage=Usage(1, 2))
    quiet = schema.ChunkWriter(schema.new_head("chat", INFO), schema.StreamOptions(stream=True))
    assert quiet.chunks(delta) == []
    assert schema.ChunkWriter(schema.new_head("chat", INFO), FULL).chunks(delta)[0]["usage"]


def test_a_delta_with_content_and_usage_becomes_two_chunks():
    writer = schema.ChunkWriter(schema.new_head("chat", INFO), FULL)
    chunks = writer.chunks(Delta(text="a", num_tokens=1, finish_reason="stop", usage=Usage(1, 1)))
    assert [bool(chunk["choices"]) for chunk in chunks] == [True, False]


@given(st.lists(content_deltas, max_size=6), usages)
def test_openai_reads_whole_answers(deltas, usage):
    ended = [Delta(index, finish_reason="stop") for index in {delta.index for delta in deltas}]
    answer = schema.Answer()
    for delta in [*deltas, *ended, Delta(usage=usage)]:
        answer.add(delta)
    chat = schema.chat_response(schema.new_head("chat", INFO), answer)
    text = schema.completion_response(schema.new_head("text", INFO), answer)
    chat_read = ChatCompletion.model_validate(json.loads(json.dumps(chat)))
    text_read = Completion.model_validate(json.loads(json.dumps(text)))
    for read in (chat_read, text_read):
        assert read.usage.prompt_tokens_details.cached_tokens == usage.cached_tokens
        assert read.system_fingerprint == "mrss-abc"
        assert read.mrss == {"mixture": "knowledge+tone", "rows": 3}
    for choice in chat_read.choices:
        own = [delta for delta in deltas if delta.index == choice.index]
        assert choice.message.content == "".join(delta.text for delta in own)
        assert choice.message.provider_specific_fields == {"mrss": chat_read.mrss}
        entries = choice.logprobs.content if choice.logprobs else []
        tokens = [token.token for delta in own for token in told_in_chats(delta).logprobs]
        assert [bytes(entry.bytes) for entry in entries] == tokens
    for choice in text_read.choices:
        lengths = choice.logprobs and len(choice.logprobs.tokens)
        assert not choice.logprobs or len(choice.logprobs.text_offset) == lengths


def test_text_offsets_run_on_through_the_chunks():
    writer = schema.ChunkWriter(schema.new_head("text", INFO), FULL)
    pieces = ["é".encode()[:1], "é".encode()[1:] + b"a", b"bc"]
    offsets = []
    for piece in pieces:
        (chunk,) = writer.chunks(Delta(0, "", 1, (TokenLogprob(1, piece, -1.0),)))
        offsets += chunk["choices"][0]["logprobs"]["text_offset"]
    assert offsets == [0, 1, 2]


def test_minus_infinity_is_written_as_openai_does():
    token = TokenLogprob(1, b"a", float("-inf"), (TopLogprob(2, b"b", float("-inf")),))
    for kind in ("chat", "text"):
        writer = schema.ChunkWriter(schema.new_head(kind, INFO), FULL)
        (chunk,) = writer.chunks(Delta(0, "a", 1, (token,)))
        read = schema.read_chunk(json.loads(json.dumps(chunk, allow_nan=False)))
        assert (read.logprobs[0].logprob, read.logprobs[0].top[0].logprob) == (-9999.0, -9999.0)


@pytest.mark.parametrize(
    "chunk",
    [{}, {"choices": 5}, {"choices": [{}]}, {"choices": [{"index": 0, "text": "x"}]}],
)
def test_a_strange_chunk_is_our_error(chunk):
    with pytest.raises(EngineError, match="cannot be read"):
        schema.read_chunk(chunk)


@pytest.mark.parametrize(
    "error",
    [
        UnknownNameError("no state 'x'"),
        ContextLengthError("too long", param="messages"),
        QueueFullError("full", retry_after_s=2.5),
        EngineUnavailableError("gone"),
        EngineError("a defect"),
    ],
)
def test_errors_survive_a_stream(error):
    event = json.loads(json.dumps(schema.error_to_event(error)))
    rebuilt = schema.error_from_event(event)
    assert type(rebuilt) is type(error)
    assert (str(rebuilt), rebuilt.param) == (str(error), error.param)


def test_an_ordinary_chunk_is_no_error():
    writer = schema.ChunkWriter(schema.new_head("chat", INFO), FULL)
    assert schema.error_from_event(writer.chunks(Delta(0, "a", 1))[0]) is None


def test_only_a_full_queue_names_a_time():
    assert schema.error_headers(QueueFullError("full", retry_after_s=1.2)) == {"retry-after": "2"}
    assert schema.error_headers(MRSSError("x")) == {}


def test_admission_survives_the_headers():
    assert schema.info_from_headers(schema.info_to_headers(INFO)) == INFO
    with pytest.raises(EngineUnavailableError, match="not come from an mrss engine"):
        schema.info_from_headers({})
    newer = {**schema.info_to_headers(INFO), "x-mrss-protocol": "99"}
    with pytest.raises(EngineUnavailableError, match="protocol 99"):
        schema.info_from_headers(newer)


def test_model_lists_survive_the_wire_and_openai_reads_them():
    cards = [
        ModelCard("base", "base", "plain", 5, 4096),
        ModelCard("a-b", "mixture", "", 0, 0, ("tools",), "turn"),
    ]
    body = json.loads(json.dumps(schema.model_list(cards)))
    assert schema.read_model_list(body) == cards
    assert [Model.model_validate(item).id for item in body["data"]] == ["base", "a-b"]
    with pytest.raises(EngineError, match="cannot be read"):
        schema.read_model_list({"data": [{"id": "x"}]})


@pytest.mark.parametrize(
    "body",
    [
        {"\ud800": 1},
        {"mrss": {"\ud800": 1}},
        {"mrss": {"merge": "\ud800"}},
        {"messages": [{"role": "\ud800", "content": ""}]},
        {"messages": [{"role": "user", "content": [{"type": "\ud800"}]}]},
        {"n": "\ud800"},
        {"stop": "\ud800"},
        {"temperature": "\ud800"},
        {"logit_bias": {"\ud800": 1}},
        {"mrss_gatingweight": ["\ud800"]},
        {"mrss": {"sampling_order": "\ud800"}},
        {"mrss": {"weights": {"\ud800": 1}}},
        {"mrss": {"weights": {"tone": "\ud800"}}},
    ],
)
def test_an_error_about_half_a_surrogate_pair_can_be_sent(body):
    error = refusal({"model": "tone", "messages": [{"role": "user", "content": ""}]} | body)
    assert json.dumps(error.to_dict(), ensure_ascii=False).encode()
