"""What reading only the FFN's useful rows gains, by the share of zeros among its activations.

Random weights of official shapes, their keys lowered until the wanted share of `max(x, 0)^2` is
zero (trained models: 0.77 to 0.97; random ones: 0.5), the same model with and without the sparse
product, one graph replay a step. The share is measured in the run. A cell counts only if the
sparse step agrees with the dense one.

    python benchmarks/sparse_ffn.py --models 1.5b --zeros 0.5 0.77 0.9
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from decode import relative_error
from measure import RESULTS, capture, machine, time_replays, write_line
from random_models import SHAPES, random_model, zero_share
from torch import Tensor

from mrss_provider.model import Model

ROWS = (1, 2, 4, 5, 8)
ZEROS = (0.5, 0.77, 0.9, 0.95)
# The two forms add up in another order, and every layer rounds what it gives on to 16 bits: a last
# bit that falls otherwise early is some 1e-2 after 24 layers. The product alone is checked in fp64.
MAX_ERROR = 3e-2


def step_of(model: Model, rows: int, *, sparse: bool) -> tuple[Tensor, float]:
    """Return the logits after three steps from zero states, and milliseconds of a step."""
    fused = model.fused
    if fused is None:
        sys.exit("this model has no fused decode step on this device")
    fused.reads_sparsely = sparse
    pool = model.new_pool(rows)
    ids = torch.arange(1, rows + 1, device="cuda")
    slots = torch.arange(rows, device="cuda")
    for _ in range(3):
        logits = fused.head(fused.decode(ids, slots, pool))
    times = time_replays(capture(lambda: fused.head(fused.decode(ids, slots, pool))))
    return logits, times.median_ms


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
            model = random_model(SHAPES[name], dtype="fp16", ffn_zeros=zeros)
            share = zero_share(model)
            for rows in args.rows:
                dense, dense_ms = step_of(model, rows, sparse=False)
                sparse, sparse_ms = step_of(model, rows, sparse=True)
                error = relative_error(sparse, dense)
                if not error <= MAX_ERROR:
                    sys.exit(f"the sparse step is wrong at {rows} rows: {error:.2e}")
                fields: dict[str, object] = {
                    "model": name,
                    "rows": rows,
                    "zeros": round(share, 3),
                    "steps_per_s": round(1e3 / sparse_ms, 1),
                    "dense_steps_per_s": round(1e3 / dense_ms, 1),
                    "gain": round(dense_ms / sparse_ms, 3),
                    "error": float(f"{error:.2e}"),
                    "dtype": "fp16",
                    "state_dtype": "fp32",
                    "scope": "token ids to logits, one graph replay",
                }
                write_line("sparse_ffn", fields, on, args.out)
            del model
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
