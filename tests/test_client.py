"""The client, against a real uvicorn in a thread and against servers that misbehave."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise

import httpx
import pytest
from fakes import (
    CARDS,
    FINGERPRINT,
    PROMPT_TOKENS,
    ROWS,
    SUMMARY,
    FakeBackend,
    Wait,
    serving,
    text,
    token_trace,
)
from hypothesis import given
from hypothesis import strategies as st

from mrss_provider import client as client_module
from mrss_provider.backend import (
    Delta,
    GenerateRequest,
    Message,
    MixtureOptions,
    StreamInfo,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    TopLogprob,
    Usage,
)
from mrss_provider.client import Client
from mrss_provider.config import ServerConfig
from mrss_provider.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
    RequestTimeoutError,
    UnknownNameError,
)
from mrss_provider.http1 import Connection, _Body
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.server.run import _loop_factory

REQUEST = GenerateRequest(
    "knowledge+tone",
    SamplingParams(temperature=0.5, stop=("\n",), seed=3, max_tokens=9),
    messages=(Message("user", "héllo 😀"),),
    mixture=MixtureOptions(weights={"tone": 0.25}, merge="linear"),
    timeout_s=30.0,
)


@pytest.fixture
def unix(tmp_path):
    return ServerConfig(socket=tmp_path / "s")


def client_of(config) -> Client:
    return Client(f"unix://{config.socket}")


async def collect(client, request=REQUEST):
    stream = await client.open(request)
    try:
        return stream.info, [delta async for delta in stream]
    finally:
        await stream.aclose()


def joined(deltas, index=0):
    return "".join(delta.text for delta in deltas if delta.index == index)


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        GenerateRequest("tone", SamplingParams(), prompt="plain", timeout_s=9),
        GenerateRequest("tone", SamplingParams(logprobs=True), prompt=(1, 2, 3), n=3, timeout_s=9),
    ],
)
def test_a_request_and_its_answer_arrive_as_they_were_sent(unix, request_):
    top = (TopLogprob(7, b"\xff", -2.0),)
    script = [Delta(0, "é😀", 2, (TokenLogprob(5, b"a", -0.5, top),) * 2), text("\n\ndata: x")]
    backend = FakeBackend(script)
    with serving(backend, unix):
        info, deltas = asyncio.run(collect(client_of(unix), request_))
    assert backend.requests == [request_]
    assert info == StreamInfo(backend.streams[0].info.mixture, ROWS, FINGERPRINT, PROMPT_TOKENS)
    for index in range(request_.n):
        own = [delta for delta in deltas if delta.index == index]
        assert joined(own, index) == "é😀\n\ndata: x"
        assert sum(delta.num_tokens for delta in own) == 3
        assert sum((delta.logprobs for delta in own), ()) == script[0].logprobs
        assert [delta.finish_reason for delta in own if delta.finish_reason] == ["stop"]
    assert deltas[-1] == Delta(usage=Usage(PROMPT_TOKENS, 3 * request_.n))


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_trace_arrives_as_it_was_sent(unix, is_chat):
    trace = tuple(token_trace(token) for token in (b" hi", b"\xe4", b"bytes:\n", b"</p>"))
    script = [
        Delta(text=" hi", num_tokens=2, trace=trace[:2]),
        Delta(text="x", num_tokens=2, trace=trace[2:], finish_reason="stop", trace_summary=SUMMARY),
    ]
    options = MixtureOptions(trace=True)
    asked = {"messages": (Message("user", "x"),)} if is_chat else {"prompt": "x"}
    request = GenerateRequest(
        "knowledge+tone", SamplingParams(), mixture=options, given=" hi", timeout_s=9.0, **asked
    )
    backend = FakeBackend(script)
    with serving(backend, unix):
        _, deltas = asyncio.run(collect(client_of(unix), request))
    assert backend.requests == [request]
    assert sum((delta.trace for delta in deltas), ()) == trace
    assert [delta.trace_summary for delta in deltas if delta.trace_summary] == [SUMMARY]


def test_a_delta_arrives_while_the_answer_still_runs(unix):
    wait = Wait()

    async def main():
        stream = await client_of(unix).open(REQUEST)
        first = await anext(stream)
        assert not wait.go.is_set()
        wait.go.set()
        return first, [delta async for delta in stream]

    with serving(FakeBackend([text("a"), wait, text("b")]), unix):
        first, rest = asyncio.run(main())
    assert (first.text, joined(rest)) == ("a", "b")


def test_admission_comes_before_the_first_token(unix):
    wait = Wait()

    async def main():
        stream = await client_of(unix).open(REQUEST)
        assert stream.info.rows == ROWS
        wait.go.set()
        return [delta async for delta in stream]

    with serving(FakeBackend([wait, text("b")]), unix):
        assert joined(asyncio.run(main())) == "b"


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_who_stops_reading_aborts_the_answer(unix, how):
    backend = FakeBackend([text("a"), Wait(), text("b")])

    async def main():
        stream = await client_of(unix).open(REQUEST)
        await anext(stream)
        reading = asyncio.create_task(collect_rest(stream))
        await asyncio.sleep(0)
        if how == "cancel":
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
        await stream.aclose()
        await stream.aclose()
        if how == "close":
            assert await reading == []
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    async def collect_rest(stream):
        return [delta async for delta in stream]

    with serving(backend, unix):
        asyncio.run(main())
        assert backend.streams[0].ended.wait(30)
    assert backend.streams[0].aborted


def test_closing_the_client_ends_its_streams(unix):
    async def main():
        client = client_of(unix)
        stream = await client.open(REQUEST)
        assert (await anext(stream)).text == "a"
        await client.aclose()
        with pytest.raises(EngineUnavailableError, match="client was closed"):
            await anext(stream)
        with pytest.raises(EngineUnavailableError, match="client is closed"):
            await client.open(REQUEST)

    backend = FakeBackend([text("a"), Wait()])
    with serving(backend, unix):
        asyncio.run(main())
        assert backend.streams[0].ended.wait(30)


def test_one_client_serves_several_loops(unix):
    client = client_of(unix)
    with serving(FakeBackend(), unix):
        for _ in range(2):
            assert joined(asyncio.run(collect(client))[1]) == "Hello, world"


def test_models_version_and_status_are_told(unix):
    async def main():
        client = client_of(unix)
        return await client.models(), await client.version(), await client.probe()

    with serving(FakeBackend(), unix):
        models, version, status = asyncio.run(main())
    assert models == CARDS
    assert (version.protocol, version.model, status) == (1, "fake", "ready")
    assert asyncio.run(client_of(unix).probe()) == "absent"


@pytest.mark.parametrize(
    "error",
    [
        UnknownNameError("no state 'x'", suggestions=["y"]),
        ContextLengthError("too long", param="messages"),
        QueueFullError("full", retry_after_s=7.0),
        EngineUnavailableError("draining"),
        RequestTimeoutError("late"),
    ],
)
@pytest.mark.parametrize("when", ["on admission", "in mid-answer"])
def test_errors_are_what_the_server_raised(unix, error, when):
    on_admission = when == "on admission"
    backend = FakeBackend([text("a"), error], open_error=error if on_admission else None)

    async def main():
        stream = await client_of(unix).open(REQUEST)
        read.append((await anext(stream)).text)
        await anext(stream)

    read = []
    with serving(backend, unix), pytest.raises(type(error)) as caught:
        asyncio.run(main())
    raised = caught.value
    assert (str(raised), raised.param) == (str(error), error.param)
    assert read == ([] if on_admission else ["a"])
    if on_admission and isinstance(error, QueueFullError):
        assert raised.retry_after_s == 7.0


def test_a_drained_server_refuses_new_requests_and_ends_the_running_ones(unix):
    wait = Wait()

    async def main(end):
        client = client_of(unix)
        stream = await client.open(REQUEST)
        await anext(stream)
        end(30.0)
        while await client.probe() != "busy":
            pass
        with pytest.raises(EngineUnavailableError, match="shutting down"):
            await client.open(REQUEST)
        wait.go.set()
        return [delta async for delta in stream]

    with serving(FakeBackend([text("a"), wait, text("b")]), unix) as end:
        assert joined(asyncio.run(main(end))) == "b"
    assert not unix.socket.exists()


def test_what_outlives_the_drain_is_told_so(unix):
    async def main(end):
        stream = await client_of(unix).open(REQUEST)
        await anext(stream)
        end(0.0)
        with pytest.raises(EngineUnavailableError, match="engine was closed"):
            await anext(stream)

    with serving(FakeBackend([text("a"), Wait()]), unix) as end:
        asyncio.run(main(end))


def test_a_lease_ends_with_the_server(unix):
    async def main(end):
        lease = await client_of(unix).lease()
        assert lease.is_open
        assert await lease.read() == b"held\n"
        end()
        assert await lease.read() == b""
        assert not lease.is_open

    with serving(FakeBackend(), unix) as end:
        asyncio.run(main(end))


def test_tcp_works_whatever_proxies_the_environment_names(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving(FakeBackend(), ServerConfig(port=port)):
        for address in (f"http://127.0.0.1:{port}", f"http://localhost:{port}/v1/"):
            assert joined(asyncio.run(collect(Client(address)))[1]) == "Hello, world"


@pytest.mark.parametrize("address", ["", "127.0.0.1:9000", "unix://rel", "http://", "ftp://x"])
def test_a_bad_address_is_a_configuration_error(address):
    with pytest.raises(ConfigError, match="http://host:port or unix:///"):
        Client(address)


def test_a_slow_reader_gets_everything(unix):
    pieces = [str(i) * 4000 for i in range(1000)]

    async def main():
        stream = await client_of(unix).open(REQUEST)
        received = [await anext(stream)]
        # The server writes on until both sockets and our buffer are full, then waits for us.
        while not stream._connection._is_paused:
            await asyncio.sleep(0)
        received += [delta async for delta in stream]
        return received

    with serving(FakeBackend([text(piece) for piece in pieces]), unix):
        assert joined(asyncio.run(main())) == "".join(pieces)


HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-mrss-protocol: 1\r\n"
    b"x-mrss-mixture: tone\r\nx-mrss-rows: 1\r\nx-mrss-fingerprint: f\r\n"
    b"x-mrss-prompt-tokens: 2\r\n"
)
CHUNK = (
    b'data: {"choices":[{"index":0,"delta":{"content":"a"},"num_tokens":1,"finish_reason":null}]}'
    b"\n\n"
)
DONE = b"data: [DONE]\n\n"


@contextlib.contextmanager
def raw_server(path, pieces, *, keeps_open=False):
    """Answer one connection with `pieces`, each in a write of its own."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer():
        peer, _ = listener.accept()
        with peer:
            peer.recv(65536)
            # A client that has heard enough hangs up.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for piece in pieces:
                    peer.sendall(piece)
                if keeps_open:
                    peer.recv(1)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield Client(f"unix://{path}", idle_timeout_s=0.05 if keeps_open else None)
    finally:
        thread.join()
        listener.close()


