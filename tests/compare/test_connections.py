"""The wire: what is sent to an OpenAI server and to LiteLLM's SDK, and what is read of answers."""

import asyncio
import json
import sys
import types

import httpx
import pytest

from mrss_provider.compare.calls import Call, CallError
from mrss_provider.compare.http import HttpConnection, parse_base_url
from mrss_provider.compare.sdk import SdkConnection
from mrss_provider.errors import ConfigError

CHAT = Call("tone", [{"role": "user", "content": "Hi"}], params={"top_p": 0.5}, seed=7)
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "cost": 0.5}
CHUNKS = [
    {"id": "c1", "system_fingerprint": "fp", "choices": [{"delta": {"role": "assistant"}}]},
    {"id": "c1", "choices": [{"delta": {"reasoning_content": "hm"}}]},
    {"id": "c1", "choices": [{"delta": {"content": "Hel"}}]},
    {"id": "c1", "choices": [{"delta": {"content": "lo"}, "finish_reason": None}]},
    {"id": "c1", "choices": [{"delta": {}, "finish_reason": "stop"}]},
    {"id": "c1", "choices": [], "usage": USAGE},
]


def events(*chunks):
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return ": a comment\n\n" + "".join(lines) + "data: [DONE]\n\n"


def pieces_of(connection, call):
    async def main():
        found = [piece async for piece in connection.stream(call)]
        await connection.aclose()
        return found

    return asyncio.run(main())


def served(respond, call=CHAT, key="sk-1"):
    requests = []

    def handle(request):
        requests.append(request)
        return respond(request)

    transport = httpx.MockTransport(handle)
    connection = HttpConnection("http://proxy:4000", key, transport=transport)
    return requests, lambda: pieces_of(connection, call)


def test_a_chat_is_sent_and_read_as_openai_has_it():
    headers = {"x-litellm-model-id": "tone-a", "x-litellm-call-id": "call"}
    requests, ask = served(lambda _: httpx.Response(200, text=events(*CHUNKS), headers=headers))
    pieces = ask()
    assert "".join(piece.text for piece in pieces) == "Hello"
    assert "".join(piece.reasoning for piece in pieces) == "hm"
    assert [p.finish_reason for p in pieces if p.finish_reason] == ["stop"]
    assert (pieces[0].model_id, pieces[0].call_id) == ("tone-a", "call")
    assert (pieces[-1].completion_tokens, pieces[-1].cost) == (2, 0.5)
    assert {p.fingerprint for p in pieces} == {None, "fp"}
    (request,) = requests
    assert str(request.url) == "http://proxy:4000/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer sk-1"
    assert json.loads(request.content) == {
        "model": "tone",
        "messages": CHAT.messages,
        "top_p": 0.5,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_text_is_continued_by_the_other_route():
    chunk = {"choices": [{"text": " upon", "finish_reason": "length"}]}
    call = Call("tone", prompt="Once")
    requests, ask = served(lambda _: httpx.Response(200, text=events(chunk)), call, key=None)
    assert "".join(piece.text for piece in ask()) == " upon"
    assert requests[0].url.path == "/v1/completions"
    assert "authorization" not in requests[0].headers
    assert "seed" not in json.loads(requests[0].content)


def refuse(request):
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("respond", "kind", "status", "said"),
    [
        (
            lambda _: httpx.Response(429, json={"error": {"message": "full", "type": "limit"}}),
            "HTTP 429",
            429,
            "full",
        ),
        (lambda _: httpx.Response(502, text="<h1>Bad</h1>"), "HTTP 502", 502, "<h1>Bad</h1>"),
        (lambda _: httpx.Response(200, text="data: {\n\n"), "BadEvent", None, "no JSON"),
        (
            lambda _: httpx.Response(200, text=events({"error": {"message": "died", "type": "x"}})),
            "x",
            None,
            "died",
        ),
        (refuse, "ConnectError", None, r"nobody answers at http://proxy:4000 \(refused\)"),
        (lambda _: httpx.Response(200, json={"choices": []}), "NoEvents", None, "no stream"),
        (
            lambda _: httpx.Response(200, text=events({"choices": [1]})),
            "BadEvent",
            None,
            "no chunk",
        ),
        (
            lambda _: httpx.Response(200, text=events({"choices": [{"text": [1]}]})),
            "BadEvent",
            None,
            r"text must not be \[1\]",
        ),
        (
            lambda _: httpx.Response(200, text=events({"id": 7, "choices": []})),
            "BadEvent",
            None,
            "id must not be 7",
        ),
        (
            lambda _: httpx.Response(200, text=events({"usage": {"completion_tokens": "3"}})),
            "BadEvent",
            None,
            "completion_tokens must not be '3'",
        ),
    ],
)
def test_what_goes_wrong_is_a_call_error(respond, kind, status, said):
    _, ask = served(respond)
    with pytest.raises(CallError, match=said) as error:
        ask()
    assert (error.value.kind, error.value.status) == (kind, status)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("https://h/openai", "https://h/openai"),
    ],
)
def test_a_base_url_without_a_path_means_v1(given, meant):
    assert parse_base_url(given) == meant


