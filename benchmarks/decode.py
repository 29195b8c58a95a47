"""Decode speed on CUDA: one graph replay a step, from token ids to fp32 logits.

Random weights of the official shapes with the dense FFN; sampling is not part of the step. A
shape is timed only after its fused step agreed with the layer by layer one in fp32.

    python benchmarks/decode.py --models 1.5b --rows 1 4 8
    python benchmarks/decode.py --dtype fp16 bf16 --state-dtype fp32 fp16
    python benchmarks/decode.py --models 1.5b --rows 1 --profile

Other engines run beside it in `rivals.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import RESULTS, Machine, capture, machine, time_replays, write_line
from random_models import SHAPES, Shape, random_model, state_bytes, weight_bytes
from torch.autograd.profiler_util import FunctionEvent

from mrss_provider.model import Model

MODELS = ("0.1b", "1.5b", "7.2b")
# 5 is a mixture of four states with its base.
ROWS = (1, 2, 3, 4, 5, 6, 8, 16, 32, 64, 128, 256, 512)
GATE_ROWS = (1, 4, 6, 11, 33, 100)
SCOPE = "token ids to logits, one graph replay"
# Compiling takes longer than measuring; processes that only compile share it.
COMPILERS_A_MODEL = 4
COMPILE_S = 240.0


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
    decoder = fused.fused
    if decoder is None:
        sys.exit("there is no fused decode step on this device")
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
            got = decoder.decode_logits(ids, slots, pools[0])
            same = plain.head(plain.decode_by_layer(ids, slots, pools[1]))
            errors[0] = max(errors[0], relative_error(got, truth))
            errors[1] = max(errors[1], relative_error(same, truth))
        print(f"gate: {rows} rows, error {errors[0]:.2e}, layer by layer {errors[1]:.2e}")
        if not errors[0] <= 3 * errors[1]:
            sys.exit(f"the fused step is wrong at {rows} rows: {errors[0]:.2e}")


def steps_limit(shape: Shape, rows: int, dtype: str, state_dtype: str, on: Machine) -> float:
    """Return the steps per second that reading the weights and moving the states allows."""
    moved = weight_bytes(shape, dtype) + 2 * rows * state_bytes(shape, state_dtype)
    return on.read_tb_per_s * 1e12 / moved


def decode_fields(
    name: str, rows: int, ms: float, dtype: str, state_dtype: str, on: Machine
) -> dict[str, object]:
    """Return the fields of a line for a step of `rows` rows that takes `ms` milliseconds."""
    limit = steps_limit(SHAPES[name], rows, dtype, state_dtype, on)
    steps = 1e3 / ms
    return {
        "model": name,
        "rows": rows,
        "states": 1,
        "requests": rows,
        "tokens_per_s": round(steps * rows, 1),
        "steps_per_s": round(steps, 1),
        "limit_per_s": round(limit, 1),
        "of_limit": round(steps / limit, 3),
        "median_ms": round(ms, 4),
        "dtype": dtype,
        "state_dtype": state_dtype,
    }


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
    times = time_replays(capture(lambda: fused.decode_logits(ids, slots, pool)))
    if not pool.wkv.isfinite().all():
        sys.exit("the recurrent state is not finite")
    fields = decode_fields(name, rows, times.median_ms, dtype, state_dtype, on)
    fields |= {"p99_ms": round(times.p99_ms, 4), "engine": "mrss", "scope": SCOPE}
    fields["in_one_launch"] = rows in getattr(fused, "persistent_rows", ())
    write_line("decode", fields, on, out)


def profile(model: Model, rows: int) -> None:
    """Print where the time of a step goes: kernels by their share, ten steps of a graph."""
    fused = model.fused
    if fused is None:
        sys.exit("this model has no fused decode step on this device")
    pool = model.new_pool(rows)
    ids = torch.randint(model.config.vocab_size, (rows,), device="cuda")
    slots = torch.randperm(rows, device="cuda")
    graph = capture(lambda: fused.decode_logits(ids, slots, pool))
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
    print(f"profile: {rows} rows, ten steps")
    table = run.key_averages().table(sort_by="self_cuda_time_total", max_name_column_width=40)
    print(table)
    if rows in getattr(fused, "persistent_rows", ()):
        # All layers are one kernel.
        return
    by_place = layer_times([event for event in run.events() if event.device_type.name == "CUDA"])
    print("us of a layer, from one kernel's end to the next one's:")
    print(", ".join(f"{name} {us:.1f}" for name, us in by_place))
    print(f"sum {sum(us for _, us in by_place):.1f}")


def layer_times(events: list[FunctionEvent]) -> list[tuple[str, float]]:
    """Return a layer's kernels, norm to value, and the median of what each adds to its time.

    A kernel that starts early adds what it takes beyond the end of the one in front.

    Args:
        events: the kernels of some steps, in any order.
    """
    events = sorted(events, key=lambda event: event.time_range.end)
    names = [event.name.removesuffix("_kernel") for event in events]
    added = [b.time_range.end - a.time_range.end for a, b in itertools.pairwise(events)]
    mixes = [i for i, name in enumerate(names) if name.startswith("time_mix7")]
    length = statistics.mode(b - a for a, b in itertools.pairwise(mixes))
    # In front of a layer's time mixing stand its norm, its first product and perhaps `lora_up`.
    ahead = 2 + any(name.startswith("lora_up") for name in names)
    firsts = [a - ahead for a, b in itertools.pairwise(mixes) if b - a == length and a > ahead]
    return [
        (names[firsts[0] + j], statistics.median(added[i + j - 1] for i in firsts))
        for j in range(length)
    ]


def compile_only(shape: Shape, rows: list[int], dtype: str, state_dtype: str) -> None:
    """Compile the kernels that steps of these row counts need, and leave them in Triton's cache."""
    model = random_model(
        dataclasses.replace(shape, num_layers=2), dtype=dtype, state_dtype=state_dtype
    )
    fused = model.fused
    assert fused is not None
    for count in rows:
        pool = model.new_pool(count)
        ids = torch.zeros(count, dtype=torch.int64, device="cuda")
        fused.decode_logits(ids, torch.arange(count, device="cuda"), pool)
    torch.cuda.synchronize()