def chunked(*parts):
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [CHUNKED, chunked(CHUNK), chunked(CHUNK, DONE), b"0\r\n\r\n"],
        [bytes([byte]) for byte in CHUNKED + chunked(CHUNK + CHUNK + DONE, b"") + b"\r\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + chunked(b": ping\n\n", CHUNK, CHUNK, DONE)],
        [HEAD + b"content-length: %d\r\n\r\n" % (2 * len(CHUNK + DONE)), CHUNK * 2 + DONE],
        [HEAD + b"\r\n", CHUNK[:20], CHUNK[20:] + CHUNK[:5], CHUNK[5:] + DONE],
    ],
    ids=["chunked", "byte by byte", "interim and comment", "by length", "to the end"],
)
def test_every_framing_of_http_1_1_is_read(tmp_path, pieces):
    with raw_server(tmp_path / "s", pieces) as client:
        info, deltas = asyncio.run(collect(client))
    assert info == StreamInfo("tone", 1, "f", 2)
    assert joined(deltas) == "aa"
    assert sum(delta.num_tokens for delta in deltas) == 2


def test_what_comes_together_is_one_delta(tmp_path):
    finish = CHUNK.replace(b"null", b'"length"').replace(b'"a"', b'"b"')
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":3}}\n\n'
    body = chunked(CHUNK * 2 + finish + usage + DONE)
    with raw_server(tmp_path / "s", [CHUNKED + body]) as client:
        _, deltas = asyncio.run(collect(client))
    assert deltas == [Delta(0, "aab", 3, (), "length"), Delta(usage=Usage(1, 3))]


