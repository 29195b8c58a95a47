"""Decode speed of RWKV-7 on CUDA: one graph replay a step, from token ids to fp32 logits.

Random weights of the official shapes with the dense FFN; sampling is not part of the step. A
shape is timed only after its fused step agreed with the layer by layer one in fp32.

    python benchmarks/decode.py --models 1.5b --rows 1 4 8
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from measure import RESULTS, Machine, capture, machine, time_replays, write_line

from models import SHAPES, Shape, random_model, state_bytes, weight_bytes
from mrss_provider.model import Model

ROWS = (1, 2, 3, 4, 5, 6, 8, 16, 32, 64, 128, 256)
GATE_ROWS = (1, 4, 11, 33, 100)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the root mean square of the difference over that of `exact`."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def gate(shape: Shape, dtype: str, state_dtype: str) -> None:
    """Stop unless the fused step is as right as the layer by layer one, two layers deep.

    The truth is the same weights in fp32, layer by layer.
    """
    small = dataclasses.replace(shape, num_layers=2)
    fused = random_model(small, dtype=dtype, state_dtype=state_dtype)
    plain = random_model(small, dtype=dtype, state_dtype=state_dtype)
    exact = random_model(small, dtype=dtype, state_dtype="fp32", compute_dtype="fp32")
    for rows in GATE_ROWS:
        errors = [0.0, 0.0]
        generator = torch.Generator("cuda").manual_seed(rows)
        slots = torch.randperm(rows, device="cuda", generator=generator)
        pools = [model.new_pool(rows) for model in (fused, plain, exact)]
        for _ in range(3):
            ids = torch.randint(
                shape.vocab_size, (rows,), device="cuda", dtype=torch.int64, generator=generator
            )
            truth = exact.head(exact.decode_by_layer(ids, slots, pools[2]))
            got = fused.head(fused.decode(ids, slots, pools[0]))
            same = plain.head(plain.decode_by_layer(ids, slots, pools[1]))
            errors[0] = max(errors[0], relative_error(got, truth))
            errors[1] = max(errors[1], relative_error(same, truth))
        print(f"gate: {rows} rows, error {errors[0]:.2e}, layer by layer {errors[1]:.2e}")
        if not errors[0] <= 3 * errors[1]:
            sys.exit(f"the fused step is wrong at {rows} rows: {errors[0]:.2e}")


def measure(
    name: str, model: Model, rows: int, dtype: str, state_dtype: str, on: Machine, out: Path
) -> None:
    """Time one cell and write its line."""
    shape = SHAPES[name]
    pool = model.new_pool(rows)
    ids = torch.randint(shape.vocab_size, (rows,), device="cuda")
    slots = torch.randperm(rows, device="cuda")
    fused = model.fused
    if fused is None:
        sys.exit(f"{name} has no fused decode step on this device")
    times = time_replays(capture(lambda: fused.head(fused.decode(ids, slots, pool))))
    if not pool.wkv.isfinite().all():
        sys.exit("the recurrent state is not finite")
    moved = weight_bytes(shape, dtype) + 2 * rows * state_bytes(shape, state_dtype)
    limit = on.read_tb_per_s * 1e12 / moved
    steps = 1e3 / times.median_ms
    fields: dict[str, object] = {
        "model": name,
        "rows": rows,
        "states": 1,
        "requests": rows,
        "tokens_per_s": round(steps * rows, 1),
        "steps_per_s": round(steps, 1),
        "limit_per_s": round(limit, 1),
        "of_limit": round(steps / limit, 3),
        "median_ms": round(times.median_ms, 4),
        "p99_ms": round(times.p99_ms, 4),
        "dtype": dtype,
        "state_dtype": state_dtype,
        "scope": "token ids to logits, one graph replay",
    }
    write_line("decode", fields, on, out)


def main() -> None:
    """Parse, print the machine and the limits, gate, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--state-dtype", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    on = machine()
    print(on)
    for name in args.models:
        shape = SHAPES[name]
        for rows in args.rows:
            moved = weight_bytes(shape, args.dtype) + 2 * rows * state_bytes(
                shape, args.state_dtype
            )
            limit = on.read_tb_per_s * 1e12 / moved
            print(f"limit: {name}, {rows} rows: {limit:.0f} steps/s, {limit * rows:.0f} tokens/s")
        gate(shape, args.dtype, args.state_dtype)
        model = random_model(shape, dtype=args.dtype, state_dtype=args.state_dtype)
        for rows in args.rows:
            measure(name, model, rows, args.dtype, args.state_dtype, on, args.out)
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
