"""What `mrss serve` gives at 1, 64 and 512 connections that ask one request after the other.

The bundled model, short chats of 16 tokens, each connection in a closed loop, from one process of
this machine: client and server share its cores. All requests wait their turn (no 429 but where the
queue is shorter than the connections); how long, the first token's time tells.

    python benchmarks/capacity.py
    python benchmarks/capacity.py --connections 1 64 --seconds 20

Ends with a JSON line for each number of connections, kept in benchmarks/results/capacity.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from soak import percentiles

from mrss_provider.backend import GenerateRequest, Message
from mrss_provider.client import Client
from mrss_provider.errors import MRSSError, QueueFullError
from mrss_provider.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/capacity.jsonl"
NUM_TOKENS = 16
MAX_ROWS = 64
START_S = 60.0


class Loop:
    """One connection after the other, of `num` at a time."""

    def __init__(self, client: Client, until: float) -> None:
        self.ends: Counter[str] = Counter()
        self.first_ms: list[float] = []
        self.num_tokens = 0
        self._client = client
        self._until = until

    async def run(self, seed: int) -> None:
        """Ask until the time is over."""
        while time.monotonic() < self._until:
            try:
                await self._ask(seed)
                self.ends["answered"] += 1
            except QueueFullError:
                self.ends["busy"] += 1
                await asyncio.sleep(0.2)
            except MRSSError as exc:
                self.ends[type(exc).__name__] += 1

    async def _ask(self, seed: int) -> None:
        sampling = SamplingParams(max_tokens=NUM_TOKENS, seed=seed, ignore_eos=True)
        question = (Message("user", "Who keeps the bakery?"),)
        begun = time.monotonic()
        stream = await self._client.open(
            GenerateRequest("tone", sampling, messages=question, timeout_s=300.0)
        )
        is_first = True
        try:
            async for delta in stream:
                if delta.num_tokens and is_first:
                    self.first_ms.append(1e3 * (time.monotonic() - begun))
                    is_first = False
                self.num_tokens += delta.num_tokens
        finally:
            await stream.aclose()


async def measure(address: str, connections: int, seconds: float) -> dict[str, Any]:
    """Keep so many connections busy."""
    client = Client(address)
    try:
        begun = time.monotonic()
        loop = Loop(client, begun + seconds)
        await asyncio.gather(*(loop.run(seed) for seed in range(connections)))
        took_s = time.monotonic() - begun
    finally:
        await client.aclose()
    return {
        "connections": connections,
        "seconds": round(took_s, 1),
        "ends": dict(loop.ends),
        "answers_per_s": round(loop.ends["answered"] / took_s, 1),
        "tokens_per_s": round(loop.num_tokens / took_s),
        "first_token_ms": percentiles(loop.first_ms),
    }


async def wait_ready(address: str) -> None:
    """Wait until the model is loaded."""
    deadline = time.monotonic() + START_S
    while True:
        client = Client(address)
        try:
            if await client.probe() == "ready":
                return
        except MRSSError:
            if time.monotonic() > deadline:
                raise
        finally:
            await client.aclose()
        await asyncio.sleep(0.1)


def main() -> None:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="mrss") as folder:
        socket = Path(folder) / "s"
        command = [sys.executable, "-m", "mrss_provider.cli", "serve", "--socket", str(socket)]
        command += ["--max-rows", str(MAX_ROWS), "--max-queued", str(max(args.connections))]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            asyncio.run(wait_ready(f"unix://{socket}"))
            for connections in args.connections:
                found = asyncio.run(measure(f"unix://{socket}", connections, args.seconds))
                found["rss_mb"] = round(psutil.Process(server.pid).memory_info().rss / 1e6)
                lines.append(found)
                print(found, flush=True)
        finally:
            server.terminate()
            server.wait()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    about = {
        "benchmark": "capacity",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "max_rows": MAX_ROWS,
    }
    with args.out.open("a") as file:
        for line in lines:
            file.write(json.dumps(about | line) + "\n")


if __name__ == "__main__":
    main()
