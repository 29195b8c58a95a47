"""A server as a process: how signals end it, whose a socket is, and what a bad flag says."""

import asyncio
import contextlib
import fcntl
import signal
import socket
import subprocess
import sys

import pytest
from engine_place import COMMAND, ENDLESS, own_place, read_on

from mrss_provider.client import Client
from mrss_provider.config import ServerConfig
from mrss_provider.errors import ConfigError, EngineUnavailableError
from mrss_provider.server.run import Listener


@pytest.fixture
def place():
    with own_place() as found:
        yield found


def test_sigterm_ends_an_engine_with_status_0(place):
    path = place.folder / "s"
    flags = ["--socket", str(path), "--idle-exit-s", "0"]
    process = subprocess.Popen([*COMMAND, *flags], env=place.env)

    async def main():
        client = Client(f"unix://{path}")
        while await client.probe() != "ready":
            assert process.poll() is None
        stream = await client.open(ENDLESS)
        await anext(stream)
        process.terminate()
        with pytest.raises(EngineUnavailableError, match="engine was closed"):
            await read_on(stream)

    with process:
        asyncio.run(main())
        assert process.wait(30) == 0
    assert not path.exists()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_an_engine_at_once(place, sig):
    path = place.folder / "s"
    flags = ["--socket", str(path), "--idle-exit-s", "0"]
    process = subprocess.Popen([*COMMAND, *flags], env=place.env | {"FAKE_DRAIN_S": "1000"})

    async def main():
        client = Client(f"unix://{path}")
        while await client.probe() != "ready":
            assert process.poll() is None
        stream = await client.open(ENDLESS)
        await anext(stream)
        process.send_signal(sig)
        while await client.probe() != "busy":
            assert process.poll() is None
        process.send_signal(sig)
        with pytest.raises(EngineUnavailableError, match="broke off"):
            await read_on(stream)

    try:
        asyncio.run(main())
        assert process.wait(30) == 128 + sig
    finally:
        process.kill()
        process.wait()
    assert not path.exists()


def test_no_other_server_looks_at_a_socket_between_its_bind_and_its_listen(place, monkeypatch):
    path = place.folder / "s"
    looked = []

    class Watched(socket.socket):
        def listen(self, *backlog):
            # Now it looks like a dead server's, which another server would remove.
            with open(f"{path}.lock") as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            looked.append(path.exists())
            super().listen(*backlog)

    monkeypatch.setattr("mrss_provider.server.run.socket.socket", Watched)
    with contextlib.closing(Listener(ServerConfig(socket=path))):
        assert looked == [True]
        with pytest.raises(ConfigError, match="a server listens on"):
            Listener(ServerConfig(socket=path))
    assert not path.exists()


@pytest.mark.slow
def test_a_second_server_on_a_socket_says_so_and_leaves_it_alone(place):
    path = place.folder / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        flags = ["--socket", str(path), "--port", "1"]
        second = subprocess.run(
            [sys.executable, "-m", "mrss_provider.server", *flags],
            env=place.env,
            capture_output=True,
            text=True,
            check=False,
        )
    assert second.returncode == 1
    last = second.stderr.strip().splitlines()[-1]
    assert last.startswith(f"cannot listen on unix://{path} (a server listens on")
    assert path.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(
            ["--port", "x"], "MRSS_PORT must be an integer, got 'x'", marks=pytest.mark.slow
        ),
        (["--dtype", "x"], "dtype must"),
    ],
)
@pytest.mark.slow
def test_a_bad_flag_is_one_sentence_and_status_1(flags, words):
    run = subprocess.run(
        [sys.executable, "-m", "mrss_provider.server", *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert words in run.stderr.strip().splitlines()[-1]
    assert "Traceback" not in run.stderr
