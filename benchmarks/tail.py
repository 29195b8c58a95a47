"""The tail of a decode step on CUDA: logits of rows to one token a request, without the model.

A cell is timed as a CUDA graph of 20 tails, one after the other, as they follow each other's
kernels in a decode step; logits are Zipf-like and stay where the head would have left them. A
truncated cell draws under top-p 0.7, the engine's default; `flat` cells draw under top-p 0.9 from
logits that hardly differ, where every token is a candidate. Where there is a mixture the rule is
`delta` and the gate `novelty`, unless a cell says otherwise. Nothing is timed before the kernels
picked what the plain form picks.

    python benchmarks/tail.py
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import RESULTS, Machine, capture, machine, time_replays, write_line
from mrss_kernels import reference_tail
from mrss_kernels.reference_merge import STRENGTHS
from mrss_kernels.tail import launch_tail
from mrss_kernels.tail_tensors import GATES, RULES, TailInputs, TailOutputs
from torch import Tensor

TAILS = 20
GATE_STEPS = 3


@dataclass(frozen=True)
class Cell:
    """One measurement: `requests` of `rows` rows each, the base among them where rows > 1."""

    requests: int
    rows: int
    truncate: bool
    flat: bool = False
    rule: str = "delta"
    gate: str = "novelty"

    @property
    def mixed(self) -> bool:
        """Whether there is anything to merge."""
        return self.rows > 1

    @property
    def gated(self) -> bool:
        """Whether the gate looks at the rows."""
        return self.mixed and self.gate != "fixed"

    def limit_bytes(self, vocab: int) -> int:
        """Return what must move at least: each row read once, merged rows written."""
        read = self.requests * self.rows * vocab * 4
        return read + self.mixed * self.requests * vocab * 4


CELLS = [
    Cell(requests, rows, truncate)
    for requests, rows in ((1, 1), (1, 4), (1, 5), (32, 1), (32, 5), (51, 5), (64, 4), (256, 1))
    for truncate in (False, True)
] + [Cell(1, 1, True, flat=True), Cell(64, 1, True, flat=True)]
METHODS = (
    ("delta", "fixed"),
    ("linear", "fixed"),
    ("product", "fixed"),
    ("power", "fixed"),
    ("linear", "novelty"),
    ("route", "novelty"),
    ("linear", "confidence"),
    ("linear", "learned"),
    ("delta", "learned"),
)
CELLS += [
    Cell(requests, 5, True, rule=rule, gate=gate) for requests in (1, 51) for rule, gate in METHODS
]


def make_logits(cell: Cell, vocab: int) -> Tensor:
    """Return rows of probability ~ rank^-1.5 in one random order, each with noise of its own."""
    generator = torch.Generator("cuda").manual_seed(7)
    num_rows = cell.requests * cell.rows
    noise = torch.randn(num_rows, vocab, generator=generator, device="cuda")
    if cell.flat:
        return noise * 0.1
    shared = -1.5 * torch.arange(1, vocab + 1, device="cuda").log()
    order = torch.randperm(vocab, generator=generator, device="cuda")
    return shared[order] + noise


def make_tail(cell: Cell, vocab: int) -> tuple[TailInputs, TailOutputs]:
    """Return the tensors of a cell: a base that is not named, and states of equal weights."""
    num_rows = cell.requests * cell.rows
    inputs = TailInputs.allocate(cell.requests, num_rows, vocab, num_gate_rows=1)
    column = inputs.column
    column("first_row").copy_(torch.arange(cell.requests) * cell.rows)
    column("next_row").copy_(column("first_row"))
    column("num_rows").fill_(cell.rows)
    inputs.seeds.copy_(torch.arange(cell.requests))
    if cell.truncate:
        column("top_p").fill_(0.9 if cell.flat else 0.7)
    if cell.mixed:
        column("rule").fill_(RULES.index(cell.rule))
        column("gate").fill_(GATES.index(cell.gate))
        column("cut").fill_(0.1)
        column("exponent").fill_(0.5)
        column("tau").fill_(0.3)
        inputs.named.fill_(1.0 if cell.rule in STRENGTHS else 1 / (cell.rows - 1))
        inputs.named[:: cell.rows] = 0.0
        generator = torch.Generator("cuda").manual_seed(3)
        inputs.gates.normal_(0.0, 0.3, generator=generator)
    token_ids = torch.zeros(num_rows, dtype=torch.int64, device="cuda")
    return inputs, TailOutputs.allocate(token_ids, cell.requests, num_rows, vocab)


def launch_cell(cell: Cell, logits: Tensor, inputs: TailInputs, outputs: TailOutputs) -> None:
    """Launch the tail with the flags that an engine would set."""
    flags = {"truncate": cell.truncate, "mixed": cell.mixed, "gated": cell.gated}
    flags["constrained"] = False
    launch_tail(logits, inputs, outputs, **flags)


def gate(cell: Cell, vocab: int) -> None:
    """Stop unless the kernels pick what the plain form in fp64 picks, some steps long.

    A draw may differ where the random number lies within rounding of a boundary between two
    tokens, which flat distributions have many of: one in a hundred may there.
    """
    logits = make_logits(cell, vocab)
    inputs, outputs = make_tail(cell, vocab)
    twin_inputs, twin_outputs = make_tail(cell, vocab)
    different = 0
    for _ in range(GATE_STEPS):
        launch_cell(cell, logits, inputs, outputs)
        reference_tail.tail(logits.clone(), twin_inputs, twin_outputs)
        same = outputs.ids == twin_outputs.ids
        different += int((~same).sum())
        error = float((outputs.log_probs - twin_outputs.log_probs)[same].abs().max())
        if not error < 1e-3:
            sys.exit(f"log-probabilities are wrong by {error:.1e}: {cell}")
    allowed = GATE_STEPS * cell.requests // 100 + cell.flat
    print(f"gate: {cell}, {different} draws differ, log-probabilities within {error:.1e}")
    if different > allowed:
        sys.exit(f"{different} draws differ, {allowed} may: {cell}")


def measure(cell: Cell, vocab: int, on: Machine, out: Path) -> None:
    """Time one cell and write its line."""
    logits = make_logits(cell, vocab)
    inputs, outputs = make_tail(cell, vocab)

    def tails() -> None:
        for _ in range(TAILS):
            launch_cell(cell, logits, inputs, outputs)

    times = time_replays(capture(tails))
    if bool((outputs.ids < 0).any()):
        sys.exit(f"a request failed: {cell}")
    limit_us = cell.limit_bytes(vocab) / (on.read_tb_per_s * 1e12) * 1e6
    fields: dict[str, object] = {
        "vocab": vocab,
        "requests": cell.requests,
        "states": cell.rows,
        "rows": cell.requests * cell.rows,
        "truncate": cell.truncate,
        "flat": cell.flat,
        "rule": cell.rule if cell.mixed else None,
        "gate": cell.gate if cell.mixed else None,
        "median_us": round(times.median_ms * 1e3 / TAILS, 2),
        "p99_us": round(times.p99_ms * 1e3 / TAILS, 2),
        "limit_us": round(limit_us, 2),
        "candidates": float(outputs.scratch.num_candidates.double().mean()) if cell.truncate else 0,
        "scope": f"logits to token ids, 1 of {TAILS} tails of a graph",
    }
    write_line("tail", fields, on, out)


def main() -> None:
    """Print the machine and the limits, gate, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    on = machine()
    print(on)
    for cell in CELLS:
        limit_us = cell.limit_bytes(args.vocab) / (on.read_tb_per_s * 1e12) * 1e6
        print(f"limit: {cell}: {limit_us:.2f} us")
    for cell in CELLS:
        gate(cell, args.vocab)
    for cell in CELLS:
        measure(cell, args.vocab, on, args.out)


if __name__ == "__main__":
    main()