@pytest.mark.parametrize(
    ("pieces", "error", "words"),
    [
        ([], EngineUnavailableError, "broke off .*before an answer"),
        ([b"SSH-2.0-x\r\n\r\n"], EngineUnavailableError, "not HTTP/1.1"),
        ([b"HTTP/1.1 200 OK\r\nbad line\r\n\r\n"], EngineUnavailableError, "not HTTP/1.1"),
        ([b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000], EngineUnavailableError, "too long"),
        ([b"HTTP/1.1 200 OK\r\n\r\n"], EngineUnavailableError, "not come from an mrss engine"),
        ([b"HTTP/1.1 502 Bad\r\n\r\n<html>"], EngineError, "status 502"),
        ([b"HTTP/1.1 404 No\r\n\r\n<html>"], EngineUnavailableError, "not an mrss engine"),
        (
            [b'HTTP/1.1 404 No\r\n\r\n{"error": {"code": "not_found", "message": "no session"}}'],
            NotFoundError,
            "no session",
        ),
        (
            [HEAD.replace(b"protocol: 1", b"protocol: 2") + b"\r\n"],
            EngineUnavailableError,
            "speaks",
        ),
        ([CHUNKED, chunked(CHUNK)], EngineUnavailableError, "broke off .*in mid-answer"),
        ([CHUNKED, chunked(CHUNK), b"0\r\n\r\n"], EngineUnavailableError, "before its end"),
        ([HEAD + b"\r\n" + CHUNK], EngineUnavailableError, "before its end"),
        ([CHUNKED, b"zz\r\n"], EngineUnavailableError, "not HTTP/1.1"),
        ([CHUNKED, b"-5\r\n"], EngineUnavailableError, "not HTTP/1.1"),
        ([CHUNKED, b"1\r\nabc"], EngineUnavailableError, "without its end"),
        ([CHUNKED, chunked(b"data: {\n\n")], EngineError, "no JSON"),
        ([CHUNKED, chunked(b"data: {}\n\n")], EngineError, "cannot be read"),
        ([CHUNKED, chunked(b'data: {"error": "x"}\n\n')], EngineError, "an error"),
    ],
)
def test_a_broken_answer_is_never_taken_for_a_whole_one(tmp_path, pieces, error, words):
    with raw_server(tmp_path / "s", pieces) as client, pytest.raises(error, match=words):
        asyncio.run(collect(client))


