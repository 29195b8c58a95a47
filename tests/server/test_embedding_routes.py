"""`/v1/embeddings` over a fake backend: keys, limits, clients that leave, engines that cannot."""

import asyncio
import json
from array import array

import pytest
from fakes import FakeBackend
from starlette.testclient import TestClient
from test_disconnect import post_and_hang_up

from mrss_provider.backend import Embeddings
from mrss_provider.config import ServerConfig
from mrss_provider.errors import QueueFullError
from mrss_provider.openai_schema import embeddings_pieces
from mrss_provider.server.app import create_app
from mrss_provider.server.auth import KeyRing
from mrss_provider.server.keys import Key, Limits, hash_of

BODY = {"model": "mrss/tone", "input": ["hi", "you"]}
KEY = "key-of-small-01234"
HEADERS = {"authorization": f"Bearer {KEY}"}


class EmbeddingBackend(FakeBackend):
    """Embeds every text as its length and a one; `error` is raised instead when set."""

    def __init__(self, num_tokens=50):
        super().__init__()
        self.num_tokens = num_tokens
        self.error = None
        self.hangs = False
        self.asked = []
        self.reached = asyncio.Event()
        self.was_cancelled = False

    async def embed(self, request):
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        if self.hangs:
            self.reached.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.was_cancelled = True
                raise
        vectors = tuple(array("f", [len(text), 1.0]) for text in request.inputs)
        return Embeddings(request.model, "print", vectors, self.num_tokens)


def client_of(backend, limits=None, **config):
    keys = [Key("small", hash_of(KEY), "user", limits or Limits())]
    app = create_app(backend, ServerConfig(**config), keys=KeyRing(fixed=keys))
    return TestClient(app, base_url="http://127.0.0.1:9000")


def test_vectors_come_in_the_order_of_the_inputs_and_count_as_prompt_tokens():
    backend = EmbeddingBackend()
    with client_of(backend, max_prompt_len=7, request_timeout_s=9.0) as client:
        assert client.post("/v1/embeddings", json=BODY).status_code == 401
        answer = client.post("/embeddings", json=BODY, headers=HEADERS)
    body = answer.json()
    assert body["data"] == [
        {"object": "embedding", "index": 0, "embedding": [2, 1]},
        {"object": "embedding", "index": 1, "embedding": [3, 1]},
    ]
    assert body["usage"] == {"prompt_tokens": 50, "total_tokens": 50}
    assert (body["object"], body["model"], body["system_fingerprint"]) == ("list", "tone", "print")
    (asked,) = backend.asked
    assert (asked.owner, asked.max_prompt_len, asked.timeout_s) == ("small", 7, 9.0)


def test_what_was_read_counts_against_a_keys_tokens_and_a_refusal_does_not():
    backend = EmbeddingBackend(num_tokens=400)
    with client_of(backend, Limits(tokens_per_minute=1000)) as client:

        def left():
            answer = client.post("/v1/embeddings", json=BODY, headers=HEADERS)
            assert answer.status_code == 200
            return int(answer.headers["x-ratelimit-remaining-tokens"])

        first, second = left(), left()
        assert 390 <= first - second <= 400
        backend.error = QueueFullError("full", retry_after_s=3)
        refused = client.post("/v1/embeddings", json=BODY, headers=HEADERS)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
        backend.error = None
        assert (
            client.post(
                "/v1/embeddings", json={**BODY, "input": "x" * 8000}, headers=HEADERS
            ).json()["error"]["code"]
            == "rate_limit_exceeded"
        )
        assert left() <= second


def test_who_hangs_up_ends_it():
    async def main():
        backend = EmbeddingBackend()
        backend.hangs = True
        sent = await post_and_hang_up(
            create_app(backend), BODY, backend.reached.wait, "/v1/embeddings"
        )
        assert backend.was_cancelled
        assert sent == []

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize", "/v1/detokenize"])
def test_an_engine_that_cannot_says_so(path):
    with client_of(FakeBackend()) as client:
        answer = client.post(path, json=BODY, headers=HEADERS)
    assert answer.status_code == 404
    assert "this engine" in answer.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_many_vectors_are_written_a_few_at_a_time(encoding):
    vector = array("f", [0.1, -1e-20, 3e-8])
    pieces = list(embeddings_pieces(Embeddings("a", "f", (vector,) * 500, 1), encoding))
    assert max(map(len, pieces)) < 300
    data = json.loads(b"".join(pieces))["data"]
    assert [item["index"] for item in data] == list(range(500))
    if encoding == "float":
        assert array("f", data[-1]["embedding"]) == vector
