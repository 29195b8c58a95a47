"""A client that does not read: what waits for it is bounded, and it does not stay for ever."""

import asyncio
import contextlib
import json
import socket
import threading

import pytest
from fakes import FakeBackend, FakeStream, serving

from mrss_provider.backend import Delta, StreamInfo
from mrss_provider.config import ServerConfig

PIECE = "x" * 10_000
# The kernel's buffers, uvicorn's, and a piece on its way.
BOUND = 2 << 20
WHOLE = 1 << 30


class Flood(FakeStream):
    """Has a piece whenever it is asked for one, up to a gigabyte.

    Attributes:
        num_taken: pieces that were taken.
    """

    def __init__(self) -> None:
        super().__init__(StreamInfo("tone", 1, "f", 1), [])
        self.num_taken = 0

    async def __anext__(self) -> Delta:
        if self.num_taken * len(PIECE) > WHOLE:
            raise StopAsyncIteration
        self.num_taken += 1
        await asyncio.sleep(0)
        return Delta(text=PIECE, num_tokens=1)

    async def aclose(self) -> None:
        self.ended.set()


class FloodBackend(FakeBackend):
    """Every answer is a flood."""

    async def open(self, request) -> Flood:
        self.streams.append(Flood())
        return self.streams[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(params=["tcp", "unix"])
def config(request, tmp_path) -> ServerConfig:
    where = {"port": free_port()} if request.param == "tcp" else {"socket": tmp_path / "s"}
    return ServerConfig(stall_s=0.8, **where)


def connect(config) -> socket.socket:
    family = socket.AF_INET if config.socket is None else socket.AF_UNIX
    client = socket.socket(family, socket.SOCK_STREAM)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(30)
    client.connect(str(config.socket) if config.socket else (config.host, config.port))
    return client


def ask(client, *, stream=True) -> None:
    body = {"model": "tone", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}"
    client.sendall(f"{head}\r\ncontent-type: application/json\r\n\r\n".encode() + data)


def test_a_client_that_does_not_read_is_dropped_and_holds_little_until_then(config, caplog):
    backend = FloodBackend()
    with serving(backend, config), connect(config) as client:
        ask(client)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        assert backend.streams[0].ended.wait(20)
        assert backend.streams[0].num_taken * len(PIECE) < BOUND
        # What was written before may still come; then the connection is gone.
        with contextlib.suppress(ConnectionResetError):
            while client.recv(1 << 20):
                pass
    assert "a client took nothing for 0.8 s and is dropped" in caplog.text


@pytest.mark.slow
def test_a_client_that_reads_slowly_is_served_for_as_long_as_it_reads(config, caplog):
    backend = FloodBackend()
    pause = threading.Event()
    with serving(backend, config), connect(config) as client, client.makefile("rb") as reader:
        ask(client)
        # Twice the time that a write may take.
        for _ in range(16):
            pause.wait(0.1)
            assert len(reader.read(1 << 16)) == 1 << 16
        assert not backend.streams[0].ended.is_set()
    assert backend.streams[0].ended.wait(20)
    assert "is dropped" not in caplog.text


def test_a_stalled_client_does_not_keep_others_waiting(config):
    backend = FloodBackend()
    with serving(backend, config), connect(config) as stalled, connect(config) as other:
        ask(stalled)
        ask(other)
        received = 0
        while received < 1 << 20:
            received += len(other.recv(1 << 20))
