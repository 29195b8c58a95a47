"""CPU time a chunk that the provider and its client add to what LiteLLM's proxy costs by itself.

One proxy worker serves two providers in turns: ours, before an engine's server in another process,
and a stub that yields the same chunks inside the worker. Tokens come as an engine's steps make
them: one for every stream at each tick. Each run is S streams of T tokens; CPU time is the
worker's, user and system, divided by the chunks that the clients received.

    python benchmarks/litellm_overhead.py
    python benchmarks/litellm_overhead.py --streams 1 4 16 64 --runs 7

Both must bring the same text before a number counts. Under load ours joins tokens that came
together; `chunks_per_token` tells how often. Full garbage collections of LiteLLM's large heap,
seconds of CPU time that strike either provider at random, are kept out of the runs.
Ends with one JSON line a number of streams, in benchmarks/results/litellm_overhead.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before LiteLLM is imported, here and in the proxy: no look-ups elsewhere.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import httpx
import psutil
from litellm.llms.custom_llm import CustomLLM
from litellm.types.utils import Delta, ModelResponseStream, StreamingChoices, Usage

from mrss_provider import backend
from mrss_provider.config import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/litellm_overhead.jsonl"
LIMIT = 0.15
WORD = " token"
PROMPT_TOKENS = 7
MIN_CHUNKS = 400


class Ticker:
    """Steps of an engine: everybody who waits is woken at each tick."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []
        self._is_running = False

    async def tick(self) -> None:
        """Wait for the next tick."""
        loop = asyncio.get_running_loop()
        if not self._is_running:
            self._is_running = True
            self._schedule(loop)
        waiter = loop.create_future()
        self._waiting.append(waiter)
        await waiter

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_later(float(os.environ["BENCH_TICK_S"]), self._wake, loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
        if waiting:
            self._schedule(loop)
        else:
            self._is_running = False


class Stub(CustomLLM):  # type: ignore[misc]
    """The least a provider can do: the chunks that ours yields, made in the worker."""

    def __init__(self) -> None:
        super().__init__()
        self._ticker = Ticker()

    async def astreaming(self, **kwargs: Any) -> AsyncIterator[ModelResponseStream]:
        """Yield the chunks."""
        num_tokens = kwargs["optional_params"]["max_tokens"]
        hidden = {"model_id": kwargs["litellm_params"]["model_info"]["id"]}
        created = int(time.time())

        def chunk(delta: Delta, finish_reason: str | None = None) -> ModelResponseStream:
            made = ModelResponseStream(
                id="chatcmpl-stub",
                created=created,
                model="stub",
                choices=[StreamingChoices(delta=delta, finish_reason=finish_reason)],
            )
            made._hidden_params = dict(hidden)
            return made

        for i in range(num_tokens):
            await self._ticker.tick()
            yield chunk(Delta(content=WORD, role=None if i else "assistant"))
        usage = chunk(Delta())
        usage.usage = Usage(
            prompt_tokens=PROMPT_TOKENS,
            completion_tokens=num_tokens,
            total_tokens=PROMPT_TOKENS + num_tokens,
        )
        yield usage
        yield chunk(Delta(), "length")


stub = Stub()


class TickingBackend:
    """A `Backend` whose every stream gets a token a tick."""

    def __init__(self) -> None:
        self._ticker = Ticker()

    async def open(self, request: backend.GenerateRequest) -> TickingStream:
        """Admit a request."""
        num_tokens = request.sampling.max_tokens or 1
        return TickingStream(self._ticker, num_tokens)

    async def models(self) -> list[backend.ModelCard]:
        """Return the one name."""
        return [backend.ModelCard("base", "base")]

    async def aclose(self) -> None:
        """Do nothing."""


class TickingStream:
    """A `DeltaStream` of `num_tokens` equal words."""

    def __init__(self, ticker: Ticker, num_tokens: int) -> None:
        self.info = backend.StreamInfo("base", 1, "bench", PROMPT_TOKENS)
        self._deltas = self._run(ticker, num_tokens)

    def __aiter__(self) -> TickingStream:
        return self

    async def __anext__(self) -> backend.Delta:
        return await anext(self._deltas)

    def ready(self) -> bool:
        """Tell whether the next delta is already here: none comes before its tick."""
        return False

    async def aclose(self) -> None:
        """End the stream."""
        await self._deltas.aclose()

    async def _run(self, ticker: Ticker, num_tokens: int) -> Any:
        for _ in range(num_tokens):
            await ticker.tick()
            yield backend.Delta(text=WORD, num_tokens=1)
        usage = backend.Usage(PROMPT_TOKENS, num_tokens)
        yield backend.Delta(finish_reason="length", usage=usage)


def serve_engine(path: Path) -> None:
    """Serve a `TickingBackend` on the Unix socket `path`."""
    from mrss_provider.server.run import run_server

    run_server(TickingBackend(), ServerConfig(socket=path))


CONFIG = """
model_list:
  - {model_name: mrss/*, litellm_params: {model: mrss/*}}
  - {model_name: stub/*, litellm_params: {model: stub/*}}
litellm_settings:
  custom_provider_map:
    - {provider: mrss, custom_handler: mrss_provider.handler}
    - {provider: stub, custom_handler: litellm_overhead.stub}
general_settings:
  dangerously_permit_weak_or_unset_master_key: true
"""


@contextlib.contextmanager
def processes(folder: Path, tick_s: float) -> Iterator[tuple[str, psutil.Process, psutil.Process]]:
    """Run engine and proxy; yield the proxy's address and both processes."""
    path = folder / "engine.sock"
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    env = {
        **os.environ,
        "BENCH_TICK_S": str(tick_s),
        "MRSS_SOCKET": str(path),
        "PYTHONPATH": str(ROOT / "benchmarks"),
        "LITELLM_LOG": "ERROR",
        "PYTHON_GC_THRESHOLD": "700,10,100000",
    }
    litellm = Path(sys.executable).parent / "litellm"
    flags = ["--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    commands = [
        [sys.executable, __file__, "--serve-engine", str(path)],
        [str(litellm), *flags],
    ]
    log = (folder / "log").open("wb")
    started = [subprocess.Popen(c, env=env, stdout=log, stderr=log) for c in commands]
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, started)
        yield url, psutil.Process(started[1].pid), psutil.Process(started[0].pid)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(20)
        log.close()


