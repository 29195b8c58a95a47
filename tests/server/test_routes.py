"""The routes over a fake backend. Oracle: the `openai` package reads every answer."""

import asyncio
import json

import pytest
from fakes import FINGERPRINT, PROMPT_TOKENS, ROWS, FakeBackend, text
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.testclient import TestClient

from mrss_provider.backend import Delta, TokenLogprob
from mrss_provider.config import ServerConfig
from mrss_provider.errors import (
    ContextLengthError,
    EngineUnavailableError,
    QueueFullError,
    RequestTimeoutError,
    UnknownNameError,
)
from mrss_provider.openai_schema import parse_chat_request
from mrss_provider.server.app import create_app

CHAT = {"model": "mrss/knowledge+tone", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "mrss/knowledge+tone", "prompt": "hi"}
MRSS = {"mixture": "knowledge+tone", "rows": ROWS}


def client_of(backend, **config) -> TestClient:
    app = create_app(backend, ServerConfig(**config), model="fake")
    return TestClient(app, base_url="http://127.0.0.1:9000")


def events_of(response) -> list:
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    bodies = [part.removeprefix("data: ") for part in parts]
    return [body if body == "[DONE]" else json.loads(body) for body in bodies]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions", "/v1/completions"])
def test_a_chat_is_answered(path):
    backend = FakeBackend()
    with client_of(backend) as client:
        response = client.post(path, json=CHAT)
    answer = ChatCompletion.model_validate(response.json())
    assert answer.choices[0].message.content == "Hello, world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.provider_specific_fields == {"mrss": MRSS}
    assert (answer.model, answer.system_fingerprint) == ("knowledge+tone", FINGERPRINT)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, 3)
    assert response.headers["x-mrss-mixture"] == "knowledge+tone"
    assert backend.requests[0].model == "knowledge+tone"
    assert backend.streams[0].ended.is_set()


def test_a_chat_streams():
    with client_of(FakeBackend()) as client:
        response = client.post(
            "/v1/chat/completions",
            json={**CHAT, "stream": True, "stream_options": {"include_usage": True}},
        )
    *events, done = events_of(response)
    chunks = [ChatCompletionChunk.model_validate(event) for event in events]
    assert done == "[DONE]"
    contents = [c.choices[0].delta.content for c in chunks[:-1]]
    assert "".join(contents) == "Hello, world"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3
    assert events[0]["mrss"] == MRSS


def test_without_being_asked_a_stream_tells_no_usage():
    with client_of(FakeBackend()) as client:
        response = client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    *events, done = events_of(response)
    assert done == "[DONE]"
    assert not any("usage" in event for event in events)


@pytest.mark.parametrize("path", ["/v1/completions", "/completions"])
def test_prompts_are_blocks_of_choices(path):
    backend = FakeBackend(lambda request: [text(f"{request.prompt!r}")])
    body = {**TEXT, "prompt": ["a", [1, 2]], "n": 2}
    with client_of(backend) as client:
        answer = Completion.model_validate(client.post(path, json=body).json())
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices] == ["'a'", "'a'", "(1, 2)", "(1, 2)"]
    assert answer.usage.prompt_tokens == 2 * PROMPT_TOKENS
    assert answer.usage.completion_tokens == 4


