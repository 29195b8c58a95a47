"""Prefill speed of RWKV-7 and RWKV-6 on CUDA: packed prompts, and chunks beside decoding rows.

Random weights of the official shapes with the dense FFN. A shape is timed only after its packed
pass agreed with the layer by layer one in fp32. Up to 2,048 tokens a pass is one graph replay, as
in the engine; above, its kernels are launched one by one.

    python benchmarks/prefill.py --models 1.5b --cells 8x1024 32+128
    python benchmarks/prefill.py --models v6-1.6b --cells 8x1024 --profile

How its kernels are cut is swept by `prefill_kernels.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from measure import RESULTS, Machine, Times, capture, machine, time_replays, write_line
from random_models import SHAPES, Shape, layer_weights, random_model, state_bytes, weight_bytes

from mrss_provider.model import Model
from mrss_provider.model.config import DTYPES
from mrss_provider.model.cuda_graphs import TOKEN_BUCKETS

MODELS = ("0.1b", "1.5b", "7.2b")
# n x T: n prompts of T tokens. n+T: n decoding rows and one prompt chunk of T tokens.
CELLS = ("1x128", "1x512", "1x1024", "8x512", "8x1024", "32x512", "32+0", "32+128")
GATE_LENGTHS = ([5], [1, 1, 7, 1], [128], [100, 1, 33], [1, 700, 3], [1500])
# The layer by layer form has the same recurrence, so being as good as it is not enough.
MAX_ERROR = {"fp16": 2e-2, "bf16": 1e-1}
COMPILE_S = 240.0

# Which kernels the lines of a profile add up; the first that matches counts.
GROUPS = {
    "products": r"gemm|nvjet|cutlass|xmma|cublas|skinny_kernel|gemv_kernel|splitKreduce",
    "recurrence": r"wkv[67]",
    "norm and mix": r"norm_mix|norm_last|add_norm",
    "first halves of LoRAs": r"lora_down",
    "before the recurrence": r"time_inputs[67]|ragged_inputs6",
    "after the recurrence": r"time_output[67]",
    "relu^2": r"square_relu",
}


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the root mean square of the difference over that of `exact`."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def lengths_of(cell: str) -> list[int]:
    """Return the lengths of a cell's sequences: "8x512", "32+128" or "100,1,33"."""
    if cell.replace(",", "").isdigit():
        return list(map(int, cell.split(",")))
    if "x" in cell:
        count, length = map(int, cell.split("x"))
        return [length] * count
    rows, chunk = map(int, cell.split("+"))
    return [1] * rows + [chunk] * (chunk > 0)


def gate(shape: Shape, dtype: str, state_dtype: str) -> None:
    """Stop unless the packed pass is as right as the layer by layer one, two layers deep.

    The truth is the same weights in fp32, layer by layer. Logits and states are compared, over two
    passes, the second of which goes on from the first one's states.
    """
    small = dataclasses.replace(shape, num_layers=2)
    fused = random_model(small, dtype=dtype, state_dtype=state_dtype)
    plain = random_model(small, dtype=dtype, state_dtype=state_dtype)
    exact = random_model(small, dtype=dtype, state_dtype="fp32", compute_dtype="fp32")
    for lengths in GATE_LENGTHS:
        worst = [0.0, 0.0]
        generator = torch.Generator("cuda").manual_seed(sum(lengths))
        ends = [0, *itertools.accumulate(lengths)]
        slots = torch.randperm(len(lengths), device="cuda", generator=generator)
        pools = [model.new_pool(len(lengths)) for model in (exact, fused, plain)]
        for _ in range(2):
            ids = torch.randint(shape.vocab_size, (ends[-1],), device="cuda", generator=generator)
            truth = exact.head(exact.prefill_by_layer(ids, ends, slots, pools[0]))
            got = fused.head(fused.prefill(ids, ends, slots, pools[1]))
            same = plain.head(plain.prefill_by_layer(ids, ends, slots, pools[2]))
            for i, logits in enumerate((got, same)):
                state = relative_error(pools[i + 1].wkv, pools[0].wkv)
                worst[i] = max(worst[i], relative_error(logits, truth), state)
        print(f"gate: lengths {lengths}, error {worst[0]:.2e}, layer by layer {worst[1]:.2e}")
        if not worst[0] <= min(3 * worst[1], MAX_ERROR[dtype]):
            sys.exit(f"the packed pass is wrong at lengths {lengths}: {worst[0]:.2e}")


