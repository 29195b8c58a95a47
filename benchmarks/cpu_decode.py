"""Time decoding steps of RWKV-7 on a CPU, random weights in the official shapes, against the limit.

A step reads one token into each of B rows and computes their logits. Run from the checkout:

    python benchmarks/cpu_decode.py                       # 0.1B, dtype auto, threads auto
    python benchmarks/cpu_decode.py --dtype bf16 --threads 2 --rows 1 4

Correctness comes first: a model that disagrees with plain fp32 is not timed. Rows are timed in
turns, so that a neighbour on the machine slows all of them alike. Ends with one JSON line a row
count, appended to benchmarks/results/cpu_decode.jsonl (not for --model tiny).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from mrss_provider.model import Model, load_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from tiny_model import Shape, checkpoint  # noqa: E402

RESULTS = ROOT / "benchmarks/results/cpu_decode.jsonl"
MODELS = {
    "tiny": Shape(ffn_size=512),
    "0.1B": Shape(12, 768, 65536, 64, 3072, (64, 64, 32, 128)),
    "0.4B": Shape(24, 1024, 65536, 64, 4096, (64, 64, 32, 128)),
}
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Relative RMS error of logits against plain fp32 on the same bf16 weights.
MAX_ERROR = {"fp32": 1e-5, "fp16": 1e-5, "bf16": 0.05}


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    shape = MODELS[args.model]
    load_before = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        error = logits_error(shape, args.dtype, args.threads, Path(folder) / "gate.safetensors")
        path = Path(folder) / "model.safetensors"
        save_file(checkpoint(7, shape, dtype=torch.bfloat16), path)
        started = time.perf_counter()
        model = load_model(path, device="cpu", dtype=args.dtype, threads=args.threads)
        load_s = time.perf_counter() - started
    facts = {
        "benchmark": "cpu_decode",
        "model": f"RWKV-7 {args.model} (random weights)",
        "threads": torch.get_num_threads(),
        "dtype": model.config.dtype,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        # Of the minute before: above 0 here means that neighbours slowed what is timed.
        "load_before": load_before,
    }
    print(", ".join(f"{key}: {value}" for key, value in facts.items()))
    print(f"loaded in {load_s:.1f} s; logits differ from plain fp32 by {error:.1e} (relative RMS)")
    if error > MAX_ERROR[model.config.dtype]:
        sys.exit(f"wrong: at most {MAX_ERROR[model.config.dtype]:.0e} is allowed; nothing timed")
    bandwidth = read_bandwidth()
    limits = {rows: step_bytes(shape, model, rows) / bandwidth * 1e3 for rows in args.rows}
    print(f"memory is read at {bandwidth / 1e9:.0f} GB/s; limits for bytes alone:")
    print("  " + ", ".join(f"{rows} rows {ms:.2f} ms" for rows, ms in limits.items()))
    times = time_steps(model, args.rows, args.rounds, args.steps)
    first = statistics.median(times[args.rows[0]])
    lines = []
    for rows, seconds in times.items():
        median = statistics.median(seconds)
        p99 = sorted(seconds)[int(len(seconds) * 0.99)]
        line = facts | {
            "rows": rows,
            "ms_per_step": round(median * 1e3, 3),
            "ms_p99": round(p99 * 1e3, 3),
            "tokens_per_s": round(rows / median, 1),
            "ratio_to_1": round(median / first, 3) if args.rows[0] == 1 else None,
            "limit_ms": round(limits[rows], 3),
            "read_gb_s": round(bandwidth / 1e9, 1),
        }
        lines.append(json.dumps(line))
        print(
            f"{rows:3d} rows {median * 1e3:7.2f} ms (p99 {p99 * 1e3:.2f}, limit "
            f"{limits[rows]:.2f}), {rows / median:7.1f} tokens/s, {median / first:.2f} x"
        )
    print("\n".join(lines))
    if args.model != "tiny":
        with RESULTS.open("a") as file:
            file.writelines(line + "\n" for line in lines)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="0.1B")
    parser.add_argument("--dtype", choices=["auto", *WEIGHT_BYTES], default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 5, 8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16, help="timed steps a round")
    return parser.parse_args()


def logits_error(shape: Shape, dtype: str, threads: int, path: Path) -> float:
    """Return the relative RMS difference of logits from plain fp32 on the same bf16 weights.

    With all widths but 2 layers: 12 layers of random weights amplify the rounding of fp32 itself
    a thousand times, so that they tell nothing.
    """
    gate = dataclasses.replace(shape, num_layers=2, vocab_size=min(shape.vocab_size, 4096))
    save_file(checkpoint(7, gate, dtype=torch.bfloat16), path)
    ids = torch.randint(1, gate.vocab_size, (8, 3), generator=torch.manual_seed(0))
    logits = []
    for each_dtype, packed in ((dtype, True), ("fp32", False)):
        model = load_model(path, device="cpu", dtype=each_dtype, threads=threads, packed=packed)
        pool = model.new_pool(3)
        steps = [model.decode(tokens, torch.arange(3), pool) for tokens in ids]
        logits.append(model.head(torch.cat(steps)).double())
    return float((logits[0] - logits[1]).norm() / logits[1].norm())


def step_bytes(shape: Shape, model: Model, rows: int) -> int:
    """Return the bytes that a step must move: weights once, each row's state in and out."""
    c, ranks = shape.hidden_size, sum(shape.ranks)
    layer = 4 * c * c + 2 * c * shape.ffn_size + 2 * c * ranks
    weights = shape.num_layers * layer + shape.vocab_size * c
    states = 2 * rows * shape.num_layers * shape.num_heads * shape.head_size**2 * 4
    return weights * WEIGHT_BYTES[model.config.dtype] + states


def read_bandwidth() -> float:
    """Return the best of several reads of 512 MB, in bytes per second."""
    data = torch.ones(1 << 27)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    return data.numel() * data.element_size() / best


def time_steps(
    model: Model, row_counts: list[int], rounds: int, steps: int
) -> dict[int, list[float]]:
    """Return the seconds of each step, by row count; the counts take turns, round by round."""
    times: dict[int, list[float]] = {rows: [] for rows in row_counts}
    pool = model.new_pool(max(row_counts))
    generator = torch.manual_seed(0)
    for turn in range(rounds + 1):
        for rows in row_counts:
            slots = torch.arange(rows)
            ids = torch.randint(1, model.config.vocab_size, (steps, rows), generator=generator)
            for tokens in ids:
                started = time.perf_counter()
                model.head(model.decode(tokens, slots, pool))
                # The first round warms up.
                if turn:
                    times[rows].append(time.perf_counter() - started)
    return times


def cpu_name() -> str:
    """Return the processor's name and how many CPUs this machine shows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def commit() -> str:
    """Return the checked-out commit, with + if files differ from it."""
    run = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    return subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
