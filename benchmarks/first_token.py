"""Time to the first token of a short chat through a real LiteLLM proxy, idle, bundled model.

`mrss proxy` on a free port, then one streamed request after the other; the clock runs from the
request to the first chunk that has text. The limit is 150 ms for the median.

    python benchmarks/first_token.py

Ends with one JSON line a name, kept in benchmarks/results/first_token.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/first_token.jsonl"
LIMIT_MS = 150.0
START_S = 180.0
NAMES = ("mrss/base", "mrss/knowledge+tone")


def first_token_ms(client: openai.OpenAI, model: str) -> float:
    """Return the milliseconds to the first text."""
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Who keeps the bakery?"}],
        max_tokens=8,
        stream=True,
    )
    took_ms = None
    for chunk in stream:
        if took_ms is None and chunk.choices and chunk.choices[0].delta.content:
            took_ms = (time.perf_counter() - started) * 1e3
    assert took_ms is not None, "an answer without text: nothing is measured"
    return took_ms


def wait_until_it_answers(client: openai.OpenAI, proxy: subprocess.Popen[bytes]) -> None:
    """Return after the first answer of the proxy."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            first_token_ms(client, NAMES[0])
            return
        except openai.APIError:
            if proxy.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    args = parser.parse_args()
    print(f"limit: {LIMIT_MS:g} ms, median")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    proxy = subprocess.Popen(
        [sys.executable, "-m", "mrss_provider.cli", "proxy", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        wait_until_it_answers(client, proxy)
        times = {name: [first_token_ms(client, name) for _ in range(args.runs)] for name in NAMES}
    finally:
        proxy.send_signal(signal.SIGINT)
        proxy.wait()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    for name, taken in times.items():
        line = {
            "benchmark": "first_token",
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit.stdout.strip(),
            "cpu": platform.machine(),
            "load": round(os.getloadavg()[0], 2),
            "model": name,
            "runs": args.runs,
            "limit_ms": LIMIT_MS,
            "median_ms": round(statistics.median(taken), 1),
            "max_ms": round(max(taken), 1),
        }
        print(json.dumps(line))
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