def test_prompts_stream_side_by_side():
    backend = FakeBackend(lambda request: [text(request.prompt), text("!")])
    body = {**TEXT, "prompt": ["a", "b"], "n": 2, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with client_of(backend) as client:
        *events, done = events_of(client.post("/v1/completions", json=body))
    assert done == "[DONE]"
    texts = dict.fromkeys(range(4), "")
    finished = set()
    for event in events[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        finished |= {choice["index"]} if choice["finish_reason"] else set()
    assert texts == {0: "a!", 1: "a!", 2: "b!", 3: "b!"}
    assert finished == {0, 1, 2, 3}
    assert events[-1]["usage"]["completion_tokens"] == 8
    assert all(stream.ended.is_set() and not stream.aborted for stream in backend.streams)


def test_logprobs_come_in_the_form_of_the_route():
    delta = Delta(0, "a", 1, (TokenLogprob(5, b"a", -0.5),))
    with client_of(FakeBackend([delta])) as client:
        chat = client.post("/v1/chat/completions", json={**CHAT, "logprobs": True}).json()
        plain = client.post("/v1/completions", json={**TEXT, "logprobs": 0}).json()
    entry = ChatCompletion.model_validate(chat).choices[0].logprobs.content[0]
    assert (entry.token, entry.logprob) == ("a", -0.5)
    assert Completion.model_validate(plain).choices[0].logprobs.token_logprobs == [-0.5]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnknownNameError("no state 'x'"), 400),
        (ContextLengthError("too long"), 400),
        (RequestTimeoutError("late"), 408),
        (QueueFullError("full", retry_after_s=2), 429),
        (EngineUnavailableError("gone"), 503),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_known_on_admission_has_a_status(error, status, stream):
    with client_of(FakeBackend(open_error=error)) as client:
        response = client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert response.status_code == status
    assert response.json() == error.to_dict()
    assert response.headers.get("retry-after") == {429: "2", 503: "1"}.get(status)


def test_a_refused_prompt_closes_those_before_it():
    def script(request):
        if request.prompt == "b":
            raise QueueFullError("full")
        return [text("x")]

    backend = FakeBackend(script)
    with client_of(backend) as client:
        response = client.post("/v1/completions", json={**TEXT, "prompt": ["a", "b"]})
    assert response.status_code == 429
    assert [stream.aborted for stream in backend.streams] == [True]


def test_an_error_after_content_ends_the_events():
    backend = FakeBackend([text("a"), RequestTimeoutError("too slow")])
    with client_of(backend) as client:
        streamed = client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        whole = client.post("/v1/chat/completions", json=CHAT)
    first, last = events_of(streamed)
    assert first["choices"][0]["delta"]["content"] == "a"
    assert last["error"] == {**RequestTimeoutError("too slow").to_dict()["error"], "status": 408}
    assert whole.status_code == 408
    assert whole.json()["error"]["message"] == "too slow"


def test_a_defect_is_hidden_but_logged(caplog):
    backend = FakeBackend([text("a"), ZeroDivisionError("secret")])
    with client_of(backend) as client:
        *_, last = events_of(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    assert last["error"]["status"] == 500
    assert "secret" not in str(last)
    assert "secret" in caplog.text


def test_a_defect_of_a_whole_answer_is_hidden_too():
    app = create_app(FakeBackend([ZeroDivisionError("secret")]), ServerConfig())
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        response = client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["code"] == "internal_error"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "no JSON"),
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "-Infinity"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b"9" * 10_000, "no JSON"),
        (b"[]", "JSON object"),
    ],
)
def test_bodies_that_are_no_request_are_refused(body, words):
    with client_of(FakeBackend()) as client:
        response = client.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_read(media_type):
    with client_of(FakeBackend()) as client:
        response = client.post(
            "/v1/chat/completions", content=b"{}", headers={"content-type": media_type}
        )
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(("length", "is_apart"), [(100, False), (100_000, True)])
def test_only_a_long_body_is_parsed_beside_the_event_loop(monkeypatch, length, is_apart):
    seen = []

    def parse(body):
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            seen.append(True)
        else:
            seen.append(False)
        return parse_chat_request(body)

    monkeypatch.setattr("mrss_provider.server.app.parse_chat_request", parse)
    chat = {**CHAT, "messages": [{"role": "user", "content": "x" * length}]}
    with client_of(FakeBackend()) as client:
        assert client.post("/v1/chat/completions", json=chat).status_code == 200
        worse = client.post("/v1/chat/completions", json={**chat, "top_p": 7})
    assert seen == [is_apart, is_apart]
    assert (worse.status_code, worse.json()["error"]["param"]) == (400, "top_p")


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 400), ("br", 400), ("identity", 200)])
def test_a_compressed_body_is_refused_as_such(encoding, status):
    body = json.dumps(CHAT).encode()
    headers = {"content-type": "application/json", "content-encoding": encoding}
    with client_of(FakeBackend()) as client:
        response = client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == status
    if status == 400:
        assert response.json()["error"]["param"] == "content-encoding"
        assert encoding in response.json()["error"]["message"]


