"""Start-up times: `import mrss_provider` below 100 ms, `mrss --help` below 300 ms.

Each is a fresh interpreter, started `--runs` times; an interpreter that does nothing is taken off
the import's time, and not off the command's, since a user waits for that too. The first run of
each, which reads the disk, does not count. An import that loads torch or LiteLLM is an error.

    python benchmarks/import_time.py

Ends with one JSON line, in benchmarks/results/import_time.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/import_time.jsonl"
LIMITS_MS = {"import mrss_provider": 100.0, "mrss --help": 300.0}
# What the console script `mrss` runs.
CLI = [sys.executable, "-m", "mrss_provider.cli", "--help"]
GATE = "import sys, mrss_provider; sys.exit(bool({'torch', 'litellm', 'httpx'} & set(sys.modules)))"


def run_ms(command: list[str]) -> float:
    """Return how long `command` takes, milliseconds."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    if subprocess.run([sys.executable, "-c", GATE]).returncode:
        sys.exit("importing mrss_provider loads torch, litellm or httpx: nothing is measured")
    commands = {
        "nothing": [sys.executable, "-c", "pass"],
        "import mrss_provider": [sys.executable, "-c", "import mrss_provider"],
        "mrss --help": CLI,
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for i in range(args.runs + 1):
        for name, command in commands.items():
            took_ms = run_ms(command)
            if i:
                times[name].append(took_ms)
    medians = {name: statistics.median(values) for name, values in times.items()}
    medians["import mrss_provider"] -= medians["nothing"]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    line = {
        "benchmark": "import_time",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "runs": args.runs,
        "ms": {name: round(value, 1) for name, value in medians.items()},
        "limits_ms": LIMITS_MS,
    }
    print(json.dumps(line))
    for name, limit_ms in LIMITS_MS.items():
        verdict = "within" if medians[name] <= limit_ms else "OVER"
        print(f"{name}: {medians[name]:.0f} ms, {verdict} the limit of {limit_ms:.0f} ms")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
