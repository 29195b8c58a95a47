"""The client, against a real uvicorn in a thread."""

import asyncio
import contextlib
import subprocess
import sys
from dataclasses import replace

import pytest
from client_calls import REQUEST, collect, joined
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
from ports import free_port

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
    EngineUnavailableError,
    InvalidRequestError,
    QueueFullError,
    RequestTimeoutError,
    UnknownNameError,
)
from mrss_provider.sampling_params import SamplingParams


@pytest.fixture
def unix(tmp_path):
    return ServerConfig(socket=tmp_path / "s")


def client_of(config) -> Client:
    return Client(f"unix://{config.socket}")


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
    port = free_port()
    with serving(FakeBackend(), ServerConfig(port=port)):
        for address in (f"http://127.0.0.1:{port}", f"http://localhost:{port}/v1/"):
            assert joined(asyncio.run(collect(Client(address)))[1]) == "Hello, world"


@pytest.mark.parametrize(
    "address",
    [
        *(
            "",
            "127.0.0.1:9000",
            "unix://rel",
            "http://",
            "ftp://x",
            "http://x?v=1",
            "http://x/v1#a",
        ),
        *("http://127.0.0.1:99999", "http://a b:9000", "http://a:9000\n"),
    ],
)
def test_a_bad_address_is_a_configuration_error(address):
    with pytest.raises(ConfigError, match="http://host:port or unix:///"):
        Client(address)


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="a key goes into `api_key`") as caught:
        Client("https://user:hush@engine:9000")
    assert "hush" not in caught.value.message


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
