"""`mrss serve` for half an hour under everything that clients do, good and bad.

A server in a process of its own, on a Unix socket, with a state cache and sessions. Beside clients
that read their answers there are those that leave, cancel, read slowly, are killed, ask nonsense,
or set deadlines that pass (`soak_clients.py`). It fails if anything ended as nobody could expect,
if a question with one right answer got another, if rows are still held after the end, if
descriptors or threads are left, or if memory grows in the second half (of five minutes or more) by
more than 5 MB for 1,000 requests.

    python benchmarks/soak.py
    python benchmarks/soak.py --minutes 5 --clients 32

Ends with one JSON line, kept in benchmarks/results/soak.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from soak_clients import Clients

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/soak.jsonl"
MAX_MB_PER_1000 = 5.0
# Caches are full by then; before it memory grows as it should.
WARM_MINUTES = 5.0
# Descriptors and threads that may come with use: pools of threads, files of the cache.
MAX_MORE_FILES = 8
MAX_MORE_THREADS = 40
START_S = 60.0
SETTLE_S = 30.0
BAD_ENDS = ("failed", "wrong")


@dataclass
class Watch:
    """The server's process over time; one sample a second."""

    process: psutil.Process
    clients: Clients
    rss_mb: list[float] = field(default_factory=list)
    num_requests: list[int] = field(default_factory=list)
    most_files: int = 0

    async def run(self, until: float) -> None:
        """Sample until a monotonic time."""
        while time.monotonic() < until:
            self.rss_mb.append(self.process.memory_info().rss / 1e6)
            self.num_requests.append(self.clients.ends.total())
            self.most_files = max(self.most_files, self.process.num_fds())
            await asyncio.sleep(1.0)

    def growth_mb_per_1000(self) -> float:
        """Return the slope of memory over requests in the second half."""
        half = len(self.rss_mb) // 2
        requests, memory = self.num_requests[half:], self.rss_mb[half:]
        if len(set(requests)) < 2:
            return 0.0
        return 1000 * statistics.linear_regression(requests, memory).slope


def start(socket: Path, folder: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start the server; its log goes to `folder`."""
    options: dict[str, Any] = {
        "--socket": socket,
        "--cache-bytes": args.cache_mb << 20,
        "--cache-dir": folder / "cache",
        "--cache-disk-bytes": 64 << 20,
        "--sessions-dir": folder / "sessions",
        "--max-rows": 64,
        "--max-queued": 64,
        "--stall-s": 5,
    }
    options |= {"--model": args.model} if args.model else {}
    options |= {"--states": args.states} if args.states else {}
    command = [sys.executable, "-m", "mrss_provider.cli", "serve"]
    command += [str(part) for option in options.items() for part in option]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)


async def wait_ready(http: httpx.AsyncClient) -> None:
    """Wait until the model is loaded."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            if (await http.get("/ready")).status_code == 200:
                return
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.1)


async def wait_idle(http: httpx.AsyncClient) -> dict[str, float]:
    """Wait until nobody holds a row, for some seconds at most; return the last gauges."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        text = (await http.get("/metrics")).text
        found = {
            name: float(value)
            for name, _, value in (line.partition(" ") for line in text.splitlines())
            if name in ("mrss_rows_used", "mrss_requests_waiting", "mrss_requests_running")
        }
        assert found, "the gauges have other names"
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.2)


async def soak(socket: Path, process: psutil.Process, args: argparse.Namespace) -> dict[str, Any]:
    """Send everything; return what came of it."""
    transport = httpx.AsyncHTTPTransport(uds=str(socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        await wait_ready(http)
        clients = Clients(socket, random.Random(args.seed))
        # The answer that the checks compare with is of an idle engine.
        await clients.check()
        watch = Watch(process, clients)
        files, threads = process.num_fds(), process.num_threads()
        begun = time.monotonic()
        until = begun + 60 * args.minutes
        await asyncio.gather(
            watch.run(until),
            clients.kill_some(until, args.kill_every_s),
            *(clients.work(until, args.pause_s) for _ in range(args.clients)),
        )
        took_s = time.monotonic() - begun
        await clients.aclose()
        left = await wait_idle(http)
        await asyncio.sleep(0.5)
        return {
            "minutes": round(took_s / 60, 2),
            "clients": args.clients,
            "requests": clients.ends.total(),
            "requests_per_s": round(clients.ends.total() / took_s, 1),
            "ends": dict(sorted(clients.ends.items())),
            "failures": clients.failures,
            "first_token_ms": percentiles(clients.first_ms),
            "answer_ms": percentiles(clients.whole_ms),
            "left_at_end": left,
            "files": [files, watch.most_files, process.num_fds()],
            "threads": [threads, process.num_threads()],
            "rss_mb": [round(mb, 1) for mb in watch.rss_mb[:: max(1, len(watch.rss_mb) // 30)]],
            "growth_mb_per_1000": round(watch.growth_mb_per_1000(), 2),
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile."""
    ordered = sorted(values) or [0.0]
    return {
        "p50": round(ordered[len(ordered) // 2], 1),
        "p99": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 1),
    }


def faults(result: dict[str, Any]) -> list[str]:
    """Return what must not be, in words."""
    files, threads = result["files"], result["threads"]
    checks = {
        "requests ended unexpectedly": any(result["ends"].get(end) for end in BAD_ENDS),
        "rows or requests are left": any(result["left_at_end"].values()),
        "descriptors are left": files[-1] > files[0] + MAX_MORE_FILES,
        "threads are left": threads[-1] > threads[0] + MAX_MORE_THREADS,
        "memory grows": result["minutes"] >= WARM_MINUTES
        and result["growth_mb_per_1000"] > MAX_MB_PER_1000,
        "the server ended badly": result["exit_status"] != 0,
    }
    return [words for words, is_so in checks.items() if is_so]


def main() -> None:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16, help="requests at once")
    parser.add_argument("--pause-s", type=float, default=0.02, help="between two of one client")
    parser.add_argument("--kill-every-s", type=float, default=5.0)
    parser.add_argument("--cache-mb", type=int, default=32, help="state cache; 0: off")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, help="default: the bundled model")
    parser.add_argument("--states", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mrss") as name:
        folder = Path(name)
        socket = folder / "s"
        server = start(socket, folder, args)
        try:
            result = asyncio.run(soak(socket, psutil.Process(server.pid), args))
            server.terminate()
            result["exit_status"] = server.wait(60)
        except BaseException:
            sys.stderr.write((folder / "log").read_text()[-3000:])
            raise
        finally:
            server.kill()
            server.wait()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    line = {
        "benchmark": "soak",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        **result,
        "faults": faults(result),
    }
    print(json.dumps(line))
    with args.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    sys.exit(bool(line["faults"]))


if __name__ == "__main__":
    main()
