"""What a mixture of states costs: step rate of K states against one, on CUDA.

A step is one graph replay from token id to token id: fused decode of all rows, head, the engine's
own gate and merge, one draw at temperature 1, and the token fed back to every row of its request.
One state is timed the same way, with neither gate nor merge. Random weights of official shapes.

    python benchmarks/mixture.py --models 1.5b --states 1 4 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from decode import gate
from measure import RESULTS, Machine, capture, machine, time_replays, write_line
from torch import Tensor

from models import SHAPES, random_model, state_bytes, weight_bytes
from mrss_provider.engine.gates import GATES
from mrss_provider.engine.merge import MERGE_RULES, Rows
from mrss_provider.model import Model

STATES = (1, 2, 3, 4, 8)
REQUESTS = (1, 32)
KINDS = (("linear", "fixed"), ("delta", "novelty"))


@dataclass(frozen=True)
class Cell:
    """One measurement: K states a request, merged by a rule under a gate."""

    num_states: int
    num_requests: int
    merge: str
    gate: str

    @property
    def rows_a_request(self) -> int:
        """The states, and the base where the gate or the rule needs it."""
        if self.num_states == 1:
            return 1
        needs_base = GATES[self.gate].needs_base or MERGE_RULES[self.merge].anchored
        return self.num_states + int(needs_base)


def make_step(model: Model, cell: Cell) -> Callable[[], Tensor]:
    """Return a step that reads the last token of each request and draws the next one."""
    fused = model.fused
    if fused is None:
        sys.exit("this model has no fused decode step on this device")
    width = cell.rows_a_request
    rows = cell.num_requests * width
    pool = model.new_pool(rows)
    # Rows of one request read the same tokens: only their states tell them apart.
    pool.wkv.normal_(0, 0.3)
    pool.wkv[:, ::width] = 0
    slots = torch.randperm(rows, device="cuda").view(cell.num_requests, width).flatten()
    tokens = torch.randint(1, 65536, (cell.num_requests,), device="cuda")
    draw = _make_draw(cell)

    def step() -> Tensor:
        ids = tokens.repeat_interleave(width, output_size=rows)
        logits = fused.head(fused.decode(ids, slots, pool))
        tokens.copy_(draw(logits.view(cell.num_requests, width, -1)))
        return tokens

    return step


def _make_draw(cell: Cell) -> Callable[[Tensor], Tensor]:
    """Return what turns logits [G, K, V] into tokens [G]."""
    named = None
    if cell.num_states > 1:
        ratios, base = MERGE_RULES[cell.merge].scale([1.0] * cell.num_states, 0.0)
        weights = list(ratios)
        if cell.rows_a_request > cell.num_states:
            weights.insert(0, base)
        named = torch.tensor([weights], device="cuda").expand(cell.num_requests, -1).contiguous()
    cut = torch.full((cell.num_requests,), 0.1, device="cuda")

    def draw(logits: Tensor) -> Tensor:
        merged = logits[:, 0]
        if named is not None:
            rows = Rows(logits, named, cut)
            rule = MERGE_RULES[cell.merge]
            merged = rule.merge(rows, GATES[cell.gate].weights(rows, anchored=rule.anchored))
        # The largest of logits plus Gumbel noise is one exact draw from their softmax.
        noise = torch.empty_like(merged).exponential_().log_()
        return (merged - noise).argmax(-1)

    return draw


def measure(name: str, model: Model, cell: Cell, on: Machine, out: Path, one: float) -> float:
    """Time one cell, write its line, return its steps per second."""
    step = make_step(model, cell)
    times = time_replays(capture(step))
    if not (step() >= 0).all():
        sys.exit("a drawn token is no token")
    shape = SHAPES[name]
    rows = cell.num_requests * cell.rows_a_request
    dtype = model.config.dtype
    moved = weight_bytes(shape, dtype) + 2 * rows * state_bytes(shape, "fp32")
    limit = on.read_tb_per_s * 1e12 / moved
    steps = 1e3 / times.median_ms
    fields: dict[str, object] = {
        "model": name,
        "rows": rows,
        "states": cell.num_states,
        "requests": cell.num_requests,
        "merge": cell.merge if cell.num_states > 1 else "none",
        "gate": cell.gate if cell.num_states > 1 else "none",
        "tokens_per_s": round(steps * cell.num_requests, 1),
        "steps_per_s": round(steps, 1),
        "limit_per_s": round(limit, 1),
        "of_one_state": round(steps / (one or steps), 3),
        "median_ms": round(times.median_ms, 4),
        "p99_ms": round(times.p99_ms, 4),
        "dtype": dtype,
        "state_dtype": "fp32",
        "scope": "token id to token id, one graph replay",
    }
    write_line("mixture", fields, on, out)
    return steps


def main() -> None:
    """Parse, print the machine and the limits, gate, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=["1.5b", "7.2b"])
    parser.add_argument("--states", nargs="+", type=int, default=list(STATES))
    parser.add_argument("--requests", nargs="+", type=int, default=list(REQUESTS))
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    on = machine()
    print(on)
    for name in args.models:
        shape = SHAPES[name]
        read = on.read_tb_per_s * 1e12
        for states in args.states:
            moved = weight_bytes(shape, args.dtype) + 2 * states * state_bytes(shape, "fp32")
            print(f"limit: {name}, {states} rows: {read / moved:.0f} steps/s")
        gate(shape, args.dtype, "fp32")
        model = random_model(shape, dtype=args.dtype)
        for requests in args.requests:
            one = measure(name, model, Cell(1, requests, *KINDS[0]), on, args.out, 0.0)
            for states in args.states:
                for kind in KINDS if states > 1 else ():
                    measure(name, model, Cell(states, requests, *kind), on, args.out, one)
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
