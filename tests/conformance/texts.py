"""Completions and embeddings."""

from __future__ import annotations

import base64
import math
from array import array

import pytest
from conformance.feature import DRAWN, GREEDY, Ask, feature

# Completions.


@feature("completion", "Completions", "complete", short=True)
def complete(ask: Ask) -> None:
    reply = ask.complete(prompt="The lighthouse", **GREEDY)
    assert reply.text
    assert 0 < reply.usage["completion_tokens"] <= GREEDY["max_tokens"]


@feature("completion, streamed", "Completions", "complete_stream")
def complete_stream(ask: Ask) -> None:
    reply = ask.complete_stream(prompt="The lighthouse", **GREEDY)
    assert reply.num_chunks > 1
    assert reply.text == ask.complete(prompt="The lighthouse", **GREEDY).text


@feature("a list of prompts", "Completions", "complete")
def prompt_list(ask: Ask) -> None:
    prompts = ["The lighthouse", "Nice to"]
    together = ask.complete(prompt=prompts, **GREEDY)
    alone = [ask.complete(prompt=prompt, **GREEDY).text for prompt in prompts]
    assert alone[0] != alone[1]
    assert [choice.text for choice in together.choices] == alone


@feature("token ids as a prompt", "Completions", "complete")
def token_ids(ask: Ask) -> None:
    text = ask.complete(prompt=[300, 400, 500], **GREEDY)
    assert text.usage["prompt_tokens"] in (3, 4)


@feature("`logprobs` of a completion", "Completions", "complete")
def text_logprobs(ask: Ask) -> None:
    entries = ask.complete(prompt="The lighthouse", logprobs=2, **GREEDY).choices[0].logprobs
    assert 0 < len(entries) <= GREEDY["max_tokens"]
    assert all(len(entry["top_logprobs"]) >= 2 for entry in entries)


@feature("`echo`", "Completions", "complete")
def echo(ask: Ask) -> None:
    plain = ask.complete(prompt="The lighthouse", **GREEDY)
    echoed = ask.complete(prompt="The lighthouse", echo=True, **GREEDY)
    assert echoed.text == "The lighthouse" + plain.text


@feature("`echo` with `logprobs`: a given text scored", "Completions", "complete")
def scored(ask: Ask) -> None:
    asked = {"prompt": "The lighthouse is red.", "echo": True, "logprobs": 1}
    choice = ask.complete(**asked, temperature=0.0, max_tokens=0).choices[0]
    assert choice.text == "The lighthouse is red."
    assert choice.logprobs[0]["logprob"] is None
    assert all(entry["logprob"] < 0 for entry in choice.logprobs[1:])
    assert "".join(entry["token"] for entry in choice.logprobs) == choice.text


@feature("`best_of`", "Completions", "complete")
def best_of(ask: Ask) -> None:
    reply = ask.complete(prompt="The lighthouse", n=1, best_of=3, **DRAWN)
    assert len(reply.choices) == 1
    assert reply.usage["completion_tokens"] > DRAWN["max_tokens"]


# Embeddings.


def cosine(a: list[float], b: list[float]) -> float:
    """Return the cosine of two vectors."""
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@feature("embedding", "Embeddings", "embed", short=True)
def embedding(ask: Ask) -> None:
    texts = ["Where is the lighthouse?", "Where is the lighthouse?", "Nice to meet you."]
    vectors, usage = ask.embed(input=texts)
    assert all(math.isclose(math.hypot(*vector), 1.0, rel_tol=1e-3) for vector in vectors)
    assert cosine(vectors[0], vectors[1]) > 0.999 > cosine(vectors[0], vectors[2])
    assert usage is None or usage["prompt_tokens"] > 0


@feature("`encoding_format` base64", "Embeddings", "embed")
def embedding_base64(ask: Ask) -> None:
    (text,), _ = ask.embed(input="Hi", encoding_format="base64")
    (vector,), _ = ask.embed(input="Hi", encoding_format="float")
    assert isinstance(text, str)
    assert list(array("f", base64.b64decode(text))) == pytest.approx(vector, abs=1e-6)


@feature("`dimensions`", "Embeddings", "embed")
def embedding_dimensions(ask: Ask) -> None:
    (vector,), _ = ask.embed(input="Hi", dimensions=16)
    assert len(vector) == 16
    assert math.isclose(math.hypot(*vector), 1.0, rel_tol=1e-3)
