"""What a token costs the engine's process, and how late it comes, with many streams.

A server process of its own over a Unix socket; its engine is the real one, but for a device that
computes nothing and takes a fixed time a step. Clients are other processes, which note when bytes
come and count tokens. CPU time is the kernel's, by thread, divided by the tokens that came while
all streams ran: `engine` is the thread that steps, `loop` the one that writes events. A token is
late by the time between the end of its step on the device and its arrival.

    python benchmarks/serve_front.py
    MRSS_PACING_MS=0 python benchmarks/serve_front.py --loads 32:1.7 256:5 --runs 5

A load is `STREAMS:MILLISECONDS A STEP`. A step takes longer where the machine cannot keep up, so
`steps_per_s` is to be read beside `wanted_steps_per_s`. Every stream must bring its own words
before a number counts. Medians of runs; ends with JSON lines in benchmarks/results/serve.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve import RESULTS, about, wait_ready
from streams import Gaps, Tape, Window, merge_tapes, steady_window

from mrss_provider.config import ServerConfig
from mrss_provider.tokenizer import Tokenizer

LIMIT_S = 120.0
STREAMS_A_CLIENT = 128
SAMPLE_S = 0.02
# Word n of an answer is at place `FIRST * seed + n` of the list of words.
FIRST = 7
_TOKENS = re.compile(rb'"num_tokens":(\d+)')


@dataclass(frozen=True)
class Load:
    """Streams at once, and what a step takes."""

    streams: int
    step_ms: float

    @classmethod
    def parse(cls, text: str) -> Load:
        """Read `256:5`."""
        streams, _, step_ms = text.partition(":")
        try:
            return cls(int(streams), float(step_ms))
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"must be STREAMS:MS, got {text!r}") from exc

    def __str__(self) -> str:
        return f"{self.streams}:{self.step_ms:g}"


class Reader(asyncio.Protocol):
    """Sends one request and notes what comes, with as little work as possible."""

    def __init__(self, body: bytes) -> None:
        self.arrivals: list[tuple[float, int]] = []
        self.data = bytearray()
        self.ended = asyncio.get_running_loop().create_future()
        self._body = body
        self._num_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(self._body)}\r\n\r\n"
        )
        assert isinstance(transport, asyncio.Transport)
        transport.write(head.encode() + self._body)

    def data_received(self, data: bytes) -> None:
        """Note when it came, and how many tokens it has. An event is never cut in practice."""
        now = time.monotonic()
        self.data += data
        tokens = sum(map(int, _TOKENS.findall(data)))
        if tokens:
            self.arrivals.append((now, tokens))

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if not self.ended.done():
            self.ended.set_result(None)

    def text(self) -> str:
        """Return the answer."""
        events = re.findall(rb"^data: (\{.*\})\r?$", bytes(self.data), re.MULTILINE)
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
        return "".join(choice["delta"].get("content", "") for choice in choices)


def run_client(args: argparse.Namespace) -> None:
    """Read a share of a load's streams; prints their arrivals as one line of JSON."""
    load: Load = args.loads[0]
    seeds = range(args.client, min(args.client + STREAMS_A_CLIENT, load.streams))

    async def read(seed: int) -> Reader:
        body = {
            "model": "base",
            "messages": [{"role": "user", "content": vocabulary[FIRST * seed]}],
            "max_tokens": args.tokens,
            "ignore_eos": True,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_num_tokens": True},
        }
        loop = asyncio.get_running_loop()
        raw = json.dumps(body).encode()
        _, reader = await loop.create_unix_connection(lambda: Reader(raw), path=args.socket)
        await reader.ended
        return reader

    async def read_all() -> list[Reader]:
        async with asyncio.timeout(LIMIT_S):
            return await asyncio.gather(*map(read, seeds))

    vocabulary = _words()
    readers = asyncio.run(read_all())
    for seed, reader in zip(seeds, readers, strict=True):
        text = reader.text()
        start = vocabulary.index(" " + text.split()[0]) if text else 0
        wanted = "".join(vocabulary[(start + n) % len(vocabulary)] for n in range(args.tokens))
        if text != wanted.lstrip():
            sys.exit(f"stream {seed} brought other words: no number counts")
    print(json.dumps([reader.arrivals for reader in readers]), flush=True)


def _words() -> list[str]:
    from idle_engine import words

    tokenizer = Tokenizer.load()
    return [tokenizer.decode([token_id]) for token_id in words(tokenizer)]


def run_server(args: argparse.Namespace) -> None:
    """Serve the idle engine until SIGTERM; then write when its steps were done."""
    from idle_engine import Steps, idle_engine, write_steps

    from mrss_provider.server.run import run_server as run

    load: Load = args.loads[0]
    steps = Steps()
    engine = idle_engine(load.streams, load.step_ms / 1e3, steps)
    run(engine, ServerConfig.from_env({"socket": Path(args.socket)}))
    write_steps(steps, Path(args.serve))