@pytest.mark.parametrize(
    "text", ["localhost:4000", "ftp://h", "http://", "http://h:port", "http://h?v=1", ""]
)
def test_no_url_is_refused(text):
    with pytest.raises(ConfigError, match="--base-url must be http://host:port"):
        parse_base_url(text)


class Chunk:
    def __init__(self, fields):
        self.model_dump = lambda: fields


class Answer:
    _hidden_params = {"additional_headers": {"llm_provider-x-litellm-model-id": "m1"}}  # noqa: RUF012

    def __init__(self):
        self.chunks = iter([*CHUNKS[:5], {"choices": [], "usage": {**USAGE, "cost": None}}])

    def __aiter__(self):
        return self

    async def __anext__(self):
        for chunk in self.chunks:
            return Chunk(chunk)
        raise StopAsyncIteration


def sdk(monkeypatch, **functions):
    """Put a LiteLLM in place that has these functions only; importing the real one takes long."""

    async def close():
        return None

    fake = types.SimpleNamespace(close_litellm_async_clients=close, **functions)
    monkeypatch.setitem(sys.modules, "litellm", fake)


def test_the_sdk_is_asked_once_without_retries_and_priced(monkeypatch):
    asked = []

    async def acompletion(**kwargs):
        asked.append(kwargs)
        return Answer()

    sdk(
        monkeypatch,
        acompletion=acompletion,
        cost_per_token=lambda model, prompt_tokens, completion_tokens: (0.25, 0.5),
    )
    pieces = pieces_of(SdkConnection(), CHAT)
    assert "".join(piece.text for piece in pieces) == "Hello"
    assert (pieces[0].model_id, pieces[-1].cost) == ("m1", 0.75)
    (kwargs,) = asked
    assert (kwargs["max_retries"], kwargs["seed"], kwargs["top_p"]) == (0, 7, 0.5)


def test_what_the_sdk_raises_is_a_call_error(monkeypatch):
    class NotFoundError(Exception):
        status_code = 404

    async def acompletion(**kwargs):
        raise NotFoundError("no such model")

    sdk(monkeypatch, acompletion=acompletion)
    with pytest.raises(CallError, match="no such model") as error:
        pieces_of(SdkConnection(), CHAT)
    assert (error.value.kind, error.value.status) == ("NotFoundError", 404)


def test_a_name_without_a_provider_is_told_how_to_write_it(monkeypatch):
    async def acompletion(**kwargs):
        raise ValueError("litellm.BadRequestError: LLM Provider NOT provided. Pass in ...")

    sdk(monkeypatch, acompletion=acompletion)
    with pytest.raises(CallError, match=r"'tone' names no provider .* write mrss/tone"):
        pieces_of(SdkConnection(), CHAT)
