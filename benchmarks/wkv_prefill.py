"""RWKV-7's recurrence over whole sequences on CUDA: our blocks cut in several ways, our loop, fla.

Every form is first compared with the reference in fp64. Inputs are fp16 but the decay, states fp32.

    python benchmarks/wkv_prefill.py --shapes 1x1024x32 8x1024x32
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import RESULTS, Machine, Times, capture, machine, time_replays, write_line
from mrss_kernels import fla_prefill, reference, wkv7, wkv7_chunk
from mrss_kernels.blocked import Form
from mrss_kernels.wkv7_chunk import choose_form
from torch import Tensor

SIZE = 64
LOG_DECAY_BOUND = -0.6065306597126334
SHAPES = (
    "1x64x32",
    "1x128x32",
    "1x256x32",
    "1x512x32",
    "1x1024x32",
    "4x512x32",
    "8x1024x32",
    "8x512x64",
    "32x1x32",
    "1x128+31x1x32",
)
FORMS = {
    "fp16 64/4 terms 1": Form("fp16", 64, 4, 3, 1),
    "fp16 64/4 terms 2": Form("fp16", 64, 4, 3, 2),
    "fp16 64/4 terms 4": Form("fp16", 64, 4, 3, 4),
    "fp16 64/4 stages 2": Form("fp16", 64, 4, 2, 2),
    "fp16 32/2 terms 2": Form("fp16", 32, 2, 3, 2),
    "bf16x3 64/4 terms 2": Form("bf16x3", 64, 4, 2, 2),
    "bf16x3 64/4 terms 4": Form("bf16x3", 64, 4, 2, 4),
    "bf16x3 16/1 terms 2": Form("bf16x3", 16, 1, 3, 2),
}
GATE_LENGTHS = (1, 63, 130)
GATE_HEADS = 32
# Calls in a graph, as many layers would make them: what a launch costs is seen, a replay is not.
CALLS = 8
# One rounding to half precision, and to fp32 as the tests have it.
FLOOR = {"fp16": 5e-4, "bf16x3": 5e-4, "fp32": 5e-7}


def lengths_of(shape: str) -> tuple[list[int], int]:
    """Return the sequences' lengths and H of `n x T [+ n x T ..] x H`."""
    parts, heads = shape.rsplit("x", 1)
    pairs = [part.split("x") for part in parts.split("+")]
    return [int(length) for n, length in pairs for _ in range(int(n))], int(heads)


