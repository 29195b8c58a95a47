"""How products of few rows with quantised weights are cut: sweeps of one shape on CUDA.

    python benchmarks/quantize_sweep.py --rows 4 32

Prints, for each matrix of a 1.5B layer and each cut, microseconds a product in a graph of many with
weights that the L2 does not hold, against those of the cut that `choose_quantized_config` takes and
of 16 bits. A cut with wrong sums shows as nan.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import capture, time_replays
from mrss_kernels.linear_cuts import LinearConfig
from mrss_kernels.quantized import QuantizedWeight, dequantize
from mrss_kernels.quantized_linear import choose_quantized_config, quantized_linear
from mrss_kernels.rows_linear import check_config, rows_linear
from triton.runtime.errors import OutOfResources

from mrss_provider.model.quantized import quantize

SHAPES = {
    "project": (6720, 2048),
    "output": (2048, 2048),
    "key": (8192, 2048),
    "value": (2048, 8192),
    "head": (65536, 2048),
}
FORMATS = ("int8", "int4")
NUM_PROCESSES = 14
# More than the L2 holds.
ROTATED_BYTES = 150e6


def cuts(form: str, rows: int, size_r: int, size_k: int) -> Iterator[LinearConfig]:
    """Yield what is tried."""
    if rows == 1:
        yield from _cuts_of_one_row(size_r, size_k)
        return
    splits = [1] if size_r > 10000 else [1, 2, 4]
    # Outputs, columns of K, warps, stages.
    shapes = [(64, 128, 4, 4), (64, 256, 4, 3)]
    if rows <= 16 and form == "int4":
        shapes += [(32, 512, 4, 4), (32, 1024, 4, 3), (16, 512, 4, 4), (16, 1024, 4, 3)]
    elif rows <= 16:
        shapes += [(32, 256, 4, 4), (32, 512, 4, 3), (32, 512, 4, 4), (16, 512, 4, 4)]
        shapes += [(16, 1024, 4, 3)]
    else:
        shapes += [(64, 128, 4, 6), (32, 512, 4, 3)]
    for (block_n, block_k, num_warps, stages), num_splits in itertools.product(shapes, splits):
        config = LinearConfig(block_n, block_k, num_splits, num_warps, stages)
        try:
            check_config(config, rows, size_k, False, "none")
        except ValueError:
            continue
        yield config


def _cuts_of_one_row(size_r: int, size_k: int) -> Iterator[LinearConfig]:
    splits = (2, 4) if size_k > size_r else (1,)
    for block_n, block_k, num_warps in (
        *((4, 1024, 2), (4, 1024, 4), (8, 1024, 4), (4, 2048, 4), (8, 2048, 4), (8, 2048, 8)),
        *((16, 1024, 4), (16, 1024, 8)),
    ):
        for num_splits in splits:
            yield LinearConfig(block_n, block_k, num_splits, num_warps, 1)


def cells(rows: list[int]) -> list[tuple[str, int, str, LinearConfig | None]]:
    """Return format, rows, matrix and cut of each cell; None is the chosen cut."""
    found: list[tuple[str, int, str, LinearConfig | None]] = []
    for count, (name, shape) in itertools.product(rows, SHAPES.items()):
        found.append(("fp16", count, name, None))
        for form in FORMATS:
            found.append((form, count, name, None))
            found += [(form, count, name, config) for config in cuts(form, count, *shape)]
    return found


def run(form: str, rows: int, name: str, config: LinearConfig | None, *, timed: bool) -> float:
    """Return microseconds a product, or 0 where it was only compiled."""
    x = torch.randn(1, rows, SHAPES[name][1], device="cuda", dtype=torch.float16)
    weights = held(form, name, timed=timed)

    def products() -> None:
        for weight in weights:
            if isinstance(weight, QuantizedWeight):
                quantized_linear(x, weight, config=config, one_part=name == "head")
            else:
                rows_linear(x, weight, one_part=name == "head")

    try:
        products()
    except OutOfResources:
        return math.nan
    if not timed:
        return 0.0
    if form != "fp16":
        exact = x[0].float() @ dequantize(weights[0], torch.float32).t()  # type: ignore[arg-type]
        got = quantized_linear(x, weights[0], config=config).sum(0)  # type: ignore[arg-type]
        if not (got - exact).norm() < 2e-3 * exact.norm():
            return math.nan
    return time_replays(capture(products), budget_s=0.02).median_ms * 1e3 / len(weights)


_held: dict[tuple[str, str], list[torch.Tensor | QuantizedWeight]] = {}


def held(form: str, name: str, *, timed: bool) -> list[torch.Tensor | QuantizedWeight]:
    """Return so many weights of a matrix that the L2 cannot hold them; one to compile with."""
    if (form, name) not in _held:
        size_r, size_k = SHAPES[name]
        weight = torch.randn(size_r, size_k, device="cuda", dtype=torch.float16)
        scratch = torch.empty(1, dtype=torch.float16, device="cuda")
        a_weight = {"fp16": 2.0, "int8": 1.0, "int4": 0.53}[form]
        count = int(ROTATED_BYTES / (size_r * size_k * a_weight)) + 1 if timed else 1
        _held[form, name] = [
            weight.clone() if form == "fp16" else quantize(weight, form, scratch)  # type: ignore[arg-type]
            for _ in range(count)
        ]
    return _held[form, name]


def main() -> None:
    """Compile in several processes, then time in this one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 32])
    parser.add_argument("--out", type=Path, help="write the best cuts, for quantize_gpu.py --cuts")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    todo = cells(args.rows)
    if args.share is not None:
        for cell in todo[args.share :: NUM_PROCESSES]:
            run(*cell, timed=False)
        return
    command = [sys.executable, __file__, "--rows", *map(str, args.rows), "--share"]
    shares = [subprocess.Popen([*command, str(i)]) for i in range(NUM_PROCESSES)]
    for share in shares:
        share.wait()
    best_cuts: dict[str, tuple[float, LinearConfig]] = {}
    for form, rows, name, config in todo:
        took = run(form, rows, name, config, timed=True)
        size_r, size_k = SHAPES[name]
        for kind in ("any", "one part"):
            key = f"{form} {rows} {size_r} {size_k} {kind}"
            fits = config is not None and (kind == "any" or config.num_splits == 1)
            if fits and config is not None and took < best_cuts.get(key, (math.inf,))[0]:
                best_cuts[key] = took, config
        chosen = ""
        if form != "fp16":
            best = config or choose_quantized_config(
                form, rows, size_r, size_k, splittable=name != "head", shared_bytes=227 << 10
            )
            chosen = f"BN {best.block_n} BK {best.block_k} parts {best.num_splits}"
            chosen += f" stages {best.num_stages}"
            chosen += "" if config else " (chosen)"
        print(f"{rows:3} rows {name:8} {form:5} {took:7.2f} us  {chosen}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(best_cuts))


if __name__ == "__main__":
    main()