def wait_until_ready(url: str, started: list[subprocess.Popen[bytes]]) -> None:
    """Return once the proxy answers."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in started):
            break
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/liveliness").status_code == 200:
                return
        time.sleep(0.2)
    sys.exit("engine or proxy did not start")


async def read_stream(http: httpx.AsyncClient, model: str, num_tokens: int) -> list[str]:
    """Return the text of each chunk of one stream."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": num_tokens,
        "stream": True,
    }
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        raw = await response.aread()
    if response.status_code != 200:
        sys.exit(f"{model} answered {response.status_code}: {raw[:300]!r}")
    events = [line[6:] for line in raw.split(b"\n\n") if line.startswith(b"data: {")]
    chunks = [json.loads(event) for event in events]
    for chunk in chunks:
        if "error" in chunk:
            sys.exit(f"{model} broke off: {chunk}")
    texts = [choice["delta"].get("content") for c in chunks for choice in c["choices"]]
    return [text for text in texts if text]


async def run(url: str, model: str, num_streams: int, num_tokens: int) -> list[list[str]]:
    """Return the chunks of `num_streams` streams at once."""
    limits = httpx.Limits(max_connections=num_streams)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        reads = [read_stream(http, model, num_tokens) for _ in range(num_streams)]
        return await asyncio.gather(*reads)


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU time of a process so far, seconds."""
    times = process.cpu_times()
    return float(times.user + times.system)


def check_same_text(url: str, num_tokens: int) -> None:
    """Stop unless both providers give the same text."""
    for model in ("mrss/base", "stub/base"):
        for chunks in asyncio.run(run(url, model, 2, num_tokens)):
            if "".join(chunks) != WORD * num_tokens:
                sys.exit(f"{model} gave another text: nothing is measured")


def measure(
    url: str,
    proxy: psutil.Process,
    engine: psutil.Process,
    num_streams: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return medians for one number of streams, the two providers run in turns."""
    # The system counts CPU time in 10 ms: a run must spend a few hundred of them.
    num_tokens = max(args.tokens, MIN_CHUNKS // num_streams)
    times: dict[str, list[float]] = {"mrss/base": [], "stub/base": []}
    engine_us = []
    chunks_per_token = []
    for _ in range(args.runs):
        for model in times:
            before = cpu_s(proxy), cpu_s(engine)
            streams = asyncio.run(run(url, model, num_streams, num_tokens))
            spent = cpu_s(proxy) - before[0], cpu_s(engine) - before[1]
            num_chunks = sum(map(len, streams))
            times[model].append(spent[0] / num_chunks * 1e6)
            if model == "mrss/base":
                engine_us.append(spent[1] / num_chunks * 1e6)
                chunks_per_token.append(num_chunks / (num_streams * num_tokens))
    ours, theirs = (statistics.median(times[model]) for model in ("mrss/base", "stub/base"))
    return {
        "streams": num_streams,
        "tokens": num_tokens,
        "stub_us_per_chunk": round(theirs, 1),
        "mrss_us_per_chunk": round(ours, 1),
        "overhead": round(ours / theirs - 1, 4),
        "engine_front_us_per_chunk": round(statistics.median(engine_us), 1),
        "chunks_per_token": round(statistics.median(chunks_per_token), 3),
    }


def facts() -> dict[str, Any]:
    """Return where and with what this runs."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "benchmark": "litellm_overhead",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "litellm": version("litellm"),
        "limit": LIMIT,
    }


def main() -> None:
    """Run the benchmark, or the engine of one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--serve-engine", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--tick-s", type=float, default=0.025)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    if args.serve_engine:
        serve_engine(args.serve_engine)
        return
    head = {**facts(), "tick_s": args.tick_s, "runs": args.runs}
    print(json.dumps(head))
    lines = []
    with (
        tempfile.TemporaryDirectory(prefix="mrss") as folder,
        processes(Path(folder), args.tick_s) as (url, proxy, engine),
    ):
        check_same_text(url, args.tokens)
        for num_streams in args.streams:
            cell = measure(url, proxy, engine, num_streams, args)
            lines.append({**head, **cell})
            verdict = "within" if cell["overhead"] <= LIMIT else "OVER"
            print(f"{json.dumps(cell)}  {verdict} the limit of {LIMIT:.0%}")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