def test_a_request_is_sent_once_on_a_connection_that_nobody_used_before(tmp_path):
    body = b'{"object": "list", "data": []}'
    kept = b"HTTP/1.1 200 OK\r\nconnection: keep-alive\r\ncontent-length: %d\r\n\r\n"
    requests = []

    async def answer(reader, writer):
        """Offer to keep the first connection; hang up on the second, whose request was read."""
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        if len(requests) == 1:
            writer.write(kept % len(body) + body)
            await writer.drain()
            # Another request on this connection would be seen here.
            requests.extend([rest] if (rest := await reader.read()) else [])
        writer.close()

    async def main():
        server = await asyncio.start_unix_server(answer, tmp_path / "s")
        client = Client(f"unix://{tmp_path / 's'}")
        assert await client.models() == []
        with pytest.raises(EngineUnavailableError, match="closed before an answer"):
            await client.models()
        server.close()
        await server.wait_closed()

    asyncio.run(main())
    assert len(requests) == 2


@pytest.mark.parametrize("loop_factory", [None, _loop_factory()])
def test_a_closed_connection_ends_though_a_fork_holds_a_copy(loop_factory):
    ours, peer = socket.socketpair()
    copy = ours.dup()

    async def main():
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, sock=ours)
        connection.close()
        connection.close()

    with copy, peer, asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
        peer.settimeout(5)
        assert peer.recv(1) == b""


def test_certificates_are_read_once(monkeypatch):
    made = []
    make = httpx.create_ssl_context
    monkeypatch.setattr(
        httpx, "create_ssl_context", lambda **kwargs: made.append(1) or make(**kwargs)
    )

    async def main(port):
        client = Client(f"https://127.0.0.1:{port}")
        for _ in range(2):
            with pytest.raises(EngineUnavailableError, match="no engine answers"):
                await client.models()

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        asyncio.run(main(closed.getsockname()[1]))
    assert len(made) == 1


