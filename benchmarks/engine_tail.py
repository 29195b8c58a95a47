"""Time the tail of a step on a CPU: gate, merge, penalties, truncation and draw, from fp32 logits.

Logits are Zipf-like, as a language model's are, new ones in each step. Run from the checkout:

    python benchmarks/engine_tail.py
    python benchmarks/engine_tail.py --vocab 65536 --rows 5 --requests 1 16

Correctness comes first: merged distributions that differ from the formulas in fp64 are not timed.
The limit is one pass over the logits (their sum). Times are CPU time of the one thread, so that a
busy neighbour does not count; cells are timed in turns. Ends with one JSON line a cell, appended
to benchmarks/results/engine_tail.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mrss_provider.engine.gates import make_gate
from mrss_provider.engine.logits_processors import Bias
from mrss_provider.engine.merges import LOG_PROB_FLOOR, make_merge
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.tail import Pick, merge_rows, pick_tokens
from mrss_provider.mixture import Method
from mrss_provider.model.cpu import configure_cpu
from mrss_provider.sampling_params import SamplingParams

RESULTS = Path(__file__).resolve().parent / "results/engine_tail.jsonl"
RULES = (("linear", "fixed"), ("geometric", "fixed"), ("linear", "novelty"), ("delta", "novelty"))
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, top_p=1.0, seed=1),
    "top_p 0.7": SamplingParams(temperature=1.0, top_p=0.7, seed=1),
    "temperature 1": SamplingParams(temperature=1.0, top_p=1.0, seed=1),
}
NUM_STEPS = 60
NUM_WARM_UP = 5
MAX_ERROR = 1e-4


@dataclass(frozen=True)
class Cell:
    """What is timed: `requests` mixtures of `rows` rows (the base among them)."""

    vocab: int
    rows: int
    requests: int
    merge: str
    gate: str
    sampling: str


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", nargs="+", type=int, default=[4096, 65536])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 3, 5, 9])
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    # As the engine does: an allocator that keeps its pages.
    configure_cpu(threads=1)
    facts = {
        "benchmark": "engine_tail",
        "machine": f"{platform.machine()} {cpu_name()}",
        "torch": torch.__version__,
        "threads": 1,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(facts))
    gate_errors()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for vocab in args.vocab:
        for requests in args.requests:
            cells = [
                Cell(vocab, rows, requests, merge, gate, sampling)
                for rows in args.rows
                for merge, gate in (RULES if rows > 1 else RULES[:1])
                for sampling in SAMPLING
            ]
            with args.out.open("a") as file:
                for line in time_in_turns(cells):
                    print(json.dumps(line), flush=True)
                    file.write(json.dumps(facts | line) + "\n")


def time_in_turns(cells: list[Cell]) -> list[dict[str, object]]:
    """Time every cell once a turn: what slows the machine slows all of them alike."""
    tails: list[list[float]] = [[] for _ in cells]
    passes: list[list[float]] = [[] for _ in cells]
    for step in range(NUM_STEPS + NUM_WARM_UP):
        most = max(cell.rows * cell.requests for cell in cells)
        logits = zipf_logits(most, cells[0].vocab, seed=step)
        for cell, tail, one_pass in zip(cells, tails, passes, strict=True):
            own = logits[: cell.rows * cell.requests].clone()
            picks = make_picks(cell, step)
            start = time.thread_time()
            own.sum(-1)
            read = time.thread_time()
            pick_tokens(own, picks, torch.tensor([cell.vocab - 1]))
            end = time.thread_time()
            if step >= NUM_WARM_UP:
                one_pass.append((read - start) * 1e6)
                tail.append((end - read) * 1e6)
    return [
        vars(cell)
        | {
            "median_us": round(statistics.median(tail), 1),
            "p99_us": round(sorted(tail)[len(tail) * 99 // 100], 1),
            "limit_us": round(statistics.median(one_pass), 1),
            "us_per_request": round(statistics.median(tail) / cell.requests, 1),
        }
        for cell, tail, one_pass in zip(cells, tails, passes, strict=True)
    ]


def make_picks(cell: Cell, position: int) -> list[Pick]:
    """Return the picks of one step; row 0 of each mixture is its base."""
    sampling = SAMPLING[cell.sampling]
    mixture = make_mixture(cell.rows, cell.merge, cell.gate)
    bias = Bias(sampling)
    return [
        Pick(range(g * cell.rows, (g + 1) * cell.rows), mixture, sampling, bias, None, g, position)
        for g in range(cell.requests)
    ]


def make_mixture(rows: int, merge: str, gate: str) -> ResolvedMixture:
    """Return equal states; the base has no weight of its own where the gate needs it."""
    rule, method = make_merge(Method(merge)), Method(gate)
    needs_base = rows > 1 and (rule.anchored or make_gate(method).needs_base)
    ratios = (0.0,) * needs_base + (1.0,) * (rows - needs_base)
    return ResolvedMixture(
        canonical="benchmark",
        states=(None,) * rows,
        names=tuple(f"s{k}" for k in range(rows)),
        groups=("",) * rows,
        ratios=ratios,
        weights=rule.scale(ratios, base_named=False),
        merge=Method(merge),
        gate=method,
        cut=0.1 if rule.has_cut and rows > 1 else 0.0,
        base_row=0 if needs_base else None,
        fingerprint="fp_benchmark",
    )


def zipf_logits(rows: int, vocab: int, *, seed: int) -> Tensor:
    """Return rows of probability ~ rank^-1.5 in one random order, each with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    shared = -1.5 * torch.arange(1, vocab + 1).log()
    shared = shared[torch.randperm(vocab, generator=generator)]
    return shared + torch.randn(rows, vocab, generator=generator) * 0.5


def gate_errors() -> None:
    """Stop unless merged distributions equal the formulas in fp64."""
    logits = zipf_logits(3, 65536, seed=0)
    exact = logits.double().log_softmax(-1)
    uniform = torch.full((3, 1), 1 / 3, dtype=torch.float64)
    truths = {
        "linear": (uniform.log() + exact).logsumexp(0),
        "geometric": (uniform * exact).sum(0).log_softmax(-1),
    }
    floored = exact.clamp_min(LOG_PROB_FLOOR)
    delta = floored[0] + (floored[1:] - floored[0]).sum(0)
    best = exact[1:].amax(0)
    truths["delta"] = delta.masked_fill(best < best.max() + torch.tensor(0.1).log(), -torch.inf)
    for merge, truth in truths.items():
        mixture = make_mixture(3, merge, "fixed")
        merged = merge_rows(logits, [(range(3), mixture)]).double().softmax(-1)[0]
        error = float((merged - truth.softmax(-1)).abs().sum()) / 2
        print(f"gate: {merge}, total variation {error:.1e}")
        if not error < MAX_ERROR:
            sys.exit(f"{merge} is wrong: total variation {error:.1e}")


def cpu_name() -> str:
    """Return what the system calls its processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def commit() -> str:
    """Return the checkout's commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
