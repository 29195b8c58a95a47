"""What the HTTP path costs: server and client against the same backend called directly.

A server process and this one, over a Unix socket. Tokens come at ticks, one for every stream, as
an engine's steps make them. CPU time (all threads, from the kernel's scheduler) is divided by the
deltas that the client got: `client` is this process, `server` the other one, which also runs the
backend, `bare` this process when it calls the backend without HTTP. Medians of interleaved runs.

    python benchmarks/serve.py
    python benchmarks/serve.py --streams 1 16 64 --runs 7 --real

`--real` adds the bundled model, tokens a second through HTTP and without. Every stream must bring
the same text by both ways before a number counts. Ends with one JSON line a cell, kept in
benchmarks/results/serve.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import (
    Backend,
    Delta,
    DeltaStream,
    GenerateRequest,
    ModelCard,
    StreamInfo,
    Usage,
)
from mrss_provider.client import Client
from mrss_provider.config import EngineConfig, ServerConfig
from mrss_provider.sampling_params import SamplingParams

RESULTS = Path(__file__).parent / "results" / "serve.jsonl"
TICK_S = 0.004
WORD = " hello"


class TickBackend:
    """Yields one token at each tick, `max_tokens` of them."""

    async def open(self, request: GenerateRequest) -> DeltaStream:
        return TickStream(request.sampling.max_tokens or 1)

    async def models(self) -> list[ModelCard]:
        return []

    async def aclose(self) -> None:
        return None


class TickStream:
    """A `DeltaStream` of words, paced by a clock that all streams share."""

    def __init__(self, num_tokens: int) -> None:
        self.info = StreamInfo("tick", 1, "tick", 1)
        self._num_tokens = num_tokens
        self._num_sent = 0
        self._loop = asyncio.get_running_loop()
        self._due = 0.0

    def __aiter__(self) -> TickStream:
        return self

    async def __anext__(self) -> Delta:
        if self._num_sent > self._num_tokens:
            raise StopAsyncIteration
        self._num_sent += 1
        if self._num_sent > self._num_tokens:
            return Delta(usage=Usage(1, self._num_tokens))
        now = self._loop.time()
        self._due = max(self._due + TICK_S, now // TICK_S * TICK_S)
        await asyncio.sleep(self._due - now)
        is_last = self._num_sent == self._num_tokens
        return Delta(text=WORD, num_tokens=1, finish_reason="length" if is_last else None)

    def ready(self) -> bool:
        return self._num_sent >= self._num_tokens

    async def aclose(self) -> None:
        self._num_sent = self._num_tokens + 1


async def read(backend: Backend, request: GenerateRequest) -> tuple[str, int]:
    """Return a stream's text and how many deltas it came in."""
    stream = await backend.open(request)
    texts = [delta.text async for delta in stream]
    await stream.aclose()
    return "".join(texts), sum(map(bool, texts))


async def read_all(
    backend: Backend, request: GenerateRequest, num_streams: int
) -> tuple[list[str], int]:
    """Return the texts of streams side by side, and their deltas."""
    answers = await asyncio.gather(*(read(backend, request) for _ in range(num_streams)))
    return [text for text, _ in answers], sum(num for _, num in answers)


@contextlib.contextmanager
def served(kind: str) -> Iterator[tuple[str, int]]:
    """Run this file as a server; yields its address and process id."""
    with tempfile.TemporaryDirectory(prefix="mrss") as folder:
        path = Path(folder) / "s"
        child = subprocess.Popen([sys.executable, __file__, "--serve", kind, str(path)])
        try:
            asyncio.run(wait_ready(f"unix://{path}", child))
            yield f"unix://{path}", child.pid
        finally:
            child.terminate()
            child.wait()


async def wait_ready(address: str, child: subprocess.Popen[bytes]) -> None:
    """Wait for a server process to take requests."""
    while await Client(address).probe() != "ready":
        if child.poll() is not None:
            sys.exit("the server did not start")
        await asyncio.sleep(0.05)


