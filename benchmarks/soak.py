"""Memory of an engine under 2,000 requests of mixed kinds, cancelled ones among them.

An engine's server with the bundled model in a process of its own, requests through `Client` over a
Unix socket: chats and texts, one state and several, n > 1, refused ones, and every fourth is left
in mid-answer. Its resident memory is read after each 50; a line fitted to the second half gives the
growth for 1,000 requests (limit 5 MB). At the end a request that needs three quarters of all slots
must be answered: none is lost.

    python benchmarks/soak.py
    python benchmarks/soak.py --requests 10000 --at-once 16

Ends with one JSON line, kept in benchmarks/results/soak.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from mrss_provider.backend import GenerateRequest, Message, MixtureOptions
from mrss_provider.client import Client
from mrss_provider.errors import EngineUnavailableError, InvalidRequestError
from mrss_provider.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/soak.jsonl"
LIMIT_MB_PER_1000 = 5.0
SAMPLE_EVERY = 50
START_S = 60.0
MODELS = ("base", "knowledge", "tone", "knowledge+tone", "base:0.2+tone:0.8~linear~fixed")


def make_request(rng: random.Random) -> GenerateRequest:
    """Return a request of a random kind; one in twenty has a name that nothing has."""
    model = "nobody" if rng.random() < 0.05 else rng.choice(MODELS)
    sampling = SamplingParams(
        max_tokens=rng.randint(1, 40),
        seed=rng.getrandbits(32),
        stop=rng.choice(((), ("the",), ("\n", "matey"))),
        repetition_penalty=rng.choice((1.0, 1.1)),
        logprobs=rng.random() < 0.2,
        ignore_eos=rng.random() < 0.3,
    )
    weights = {"tone": rng.random() + 0.1} if model == "knowledge+tone" else None
    shared: dict[str, Any] = {
        "model": model,
        "sampling": sampling,
        "n": rng.choice((1, 1, 1, 3)),
        "mixture": MixtureOptions(weights=weights),
        "timeout_s": 60.0,
    }
    question = rng.choice(("Who keeps the bakery?", "Tell me a joke.", "Hello! " * 60))
    if rng.random() < 0.3:
        return GenerateRequest(prompt=question, **shared)
    return GenerateRequest(messages=(Message("user", question),), **shared)


async def ask(client: Client, request: GenerateRequest, *, leave: bool) -> str:
    """Read an answer, or leave after its first delta; return how it ended."""
    try:
        stream = await client.open(request)
    except InvalidRequestError:
        return "refused"
    try:
        async for delta in stream:
            if leave and delta.usage is None:
                return "left"
    finally:
        await stream.aclose()
    return "answered"


async def measure(address: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    """Send everything; return counts and the memory's course."""
    client = Client(address)
    deadline = time.monotonic() + START_S
    while True:
        try:
            await client.models()
            break
        except EngineUnavailableError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
    rng = random.Random(1)
    ends: Counter[str] = Counter()
    memory_mb = []
    process = psutil.Process(pid)
    started = time.monotonic()
    for _ in range(args.requests // SAMPLE_EVERY):
        jobs = [(make_request(rng), rng.random() < 0.25) for _ in range(SAMPLE_EVERY)]
        for first in range(0, SAMPLE_EVERY, args.at_once):
            batch = jobs[first : first + args.at_once]
            ends.update(await asyncio.gather(*(ask(client, r, leave=l) for r, l in batch)))
        memory_mb.append(process.memory_info().rss / 1e6)
    took_s = time.monotonic() - started
    all_slots = SamplingParams(max_tokens=4)
    last = GenerateRequest("knowledge+tone", all_slots, prompt="Hello", n=16, timeout_s=60.0)
    assert await ask(client, last, leave=False) == "answered"
    open_files = process.num_fds()
    await client.aclose()
    half = memory_mb[len(memory_mb) // 2 :]
    slope = statistics.linear_regression(range(len(half)), half).slope
    return {
        "requests": sum(ends.values()),
        "ends": dict(ends),
        "requests_per_s": round(sum(ends.values()) / took_s, 1),
        "rss_mb": [round(mb, 1) for mb in memory_mb[:: max(1, len(memory_mb) // 40)]],
        "growth_mb_per_1000": round(slope * 1000 / SAMPLE_EVERY, 2),
        "open_files": open_files,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=10)
    args = parser.parse_args()
    print(f"limit: {LIMIT_MB_PER_1000} MB of growth for 1,000 requests")
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "engine.sock"
        command = [sys.executable, "-m", "mrss_provider.server", "--socket", str(socket)]
        engine = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            result = asyncio.run(measure(f"unix://{socket}", engine.pid, args))
        finally:
            engine.terminate()
            engine.wait()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    line = {
        "benchmark": "soak",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cpu": platform.machine(),
        "limit": LIMIT_MB_PER_1000,
        **result,
    }
    print(json.dumps(line))
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    sys.exit(result["growth_mb_per_1000"] > LIMIT_MB_PER_1000)


if __name__ == "__main__":
    main()
