"""What reading only the FFN's useful rows gains, by the share of zeros among its activations.

Random weights of official shapes, their keys lowered until the wanted share of `max(x, 0)^2` is
zero (trained models: 0.77 to 0.97; random ones: 0.5), the same model with and without the sparse
product, one graph replay a step. The share is measured in the run. A share counts only if the
sparse step, two layers deep, is as right as the dense one (24 random layers amplify a last bit to
some 1e-2 in the logits, so the whole model cannot tell).

    python benchmarks/sparse_ffn.py --models 1.5b --zeros 0.5 0.77 0.9
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from decode import relative_error
from measure import RESULTS, capture, machine, time_replays, write_line
from random_models import SHAPES, Shape, random_model, zero_share
from torch import Tensor

from mrss_provider.model import Model
from mrss_provider.model.rwkv7_cuda import FusedDecoder

ROWS = (1, 2, 4, 5, 8)
ZEROS = (0.5, 0.77, 0.9, 0.95)


def gate(shape: Shape, zeros: float) -> None:
    """Stop unless the sparse step is as right as the dense one; the truth is fp32."""
    small = dataclasses.replace(shape, num_layers=2)
    exact = random_model(small, dtype="fp16", compute_dtype="fp32", ffn_zeros=zeros)
    model = random_model(small, dtype="fp16", ffn_zeros=zeros)
    for rows in (1, 5):
        truth = logits_after(exact, rows, None)
        dense = relative_error(logits_after(model, rows, False), truth)
        sparse = relative_error(logits_after(model, rows, True), truth)
        print(f"gate: {rows} rows, error {sparse:.2e}, dense {dense:.2e}")
        if not sparse <= 3 * dense:
            sys.exit(f"the sparse step is wrong at {rows} rows: {sparse:.2e}")


def logits_after(model: Model, rows: int, sparse: bool | None) -> Tensor:
    """Return the logits after three steps from zero states; `sparse` None is layer by layer."""
    pool = model.new_pool(rows)
    ids = torch.arange(1, rows + 1, device="cuda")
    slots = torch.arange(rows, device="cuda")
    for _ in range(3):
        if sparse is None:
            logits = model.head(model.decode_by_layer(ids, slots, pool))
        else:
            fused = _fused(model, sparse)
            logits = fused.decode_logits(ids, slots, pool)
    return logits


def _fused(model: Model, sparse: bool) -> FusedDecoder:
    if not isinstance(model.fused, FusedDecoder):
        sys.exit("this model has no fused decode step with a sparse form on this device")
    model.fused.sparse_rows = max(ROWS) if sparse else 0
    return model.fused


def step_ms(model: Model, rows: int, *, sparse: bool) -> float:
    """Return milliseconds of a step."""
    fused = _fused(model, sparse)
    pool = model.new_pool(rows)
    ids = torch.arange(1, rows + 1, device="cuda")
    slots = torch.arange(rows, device="cuda")
    return time_replays(capture(lambda: fused.decode_logits(ids, slots, pool))).median_ms


def main() -> None:
    """Parse, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=["1.5b", "7.2b"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--zeros", nargs="+", type=float, default=list(ZEROS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    on = machine()
    print(on)
    for name in args.models:
        for zeros in args.zeros:
            gate(SHAPES[name], zeros)
            model = random_model(SHAPES[name], dtype="fp16", ffn_zeros=zeros)
            share = zero_share(model)
            for rows in args.rows:
                dense_ms = step_ms(model, rows, sparse=False)
                sparse_ms = step_ms(model, rows, sparse=True)
                fields: dict[str, object] = {
                    "model": name,
                    "rows": rows,
                    "zeros": round(share, 3),
                    "steps_per_s": round(1e3 / sparse_ms, 1),
                    "dense_steps_per_s": round(1e3 / dense_ms, 1),
                    "gain": round(dense_ms / sparse_ms, 3),
                    "dtype": "fp16",
                    "state_dtype": "fp32",
                    "scope": "token ids to logits, one graph replay",
                }
                write_line("sparse_ffn", fields, on, args.out)
            del model
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