def serve(kind: str, path: str) -> None:
    """Serve one of the backends."""
    from mrss_provider.server.run import run_server

    backend: Backend = TickBackend() if kind == "tick" else AsyncEngine(EngineConfig())
    run_server(backend, ServerConfig(socket=Path(path)))


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process's threads, to the nanosecond (psutil has 10 ms)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def measure_ticks(address: str, server: int, streams: int, args: Any) -> dict[str, Any]:
    """Return CPU microseconds a delta, medians over interleaved runs of both ways."""
    request = GenerateRequest("tick", SamplingParams(max_tokens=args.tokens), prompt="x")
    me = os.getpid()
    costs: dict[str, list[float]] = {"client": [], "server": [], "bare": []}
    counts = []
    for _ in range(args.runs):
        begun = cpu_s(me)
        expected, num_bare = asyncio.run(read_all(TickBackend(), request, streams))
        costs["bare"].append((cpu_s(me) - begun) / num_bare)
        begun, begun_server = cpu_s(me), cpu_s(server)
        texts, num_deltas = asyncio.run(read_all(Client(address), request, streams))
        if texts != expected:
            sys.exit("the texts differ: no number counts")
        costs["client"].append((cpu_s(me) - begun) / num_deltas)
        costs["server"].append((cpu_s(server) - begun_server) / num_deltas)
        counts.append(num_deltas)
    return {
        "backend": "tick",
        "streams": streams,
        "tokens": streams * args.tokens,
        "deltas": statistics.median(counts),
        **{f"{k}_us_per_delta": round(1e6 * statistics.median(v), 1) for k, v in costs.items()},
        "runs": args.runs,
    }


def measure_real(address: str, streams: int, args: Any) -> dict[str, Any]:
    """Return tokens a second of the bundled model, both ways in turns."""
    sampling = SamplingParams(max_tokens=args.tokens, seed=1, ignore_eos=True)
    request = GenerateRequest("base", sampling, prompt="Hello")

    async def timed(backend: Backend) -> float:
        begun = time.perf_counter()
        texts, _ = await read_all(backend, request, streams)
        if len(set(texts)) != 1:
            sys.exit("the same seed gave several texts: no number counts")
        return float(streams * args.tokens) / (time.perf_counter() - begun)

    async def in_turns() -> tuple[list[float], list[float]]:
        client = Client(address)
        async with AsyncEngine(EngineConfig()) as engine:
            # Once for nothing: the first steps of a process are slower.
            await timed(engine)
            await timed(client)
            rates = [(await timed(client), await timed(engine)) for _ in range(args.runs)]
        return [rate for rate, _ in rates], [rate for _, rate in rates]

    http_rate, bare_rate = map(statistics.median, asyncio.run(in_turns()))
    return {
        "backend": "bundled model",
        "streams": streams,
        "tokens": streams * args.tokens,
        "http_tokens_per_s": round(http_rate, 1),
        "bare_tokens_per_s": round(bare_rate, 1),
        "ratio": round(http_rate / bare_rate, 3),
        "runs": args.runs,
    }


def main() -> None:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=200, help="tokens a stream")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--real", action="store_true", help="also the bundled model")
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "SOCKET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return
    machine = about()
    print(json.dumps(machine))
    lines = []
    with served("tick") as (address, server):
        for streams in args.streams:
            lines.append(measure_ticks(address, server, streams, args))
            print(lines[-1])
    if args.real:
        with served("real") as (address, _):
            for streams in args.streams:
                lines.append(measure_real(address, streams, args))
                print(lines[-1])
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        for line in lines:
            file.write(json.dumps(line | machine) + "\n")
            print(json.dumps(line | machine))


def about() -> dict[str, Any]:
    """Return what a result must say of the machine and the versions."""
    names = ("mrss-provider", "starlette", "uvicorn", "httpx")
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        # Others' work on the machine shows here; costs are CPU time, but a busy cache is slower.
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: _version(name) for name in names},
        "commit": _commit(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return "a checkout"


def _commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
