"""Answers on the OpenAI wire. Oracles: exact round trips, and the `openai` package's own models."""

import json
import math
from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai_bodies import refusal, texts

from mrss_provider import openai_schema as schema
from mrss_provider.backend import (
    Delta,
    Embeddings,
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
    MRSSError,
    QueueFullError,
    UnknownNameError,
)

INFO = StreamInfo("knowledge+tone", 3, "mrss-abc", 7)


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
