"""What a recorder says of streams, against a server whose every write is known."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import raw_streams
from raw_streams import Recorder, count_tokens, first_token_s, floor, write_in_time

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
BEAT_S = 2e-3
NUM_BEATS = 25
NUM_STREAMS = 3


def test_a_recorder_notes_every_token_and_none_before_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        recorder = Recorder(path, ["{}"] * NUM_STREAMS)
        streams = [listener.accept()[0] for _ in range(NUM_STREAMS)]
    with recorder:
        for stream in streams:
            stream.sendall(HEAD)
        recorder.wait_running()
        begun = write_in_time(streams, BEAT_S, NUM_BEATS)
        tape = recorder.stop()
        ended = time.monotonic()
    for stream in streams:
        stream.close()
    for arrivals in tape.arrivals:
        written = [begun + beat * BEAT_S for beat in range(NUM_BEATS)]
        came = [when for when, tokens in arrivals for _ in range(tokens)]
        assert len(came) == NUM_BEATS
        assert all(a <= b <= ended for a, b in zip(written, came, strict=True))


def test_tokens_are_counted_by_what_events_say() -> None:
    events = [b'{"num_tokens":2}\n\n{"num_tokens":13}\n\n', b"head", b'{"num_tokens":0}', b'"x":4']
    assert count_tokens([(float(i), event) for i, event in enumerate(events)]) == [(0.0, 15)]


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Path]:
    """A server that takes connections and never says a word."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        yield tmp_path / "s"


def test_a_recorder_of_a_silent_server_ends(
    silent: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Recorder(silent, ["{}"] * 2, wait_s=0.2) as recorder:
        with pytest.raises(SystemExit, match="the streams did not begin"):
            recorder.wait_running()
        assert "2 of 2 streams brought nothing within 0.2 s\n" in capfd.readouterr().err


def test_a_request_to_a_silent_server_ends(silent: Path) -> None:
    with pytest.raises(SystemExit, match=r"the server was not done within 0\.1 s"):
        first_token_s(silent, "{}", 0.1)


def test_a_request_ends_where_nobody_is_and_where_a_server_never_does(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(SystemExit, match="the server cannot be reached: No such file"):
        first_token_s(path, "{}", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def chatter() -> None:
            connection = listener.accept()[0]
            with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while True:
                    connection.sendall(b": still here\n\n" * 1000)

        thread = threading.Thread(target=chatter)
        thread.start()
        with pytest.raises(SystemExit, match=r"the server was not done within 0\.1 s"):
            first_token_s(path, "{}", 0.1)
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_the_floor_of_a_recorder_that_stops_ends(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Stopped(Recorder):
        def __init__(self, path: Path, bodies: list[str], wait_s: float) -> None:
            super().__init__(path, bodies, wait_s)
            os.kill(self._child.pid, number)

    monkeypatch.setattr(raw_streams, "Recorder", Stopped)
    with pytest.raises(SystemExit, match=r"the recorder|handed over"):
        floor(2, 1e-3, 0.1, wait_s=0.2)