def matmul_rate(dtype: str) -> float:
    """Return FLOPs per second of a product of 8,192 cubed, the best of ten."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(DTYPES[dtype]) for _ in range(2))
    graph = capture(lambda: torch.mm(a, b))
    return 2 * 8192**3 / (time_replays(graph, count=20).median_ms / 1e3)


def limit_s(
    shape: Shape, lengths: list[int], dtype: str, state_dtype: str, on: Machine, rate: float
) -> float:
    """Return the seconds that a pass takes at least: its products, or its bytes.

    Bytes are the weights and the states; activations are not counted.
    """
    num_seqs, head = len(lengths), shape.vocab_size * shape.hidden_size
    flops = 2 * (sum(lengths) * shape.num_layers * layer_weights(shape) + num_seqs * head)
    moved = weight_bytes(shape, dtype) + 2 * num_seqs * state_bytes(shape, state_dtype)
    return max(flops / rate, moved / (on.read_tb_per_s * 1e12))


def make_pass(model: Model, lengths: list[int]) -> Callable[[], torch.Tensor]:
    """Return a call that reads random tokens of these lengths and computes the last logits."""
    step = model.ragged
    if step is None:
        sys.exit("this model has no packed pass on this device")
    ends = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda")
    pool = model.new_pool(len(lengths))
    ids = torch.randint(model.config.vocab_size, (sum(lengths),), device="cuda")
    slots = torch.randperm(len(lengths), device="cuda")
    return lambda: model.head(step.forward(ids, ends, slots, pool))


def time_pass(model: Model, lengths: list[int]) -> Times:
    """Time a pass the way the engine runs one of its size."""
    run = make_pass(model, lengths)
    if sum(lengths) <= TOKEN_BUCKETS[-1]:
        return time_replays(capture(run))
    run()
    count = 12
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return Times(times[count // 2], times[-1])


def measure(
    name: str,
    model: Model,
    cell: str,
    dtype: str,
    state_dtype: str,
    on: Machine,
    rate: float,
    out: Path,
) -> None:
    """Time one cell and write its line; beside decoding rows, say what they take alone."""
    lengths = lengths_of(cell)
    count = sum(lengths)
    times = time_pass(model, lengths)
    limit = count / limit_s(SHAPES[name], lengths, dtype, state_dtype, on, rate)
    speed = count * 1e3 / times.median_ms
    graph = count <= TOKEN_BUCKETS[-1]
    fields: dict[str, object] = {
        "model": name,
        "cell": cell,
        "rows": len(lengths),
        "states": 1,
        "requests": len(lengths),
        "tokens": count,
        "tokens_per_s": round(speed, 1),
        "steps_per_s": round(1e3 / times.median_ms, 2),
        "limit_per_s": round(limit, 1),
        "of_limit": round(speed / limit, 3),
        "median_ms": round(times.median_ms, 4),
        "p99_ms": round(times.p99_ms, 4),
        "dtype": dtype,
        "state_dtype": state_dtype,
        "matmul_tflop_per_s": round(rate / 1e12, 1),
        "engine": "mrss",
        "scope": "token ids to last logits, " + ("one graph replay" if graph else "launched"),
    }
    if "+" in cell:
        alone = time_decode(model, int(cell.split("+")[0]))
        fields["decode_alone_ms"] = round(alone.median_ms, 4)
    write_line("prefill", fields, on, out)


def time_decode(model: Model, rows: int) -> Times:
    """Time a decode step of `rows` rows, which the mixed pass is compared with."""
    fused = model.fused
    assert fused is not None
    pool = model.new_pool(rows)
    ids = torch.randint(model.config.vocab_size, (rows,), device="cuda")
    slots = torch.randperm(rows, device="cuda")
    return time_replays(capture(lambda: fused.decode_logits(ids, slots, pool)))


def profile(model: Model, cell: str) -> None:
    """Print where the time of a pass goes, by group of kernels and by kernel."""
    run = make_pass(model, lengths_of(cell))
    run()
    torch.cuda.synchronize()
    passes = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(passes):
            run()
        torch.cuda.synchronize()
    spent: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    kernels = [e for e in seen.key_averages() if e.self_device_time_total > 0]
    for event in kernels:
        group = next((g for g, names in GROUPS.items() if re.search(names, event.key)), "other")
        spent[group] += event.self_device_time_total / passes / 1e3
        launches[group] += event.count // passes
    total = sum(spent.values())
    # A kernel that may start early is counted from then on, while it waits for the one before.
    whole = time_pass(model, lengths_of(cell)).median_ms
    print(f"profile: {cell}, a pass takes {whole:.3f} ms; its kernels, waits included, {total:.3f}")
    for group in sorted(spent, key=lambda g: -spent[g]):
        share = spent[group] / total
        print(f"  {group:24} {spent[group]:9.3f} ms {share:6.1%} {launches[group]:5} launches")
    for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:25]:
        each = event.self_device_time_total / event.count
        print(f"    {each:9.1f} us x {event.count // passes:4}  {event.key[:90]}")


def compile_in_parallel(args: argparse.Namespace) -> None:
    """Fill Triton's cache, a process a model and cell; what fails shows later, where it is used."""
    started = time.monotonic()
    options = ["--compile-only", "--dtype", args.dtype, "--state-dtype", args.state_dtype]
    gates = [] if args.no_gate else [",".join(map(str, lengths)) for lengths in GATE_LENGTHS]
    children = [
        subprocess.Popen([sys.executable, __file__, *options, "--models", name, "--cells", cell])
        for name, cell in itertools.product(args.models, [*args.cells, *gates])
    ]
    for child in children:
        try:
            child.wait(max(1.0, started + COMPILE_S - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    print(f"compiled in {time.monotonic() - started:.0f} s")


def compile_only(shape: Shape, cell: str, dtype: str, state_dtype: str) -> None:
    """Run a pass of two layers, which leaves its kernels in Triton's cache."""
    small = dataclasses.replace(shape, num_layers=2)
    make_pass(random_model(small, dtype=dtype, state_dtype=state_dtype), lengths_of(cell))()
    torch.cuda.synchronize()


def main() -> None:
    """Parse, print the machine and the limits, gate, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=list(MODELS))
    parser.add_argument("--cells", nargs="+", default=list(CELLS))
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--state-dtype", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--grouped-tokens", type=int, help="as RaggedStep's attribute")
    parser.add_argument("--ffn-chunk-len", type=int, help="as RaggedStep's attribute")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--profile", action="store_true", help="print kernels, write no line")
    parser.add_argument("--no-gate", action="store_true", help="with --profile: skip the gate")
    parser.add_argument("--one-process", action="store_true", help="compile while measuring")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.compile_only:
        compile_only(SHAPES[args.models[0]], args.cells[0], args.dtype, args.state_dtype)
        return
    if args.no_gate and not args.profile:
        parser.error("--no-gate is for --profile: nothing is timed before it is right")
    on = machine()
    print(on)
    rate = matmul_rate(args.dtype)
    print(f"a product of 8,192 cubed: {rate / 1e12:.0f} TFLOP/s")
    if not args.one_process:
        compile_in_parallel(args)
    for name in args.models:
        shape = SHAPES[name]
        for cell in args.cells:
            lengths = lengths_of(cell)
            least = limit_s(shape, lengths, args.dtype, args.state_dtype, on, rate)
            speed = sum(lengths) / least
            print(f"limit: {name}, {cell}: {least * 1e3:.2f} ms, {speed:.0f} tokens/s")
        if not args.no_gate:
            gate(shape, args.dtype, args.state_dtype)
        model = random_model(shape, dtype=args.dtype, state_dtype=args.state_dtype)
        step = model.ragged
        if step is None:
            sys.exit(f"{name} has no packed pass on this device")
        step.grouped_tokens = args.grouped_tokens or step.grouped_tokens
        step.ffn_chunk_len = args.ffn_chunk_len or step.ffn_chunk_len
        for cell in args.cells:
            if args.profile:
                profile(model, cell)
            else:
                measure(name, model, cell, args.dtype, args.state_dtype, on, rate, args.out)
        del model, step
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