def test_a_large_body_is_refused_by_its_announced_length():
    with client_of(FakeBackend(), max_body_bytes=1024) as client:
        response = client.post("/v1/chat/completions", json={"x": "y" * 2000})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"


def test_a_large_body_is_refused_before_it_is_read_whole():
    sent = []

    def endless():
        while True:
            sent.append(1)
            assert len(sent) < 1000
            yield b" " * 512

    app = create_app(FakeBackend(), ServerConfig(max_body_bytes=1024))
    body = endless()

    async def receive():
        return {"type": "http.request", "body": next(body), "more_body": True}

    status, _ = call(app, "POST", "/v1/chat/completions", receive)
    assert status == 413
    assert len(sent) == 3


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", "/v1/chat/completions", 405), ("OPTIONS", "/v1/models", 405)],
)
def test_wrong_routes_have_openai_errors_and_no_cors(method, path, status):
    with client_of(FakeBackend()) as client:
        response = client.request(method, path, headers={"origin": "http://evil.example"})
    assert response.status_code == status
    assert path in response.json()["error"]["message"]
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", ["/v1/models", "/models"])
def test_models_are_listed_and_shown(path):
    with client_of(FakeBackend()) as client:
        # `GET /models` is RWKV-Infer's list.
        listed = client.get("/v1/models").json()
        shown = [client.get(f"{path}/{name}") for name in ("tone", "mrss/tone", "none")]
    assert [Model.model_validate(item).id for item in listed["data"]] == [
        "base",
        "knowledge",
        "tone",
    ]
    assert [response.status_code for response in shown] == [200, 200, 404]
    assert shown[0].json() == shown[1].json() == listed["data"][2]
    assert shown[2].json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", ["/v1/responses", "/messages", "/v1/audio/speech"])
def test_who_asks_for_a_route_that_is_not_here_is_told_where_to_look(path):
    hint = "GET /openapi.json" if "audio" in path else "a LiteLLM proxy before this server has it"
    with client_of(FakeBackend()) as client:
        error = client.post(path, json={}).json()["error"]
    assert error["message"].startswith(f"there is no POST {path} here; {hint}")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:9000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:9000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:9000", 403),
        ("", 403),
    ],
)
def test_a_local_server_answers_to_local_names_only(host, status):
    with client_of(FakeBackend()) as client:
        response = client.get("/health", headers={"host": host})
    assert response.status_code == status
    assert ("let a proxy before it send Host: localhost" in response.text) is (status == 403)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200),
        ("https://page.example", 403),
        ("http://localhost.page.example", 403),
        ("null", 403),
        ("https://friend.example", 200),
    ],
)
def test_a_page_of_another_origin_changes_nothing(origin, status):
    with client_of(FakeBackend(), cors_origins="https://friend.example") as client:
        headers = {"origin": origin}
        assert client.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == status
        # What it reads, its browser keeps from it.
        assert client.get("/health", headers=headers).status_code == 200


def test_a_public_or_unix_server_checks_no_names(tmp_path):
    for config in ({"host": "0.0.0.0"}, {"socket": tmp_path / "s"}):
        with client_of(FakeBackend(), **config) as client:
            assert client.get("/health", headers={"host": "any.example"}).status_code == 200


def test_requests_without_a_timeout_get_the_servers():
    backend = FakeBackend()
    with client_of(backend, request_timeout_s=12.0) as client:
        client.post("/v1/chat/completions", json=CHAT)
        client.post("/v1/chat/completions", json={**CHAT, "timeout": 3})
    assert [request.timeout_s for request in backend.requests] == [12.0, 3.0]


def test_the_version_tells_who_answers():
    with client_of(FakeBackend()) as client:
        body = client.get("/version").json()
    assert body["protocol"] == 1
    assert body["model"] == "fake"
    assert set(body) == {"protocol", "version", "pid", "model", "playground"}


def call(app, method, path, receive):
    """Call an ASGI app with a hand-made `receive`; return status and body."""
    import asyncio

    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }
    asyncio.run(app(scope, receive, send))
    status = next((m["status"] for m in sent if m["type"] == "http.response.start"), None)
    return status, b"".join(m.get("body", b"") for m in sent)