def compile_in_parallel(args: argparse.Namespace) -> None:
    """Fill Triton's cache from several processes; what fails shows later, where it is used."""
    cells = itertools.product(args.models, args.dtype, args.state_dtype)
    rows = sorted({*args.rows, *GATE_ROWS})
    started = time.monotonic()
    children = []
    for name, dtype, state_dtype in cells:
        for first in range(COMPILERS_A_MODEL):
            own = list(map(str, rows[first::COMPILERS_A_MODEL]))
            options = ["--dtype", dtype, "--state-dtype", state_dtype]
            command = [sys.executable, __file__, "--compile-only", "--models", name, *options]
            if own:
                children.append(subprocess.Popen([*command, "--rows", *own]))
        # Those of one model at a time where processors are few.
        if len(children) >= (os.cpu_count() or 1):
            _wait(children, started)
    _wait(children, started)
    print(f"compiled in {time.monotonic() - started:.0f} s")


def _wait(children: list[subprocess.Popen[bytes]], started: float) -> None:
    for child in children:
        try:
            child.wait(max(1.0, started + COMPILE_S - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    children.clear()


def main() -> None:
    """Parse, print the machine and the limits, gate, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--dtype", nargs="+", choices=["fp16", "bf16"], default=["fp16"])
    parser.add_argument("--state-dtype", nargs="+", choices=["fp32", "fp16"], default=["fp32"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--profile", action="store_true", help="print kernels, write no line")
    parser.add_argument("--one-process", action="store_true", help="compile while measuring")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.compile_only:
        compile_only(SHAPES[args.models[0]], args.rows, args.dtype[0], args.state_dtype[0])
        return
    on = machine()
    print(on)
    if not args.one_process:
        compile_in_parallel(args)
    for name, dtype, state_dtype in itertools.product(args.models, args.dtype, args.state_dtype):
        shape = SHAPES[name]
        for rows in args.rows:
            limit = steps_limit(shape, rows, dtype, state_dtype, on)
            print(f"limit: {name}, {rows} rows: {limit:.0f} steps/s, {limit * rows:.0f} tokens/s")
        gate(shape, dtype, state_dtype)
        model = random_model(shape, dtype=dtype, state_dtype=state_dtype)
        for rows in args.rows:
            if args.profile:
                profile(model, rows)
            else:
                measure(name, model, rows, dtype, state_dtype, on, args.out)
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
