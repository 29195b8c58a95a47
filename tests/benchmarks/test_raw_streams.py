"""What a recorder says of streams, against a server whose every write is known."""

import socket
import time
from pathlib import Path

from raw_streams import Recorder, count_tokens, write_in_time

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