class Call:
    """Inputs of one layer: sequences of `lengths`, each with a slot of its own."""

    def __init__(self, lengths: list[int], heads: int, dtype: torch.dtype, seed: int) -> None:
        """Draw them; the model's decay is fp32."""
        generator = torch.Generator("cuda").manual_seed(seed)
        tokens, n = sum(lengths), len(lengths)
        r, w, k, v, kk, a = torch.randn(
            6, tokens, heads, SIZE, device="cuda", generator=generator
        ).unbind(0)
        kk = torch.nn.functional.normalize(kk, dim=-1)
        half = [x.to(dtype) for x in (r, k, v, kk, a.sigmoid())]
        self.vectors = [half[0], LOG_DECAY_BOUND * w.sigmoid(), *half[1:]]
        self.pool = torch.randn(n, heads, SIZE, SIZE, device="cuda", generator=generator)
        self.slots = torch.randperm(n, device="cuda", generator=generator)
        self.host_offsets = [0, *itertools.accumulate(lengths)]
        self.offsets = torch.tensor(self.host_offsets, device="cuda")

    def blocks(self, form: Form | None) -> Tensor:
        return wkv7_chunk.wkv7_prefill(
            *self.vectors, self.pool, self.slots, self.offsets, form=form
        )

    def loop(self) -> Tensor:
        return wkv7.wkv7_prefill(*self.vectors, self.pool, self.slots, self.offsets)

    def fla(self) -> Tensor:
        return fla_prefill.wkv7_prefill(*self.vectors, self.pool, self.slots, self.host_offsets)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the difference over that of `exact`."""
    return float((got.double() - exact).norm() / exact.norm())


def errors_of(run: Callable[[Call], Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """Return the relative errors of y and of the states."""
    call = Call(list(GATE_LENGTHS), GATE_HEADS, dtype, seed=1)
    exact = call.pool.double()
    vectors = [x.double() for x in call.vectors]
    truth = reference.wkv7_prefill(*vectors, exact, call.slots, call.host_offsets)
    y = run(call)
    return relative_error(y, truth), relative_error(call.pool, exact)


def gate(name: str, run: Callable[[Call], Tensor], precision: str, dtype: torch.dtype) -> None:
    """Stop unless `run` is as right as its products can be."""
    errors = errors_of(run, dtype)
    print(f"gate: {name}, {dtype}: error of y {errors[0]:.2e}, of the state {errors[1]:.2e}")
    if not max(errors) <= 2 * FLOOR[precision]:
        sys.exit(f"{name} is wrong")


def time_graph(run: Callable[[Call], Tensor], calls: list[Call]) -> Times:
    """Time one of `CALLS` calls in a graph."""

    def step() -> None:
        for i in range(CALLS):
            run(calls[i % len(calls)])

    times = time_replays(capture(step), budget_s=0.1)
    return Times(times.median_ms / CALLS, times.p99_ms / CALLS)


def time_eager(run: Callable[[Call], Tensor], calls: list[Call]) -> Times:
    """Time calls one by one, as what copies from the host cannot be captured."""
    for call in calls * 3:
        run(call)
    found = []
    for i in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(calls[i % len(calls)])
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    found.sort()
    return Times(found[len(found) // 2], found[-1])


def moved_bytes(call: Call) -> int:
    """Return what must move: vectors once, y in fp32, states in and out."""
    vectors = sum(x.numel() * x.itemsize for x in call.vectors)
    return vectors + call.vectors[0].numel() * 4 + 2 * call.pool.numel() * call.pool.itemsize


def measure(shape: str, dtype: torch.dtype, forms: dict[str, Form], on: Machine, out: Path) -> None:
    """Time one shape in every form, and write the lines."""
    lengths, heads = lengths_of(shape)
    # Small calls get inputs of their own, as layers have; large ones do not stay in the L2 anyway.
    calls = [Call(lengths, heads, dtype, seed=2 + i) for i in range(CALLS)]
    if sum(lengths) > 1024:
        calls = calls[:2]
    limit_us = moved_bytes(calls[0]) / on.read_tb_per_s / 1e6
    print(f"limit: {shape}, {limit_us:.1f} us")
    chosen = choose_form(len(lengths) * heads, SIZE, dtype)
    runs = [(name, partial(Call.blocks, form=form), time_graph) for name, form in forms.items()]
    runs.append(("loop", Call.loop, time_graph))
    if fla_prefill.is_available() and dtype != torch.float32 and min(lengths) > 1:
        runs.append(("fla, eager", Call.fla, time_eager))
    for name, run, timer in runs:
        times = timer(run, calls)
        fields: dict[str, object] = {
            "shape": shape,
            "form": name,
            "chosen": forms.get(name) == chosen or (name == "loop" and chosen is None),
            "median_us": round(times.median_ms * 1e3, 2),
            "p99_us": round(times.p99_ms * 1e3, 2),
            "limit_us": round(limit_us, 2),
            "dtype": str(dtype).removeprefix("torch."),
            "state_dtype": "fp32",
        }
        write_line("wkv_prefill", fields, on, out)
    if not all(call.pool.isfinite().all() for call in calls):
        sys.exit("a state is not finite")


def main() -> None:
    """Parse, gate every form, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--forms", default="", help="only forms whose name holds this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    on = machine()
    print(on)
    half, single = torch.float16, torch.float32
    forms = {name: form for name, form in FORMS.items() if args.forms in name}
    for name, form in forms.items():
        gate(name, partial(Call.blocks, form=form), form.precision, half)
    exact = {"fp32 16/2": Form("fp32", 16, 2, 3, 2)}
    for name, form in exact.items():
        gate(name, partial(Call.blocks, form=form), form.precision, single)
    gate("loop", Call.loop, "fp32", half)
    for shape in args.shapes:
        measure(shape, half, forms, on, args.out)
    measure("1x1024x32", single, exact, on, args.out)


if __name__ == "__main__":
    main()