def test_nobody_at_the_address_is_unavailable(tmp_path):
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    for path in (stale, tmp_path / "none"):
        with pytest.raises(EngineUnavailableError, match="no engine answers at unix://"):
            asyncio.run(Client(f"unix://{path}").open(REQUEST))


def test_silence_before_the_head_ends_at_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "_GRACE_S", 0.0)
    request = GenerateRequest("tone", SamplingParams(), prompt="x", timeout_s=0.05)
    with (
        raw_server(tmp_path / "s", [], keeps_open=True) as client,
        pytest.raises(RequestTimeoutError, match="did not answer in time"),
    ):
        asyncio.run(client.open(request))


def test_silence_within_an_answer_ends_after_the_idle_time(tmp_path):
    pieces = [CHUNKED, chunked(CHUNK)]
    with (
        raw_server(tmp_path / "s", pieces, keeps_open=True) as client,
        pytest.raises(RequestTimeoutError, match=r"no byte for 0\.05 s"),
    ):
        asyncio.run(collect(client))


def test_an_endless_answer_ends_at_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "_GRACE_S", 0.0)
    request = GenerateRequest("tone", SamplingParams(), prompt="x", timeout_s=0.05)
    pieces = [CHUNKED, chunked(CHUNK)]
    with raw_server(tmp_path / "s", pieces, keeps_open=True) as client:
        client._idle_timeout_s = None
        with pytest.raises(RequestTimeoutError, match=r"within 0\.0\d+ s"):
            asyncio.run(collect(client, request))


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    st.lists(st.integers(0, 300), max_size=6),
)
def test_any_split_of_a_chunked_body_has_the_same_content(parts, cuts):
    data = chunked(*parts) + b"0\r\n\r\n"
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    body = _Body(200, [(b"Transfer-Encoding", b"chunked")])
    pieces = []
    for start, end in pairwise(edges):
        assert not body.is_complete
        pieces += body.feed(data[start:end])
    assert b"".join(pieces) == b"".join(parts)
    assert body.is_complete


def test_the_client_loads_neither_torch_nor_a_server():
    code = (
        "import sys, mrss_provider.client, mrss_provider.autostart\n"
        "heavy = {'torch', 'litellm', 'starlette', 'uvicorn', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_half_a_character_is_refused_before_anything_is_sent(tmp_path):
    """Nobody is at the address, which would be another error."""
    request = GenerateRequest("tone", SamplingParams(), prompt="\udcff")
    with pytest.raises(InvalidRequestError, match="half of a surrogate pair"):
        asyncio.run(Client(f"unix://{tmp_path}/none").open(request))


def test_thoughts_and_calls_arrive_as_they_were_sent(unix):
    calls = (ToolCallDelta(0, "call_1", "clock"), ToolCallDelta(0, arguments='{"zone": "é"}'))
    script = [
        Delta(reasoning="Hm ", num_tokens=1),
        Delta(reasoning="é.", num_tokens=1),
        Delta(text="Yes.", num_tokens=1),
        *(Delta(tool_calls=(call,), num_tokens=1) for call in calls),
        Delta(num_tokens=1, finish_reason="tool_calls"),
        Delta(usage=Usage(PROMPT_TOKENS, 6, 0, 2)),
    ]
    request = replace(
        REQUEST,
        messages=(
            Message("user", "x"),
            Message("assistant", "", (ToolCall("c1", "clock", "{}"),)),
            Message("tool", "12:00", (), "c1"),
        ),
        tools=(Tool("clock", "Tells", {"type": "object"}, strict=True),),
        tool_choice=ToolChoice("required", "clock", parallel=False),
        thinking=True,
    )
    backend = FakeBackend(script)
    with serving(backend, unix):
        _, deltas = asyncio.run(collect(client_of(unix), request))
    assert [sent.tools for sent in backend.requests] == [request.tools]
    sent = backend.requests[0]
    assert (sent.messages, sent.tool_choice, sent.thinking) == (
        request.messages,
        request.tool_choice,
        True,
    )
    assert "".join(delta.reasoning for delta in deltas) == "Hm é."
    assert joined(deltas) == "Yes."
    assert sum((delta.tool_calls for delta in deltas), ()) == calls
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["tool_calls"]
    assert deltas[-1].usage == Usage(PROMPT_TOKENS, 6, 0, 2)
