"""The client before servers that misbehave: framing, broken answers, silence, nobody at all."""

import asyncio
import contextlib
import socket
import threading
from itertools import pairwise

import httpx
import pytest
from client_calls import REQUEST, collect, joined
from hypothesis import given
from hypothesis import strategies as st

from mrss_provider import client as client_module
from mrss_provider.backend import Delta, GenerateRequest, StreamInfo, Usage
from mrss_provider.client import Client
from mrss_provider.errors import (
    AuthenticationError,
    EngineError,
    EngineUnavailableError,
    NotFoundError,
    RequestTimeoutError,
)
from mrss_provider.http1 import Connection, _Body
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.server.run import _loop_factory

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
        ([b"HTTP/1.1 502 Bad\r\n\r\n<html>"], EngineUnavailableError, "no engine .* status 502"),
        ([b"HTTP/1.1 504 Late\r\n\r\n<html>"], RequestTimeoutError, "let it wait longer"),
        ([b"HTTP/1.1 500 Oh\r\n\r\n<html>"], EngineError, "what stands before .* status 500"),
        ([b"HTTP/1.1 401 No\r\n\r\n{}"], AuthenticationError, "what stands before .* status 401"),
        (
            [b"HTTP/1.1 301 Moved\r\nlocation: https://there/x\r\n\r\n"],
            EngineUnavailableError,
            "redirects to https://there/x; name that",
        ),
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