@contextlib.contextmanager
def served(load: Load, folder: Path) -> Iterator[tuple[Path, int]]:
    """Run the server; yields its socket and process id."""
    socket = folder / "s"
    command = [*_me(), "--loads", str(load), "--serve", str(folder / "steps")]
    child = subprocess.Popen([*command, "--socket", str(socket)])
    try:
        asyncio.run(wait_ready(f"unix://{socket}", child))
        yield socket, child.pid
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()


class CpuClock:
    """Samples the CPU seconds of a process: its main thread's, and all others'."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._samples: list[tuple[float, float, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> CpuClock:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._ended.set()
        self._thread.join()

    def spent(self, window: Window) -> tuple[float, float]:
        """Return what the main thread and the others spent in a stretch of time, seconds."""
        times = [sample[0] for sample in self._samples]
        first = self._samples[bisect.bisect_left(times, window.begin)]
        last = self._samples[bisect.bisect_right(times, window.end) - 1]
        share = (window.end - window.begin) / (last[0] - first[0])
        return share * (last[1] - first[1]), share * (last[2] - first[2])

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            main = others = 0.0
            for task in Path(f"/proc/{self._pid}/task").iterdir():
                spent = int((task / "schedstat").read_text().split()[0]) / 1e9
                if int(task.name) == self._pid:
                    main = spent
                else:
                    others += spent
            self._samples.append((time.monotonic(), main, others))


def lateness(tapes: Sequence[Tape], steps: dict[str, Any], window: Window) -> list[float]:
    """Return by how many milliseconds each token of a stretch of time was late, ascending."""
    done, first = steps["done"], {int(seed): step for seed, step in steps["first"].items()}
    late = []
    for seed, arrivals in enumerate(stream for tape in tapes for stream in tape.arrivals):
        step = first[seed]
        for when, tokens in arrivals:
            if window.begin < when <= window.end:
                late += [1e3 * (when - done[step + n]) for n in range(tokens)]
            step += tokens
    return sorted(late)


def measure(load: Load, args: argparse.Namespace) -> dict[str, float]:
    """Run a load once, on a server of its own."""
    with tempfile.TemporaryDirectory(prefix="mrss") as name:
        folder = Path(name)
        with served(load, folder) as (socket, pid), CpuClock(pid) as clock:
            tapes = run_clients(load, socket, args)
        steps = json.loads((folder / "steps").read_text())
    window = steady_window(tapes)
    loop_s, engine_s = clock.spent(window)
    gaps = Gaps.within(merge_tapes(tapes), window.begin, window.end)
    late = lateness(tapes, steps, window)
    us = 1e6 / window.num_tokens
    return {
        "steps_per_s": window.tokens_per_s / load.streams,
        "engine_us_per_token": us * engine_s,
        "loop_us_per_token": us * loop_s,
        "us_per_token": us * (engine_s + loop_s),
        "tokens_per_cpu_s": window.num_tokens / (engine_s + loop_s),
        "tokens_an_event": gaps.tokens_an_event,
        "gap_p50_ms": gaps.p50_ms,
        "gap_p99_ms": gaps.p99_ms,
        "gap_max_ms": gaps.max_ms,
        "late_p50_ms": late[len(late) // 2],
        "late_p99_ms": late[len(late) * 99 // 100],
        "late_max_ms": late[-1],
    }


def run_clients(load: Load, socket: Path, args: argparse.Namespace) -> list[Tape]:
    """Read a load's streams in as many processes as it takes."""
    command = [*_me(), "--loads", str(load), "--tokens", str(args.tokens), "--socket", str(socket)]
    children = [
        subprocess.Popen([*command, "--client", str(first)], stdout=subprocess.PIPE, text=True)
        for first in range(0, load.streams, STREAMS_A_CLIENT)
    ]
    said = [child.communicate(timeout=LIMIT_S)[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit(f"a client failed at {load}")
    return [Tape.of(json.loads(text)) for text in said]


def main() -> None:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = [Load(1, 1.0), Load(32, 1.7), Load(256, 5.0)]
    parser.add_argument("--loads", nargs="+", type=Load.parse, default=default)
    parser.add_argument("--tokens", type=int, default=400, help="tokens a stream")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--socket", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        run_server(args)
        return
    if args.client is not None:
        run_client(args)
        return
    lines = []
    for load in args.loads:
        runs = [measure(load, args) for _ in range(args.runs)]
        found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        lines.append(
            {
                "backend": "idle engine",
                "streams": load.streams,
                "tokens": load.streams * args.tokens,
                "wanted_steps_per_s": round(1e3 / load.step_ms, 1),
                "pacing_ms": ServerConfig.from_env().pacing_ms,
                **{key: round(value, 2) for key, value in found.items()},
                "runs": args.runs,
            }
        )
        print(lines[-1])
    with args.out.open("a") as file:
        for line in lines:
            file.write(json.dumps(line | about()) + "\n")


def _me() -> list[str]:
    return [sys.executable, str(Path(__file__).resolve())]


if __name__ == "__main__":
    main()
