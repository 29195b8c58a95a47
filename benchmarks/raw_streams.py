"""Streams of tokens read straight from their sockets, by a process that does nothing else.

When bytes came is noted, and what they say is looked at afterwards: with 32 streams of 600 tokens a
second that is a sixth of a core, where a client that parses what it reads takes half of one and is
late whenever something comes in between. `floor` tells what this one finds where a server writes at
exact times.

The process is this file, run by `Recorder`: it takes requests from stdin and reads their streams
until stdin ends. Nothing here waits for ever: where the other side stops, it ends with a sentence.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Self

from streams import Gaps, Tape

# For streams to begin, and for those that were read to be handed over.
WAIT_S = 60.0
_TOKENS = re.compile(rb'"num_tokens":(\d+)')
_EVENT = b'data: {"choices":[{"index":0,"text":" of","finish_reason":null}],"num_tokens":1}\n\n'
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
# Sleeping wakes up late by less than this; the rest is spun away.
_LATE_S = 5e-4


class Recorder:
    """A process that sends requests to a server and reads their streams until `stop`.

    Args:
        path: the server's Unix socket.
        bodies: JSON of the requests; each answer is a stream of events with `num_tokens`.
        wait_s: for all streams to begin, and for those that were read to be handed over.
    """

    def __init__(self, path: Path, bodies: Sequence[str], wait_s: float = WAIT_S) -> None:
        self._wait_s = wait_s
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(path), str(wait_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stdin.write(json.dumps(list(bodies)) + "\n")
        self._stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self._child.kill()
        self._child.communicate()

    def wait_running(self) -> None:
        """Return when every stream has brought something; exits where one could not."""
        assert self._child.stdout is not None
        if self._child.stdout.readline() != "running\n":
            sys.exit("the streams did not begin")

    def stop(self) -> Tape:
        """Close the streams; return what came on them."""
        try:
            said, _ = self._child.communicate(timeout=self._wait_s)
        except subprocess.TimeoutExpired:
            sys.exit(f"what came on the streams was not handed over within {self._wait_s:g} s")
        if self._child.returncode:
            sys.exit("a stream ended before it was stopped")
        return Tape.of(json.loads(said))

    @property
    def _stdin(self) -> IO[str]:
        assert self._child.stdin is not None
        return self._child.stdin


def first_token_s(path: Path, body: str, limit_s: float) -> float:
    """Send a request and read its answer; return the seconds until its first token came.

    Exits where the whole answer takes more than `limit_s`.
    """
    request = _request(body)
    begun = time.monotonic()
    first: float | None = None
    came = b""
    with socket.socket(socket.AF_UNIX) as connection, _ending("the server", limit_s):
        connection.settimeout(limit_s)
        connection.connect(str(path))
        connection.sendall(request)
        while data := connection.recv(1 << 16):
            came += data
            if first is None and _TOKENS.search(came):
                first = time.monotonic()
            # One that goes on and on is too late as well.
            if time.monotonic() > begun + limit_s:
                raise TimeoutError
    if first is None:
        sys.exit(f"the server sent no token: {came[:500]!r}")
    return first - begun


def floor(num_streams: int, beat_s: float, seconds: float, wait_s: float = WAIT_S) -> Gaps:
    """Return the gaps that a recorder finds where a server writes every `beat_s` seconds.

    Exits where the recorder stops reading for `wait_s` seconds, or ends.
    """
    with tempfile.TemporaryDirectory(prefix="mrss") as folder:
        path = Path(folder) / "s"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(num_streams)
            listener.settimeout(wait_s)
            recorder = Recorder(path, ["{}"] * num_streams, wait_s)
            with recorder, contextlib.ExitStack() as stack, _ending("the recorder", wait_s):
                streams = [stack.enter_context(listener.accept()[0]) for _ in range(num_streams)]
                for stream in streams:
                    stream.settimeout(wait_s)
                    stream.sendall(_HEAD)
                recorder.wait_running()
                begun = write_in_time(streams, beat_s, max(2, int(seconds / beat_s)))
                tape = recorder.stop()
    return Gaps.within(tape, begun, float("inf"))


@contextlib.contextmanager
def _ending(who: str, limit_s: float) -> Iterator[None]:
    """Exit where a socket says that `who` is at its other end no more, or does nothing."""
    try:
        yield
    except TimeoutError:
        sys.exit(f"{who} was not done within {limit_s:g} s")
    except OSError as exc:
        sys.exit(f"{who} cannot be reached: {exc.strerror or exc}")


def write_in_time(streams: Sequence[socket.socket], beat_s: float, num_beats: int) -> float:
    """Write an event of one token to all streams at each beat; return when the first one was."""
    begun = time.monotonic() + beat_s
    for beat in range(num_beats):
        due = begun + beat * beat_s
        time.sleep(max(0.0, due - time.monotonic() - _LATE_S))
        while time.monotonic() < due:
            pass
        for stream in streams:
            stream.sendall(_EVENT)
    return begun


def read_streams(
    path: Path, bodies: Sequence[str], control: IO[str], wait_s: float
) -> list[list[tuple[float, bytes]]]:
    """Send requests, read their streams until `control` ends; return what came on each, and when.

    Prints `running` once something has come on all; exits where that takes more than `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    arrivals: list[list[tuple[float, bytes]]] = [[] for _ in bodies]
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for number, body in enumerate(bodies):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            with _ending("the server", wait_s):
                connection.settimeout(wait_s)
                connection.connect(str(path))
                connection.sendall(_request(body))
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, (number, connection))
        selector.register(control, selectors.EVENT_READ)
        silent = set(range(len(bodies)))
        has_ended = False
        while not has_ended:
            left_s = deadline - time.monotonic() if silent else None
            if left_s is not None and left_s <= 0:
                sys.exit(
                    f"{len(silent)} of {len(bodies)} streams brought nothing within {wait_s:g} s"
                )
            for key, _ in selector.select(left_s):
                if key.data is None:
                    has_ended = True
                    continue
                number, connection = key.data
                data = connection.recv(1 << 16)
                arrivals[number].append((time.monotonic(), data))
                if not data:
                    sys.exit(f"stream {number} ended: {arrivals[number][0][1][:500]!r}")
                if silent:
                    silent.discard(number)
                    if not silent:
                        print("running", flush=True)
    return arrivals


def count_tokens(arrivals: Sequence[tuple[float, bytes]]) -> list[tuple[float, int]]:
    """Return how many tokens came when; an event is never cut in practice."""
    counted = [(when, sum(map(int, _TOKENS.findall(data)))) for when, data in arrivals]
    return [(when, tokens) for when, tokens in counted if tokens]


def _request(body: str) -> bytes:
    raw = body.encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


def main() -> None:
    """Read streams until stdin ends; print what came as one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("socket", type=Path)
    parser.add_argument("wait_s", type=float, help="for all streams to begin")
    args = parser.parse_args()
    # A collection stops whoever notes when bytes come, for longer the more have come.
    gc.disable()
    bodies = json.loads(sys.stdin.readline())
    arrivals = read_streams(args.socket, bodies, sys.stdin, args.wait_s)
    print(json.dumps([count_tokens(stream) for stream in arrivals]), flush=True)


if __name__ == "__main__":
    main()
