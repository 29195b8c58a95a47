"""What quantised weights cost and give on CUDA: speed, memory, and how well the model predicts.

    python benchmarks/quantize.py gpu --model 1.5b

Random weights of an official shape for speed, the bundled model for what it predicts. A kind of
weights is timed only after its steps and prompts agreed, two layers deep, with the same weights in
fp32. Everything is compiled in other processes first. JSON lines go to
benchmarks/results/quantize.jsonl; the limit is the bytes of a step over measured read bandwidth.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from measure import RESULTS, Machine, capture, machine, time_replays
from mrss_kernels import quantized_linear as quantized_ops
from mrss_kernels.linear_cuts import LinearConfig
from mrss_kernels.quantized import dequantize
from quantize_scores import against, nats, scores, step_nats, unseen_documents
from random_models import (
    SHAPES,
    Shape,
    model_of,
    random_model,
    random_tensors,
    state_bytes,
    weight_bytes,
)

from mrss_provider.config import DEMO_MODEL
from mrss_provider.model import Model, load_model, products
from mrss_provider.model.quantized import quantize

KINDS = ("none", "int8", "fp8", "int4")
ROWS = (1, 2, 4, 5, 8, 32, 64)
# With quantised weights once by our kernels for few rows, and once written out for the library.
MANY_ROWS = (128, 256)
# Rows whose kernels a process compiles.
JOBS = ("1,2,4,5", "8,32,64", "128,256")
PROMPTS, PROMPT_LEN = 8, 1024
BYTES_A_WEIGHT = {"none": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5 + 2 / 64}
LARGE = (".weight", ".w1", ".a1", ".g1", ".v1")
GATES = {f"{rows} rows": [1] * rows for rows in (*ROWS, *MANY_ROWS)} | {"prompts": [3, 297]}
NUM_DOCUMENTS, NUM_STEPS = 120, 64
JOBS_S = 150.0


def gpu(model: str, kinds: list[str], out: Path = RESULTS) -> None:
    """Compile, gate and measure all kinds of one shape; then score the bundled model."""
    torch.set_grad_enabled(False)
    started = time.monotonic()
    on = machine()
    jobs = [f"{kind} {part}" for kind in kinds for part in (*JOBS, "prompts", "accuracy")]
    said = run_jobs(model, jobs)
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    for kind in kinds:
        gate(SHAPES[model], kind)
        for line in speed(model, kind, on):
            write(line, on, out)
    for job, text in said.items():
        if job.endswith("accuracy"):
            write(json.loads(text.splitlines()[-1]), on, out)
    print(f"all of it in {time.monotonic() - started:.0f} s")


def write(line: dict[str, object], on: Machine, folder: Path) -> None:
    """Print a line and append it to the results."""
    text = json.dumps(line | asdict(on))
    print(text, flush=True)
    with (folder / "quantize.jsonl").open("a") as file:
        file.write(text + "\n")


def run_jobs(model: str, jobs: list[str]) -> dict[str, str]:
    """Run each in a process of its own, all at once; what fails ends the benchmark."""
    command = [sys.executable, __file__, "--model", model, "--job"]
    running = {
        job: subprocess.Popen([*command, job], stdout=subprocess.PIPE, text=True) for job in jobs
    }
    ends = time.monotonic() + JOBS_S
    try:
        said = {
            job: p.communicate(timeout=ends - time.monotonic())[0] for job, p in running.items()
        }
    finally:
        for process in running.values():
            process.kill()
    failed = [job for job, process in running.items() if process.wait()]
    if failed:
        sys.exit(f"failed: {failed}")
    return said


def job(model: str, what: str) -> None:
    """Do one job: compile what some rows need, or score the bundled model."""
    torch.set_grad_enabled(False)
    kind, part = what.split()
    if part == "accuracy":
        print(json.dumps(accuracy(kind)))
        return
    # No kernel is another for a smaller vocabulary.
    small = dataclasses.replace(SHAPES[model], num_layers=2, vocab_size=8192)
    built = random_model(small, dtype="fp16", quantize=kind)
    if part == "prompts":
        read_prompts(built, [3, 297])
        read_prompts(built, [PROMPT_LEN] * PROMPTS)
        return
    for rows in map(int, part.split(",")):
        for max_rows in (0, rows):
            with mock.patch.object(products, "MAX_QUANTIZED_ROWS", max_rows):
                step(built, rows)()
    torch.cuda.synchronize()


def step(model: Model, rows: int) -> Callable[[], object]:
    """Return a decode step of so many rows, token ids to logits."""
    pool = model.new_pool(rows)
    ids = torch.arange(rows, device="cuda") % model.config.vocab_size
    slots = torch.randperm(rows, device="cuda")
    fused = model.fused
    assert fused is not None
    return lambda: fused.decode_logits(ids, slots, pool)


def stand_in(shape: Shape, kind: str, compute_dtype: str) -> Model:
    """Return the model of what the quantised weights stand for, in fp32 or fp16."""
    tensors = random_tensors(shape, dtype="fp16")
    scratch = torch.empty(1, device="cuda")
    for name, tensor in tensors.items():
        is_large = name.endswith(LARGE) and tensor.ndim == 2 and name != "emb.weight"
        if kind != "none" and is_large:
            tensors[name] = dequantize(quantize(tensor, kind, scratch), torch.float32)  # type: ignore[arg-type]
    return model_of(shape, tensors, dtype=compute_dtype)


def gate(shape: Shape, kind: str) -> None:
    """Stop unless steps and a prompt are as right as the layer by layer form in fp16."""
    small = dataclasses.replace(shape, num_layers=2)
    model = random_model(small, dtype="fp16", quantize=kind)
    plain, exact = (stand_in(small, kind, dtype) for dtype in ("fp16", "fp32"))
    models = (model, plain, exact)
    for what, lengths in GATES.items():
        bounds = [0, *itertools.accumulate(lengths)]
        ids = torch.arange(bounds[-1], device="cuda") * 7 % shape.vocab_size
        slots = torch.randperm(len(lengths), device="cuda")
        pools = [each.new_pool(len(slots)) for each in models]
        if max(lengths) == 1:
            hidden = [model.decode(ids, slots, pools[0])]
        else:
            hidden = [model.prefill(ids, bounds, slots, pools[0])]
        hidden += [
            each.prefill_by_layer(ids, bounds, slots, pool)
            for each, pool in zip(models[1:], pools[1:], strict=True)
        ]
        logits = [each.head(h).double() for each, h in zip(models, hidden, strict=True)]
        errors = [float((each - logits[2]).norm() / logits[2].norm()) for each in logits[:2]]
        print(f"gate: {kind}, {what}, error {errors[0]:.2e}, layer by layer {errors[1]:.2e}")
        if not errors[0] <= 3 * errors[1]:
            sys.exit(f"{kind} is wrong at {what}: {errors[0]:.2e}")


def speed(name: str, kind: str, on: Machine) -> list[dict[str, object]]:
    """Time steps and prompts of one kind."""
    before = torch.cuda.memory_allocated()
    model = random_model(SHAPES[name], dtype="fp16", quantize=kind)
    assert model.fused is not None
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated() - before
    facts: dict[str, object] = {"model": f"RWKV-7 {name} (random weights)", "kind": kind}
    lines: list[dict[str, object]] = [
        {"benchmark": "quantize gpu memory"} | facts | {"held_mb": held >> 20}
    ]
    cells = [(rows, rows) for rows in ROWS]
    cells += [(rows, most) for rows in MANY_ROWS for most in (rows, 0) if most or kind != "none"]
    for rows, max_rows in cells:
        with mock.patch.object(products, "MAX_QUANTIZED_ROWS", max_rows):
            times = time_replays(capture(step(model, rows)), budget_s=0.3)
        limit = on.read_tb_per_s * 1e12 / step_bytes(SHAPES[name], kind, rows)
        line = {"benchmark": "quantize gpu decode"} | facts | {"rows": rows}
        line |= {"is_written_out": not max_rows, "median_ms": round(times.median_ms, 4)}
        line |= {
            "steps_per_s": round(1e3 / times.median_ms, 1),
            "limit_per_s": round(limit, 1),
        }
        lines.append(line)
    best = read_prompts(model, [PROMPT_LEN] * PROMPTS, times=4)
    line = {"benchmark": "quantize gpu prompts"} | facts | {"prompts": PROMPTS}
    line |= {"prompt_len": PROMPT_LEN, "best_ms": round(best, 2)}
    lines.append(line | {"tokens_per_s": round(PROMPTS * PROMPT_LEN / best * 1e3)})
    return lines


def step_bytes(shape: Shape, kind: str, rows: int) -> float:
    """Return the bytes of weights that a step of so many rows reads, and of states it moves."""
    # Of the LoRAs only the first halves are quantised.
    halves = shape.num_layers * shape.hidden_size * sum(shape.ranks)
    large = weight_bytes(shape, "fp16") / 2 - halves
    return large * BYTES_A_WEIGHT[kind] + 2 * halves + 2 * rows * state_bytes(shape, "fp32")


def read_prompts(model: Model, lengths: list[int], *, times: int = 1) -> float:
    """Read packed prompts so many times; return the milliseconds that the fastest took."""
    bounds = [0, *itertools.accumulate(lengths)]
    ids = torch.arange(bounds[-1], device="cuda") * 7 % model.config.vocab_size
    pool, slots = model.new_pool(len(lengths)), torch.arange(len(lengths), device="cuda")
    taken = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model.prefill(ids, bounds, slots, pool)
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return float(min(taken))


def accuracy(kind: str) -> dict[str, object]:
    """Score documents that the bundled model has not seen, against fp32 on the same card."""
    documents = unseen_documents(NUM_DOCUMENTS)
    wanted = scores(load_model(DEMO_MODEL, device="cuda", dtype="fp32"), documents)
    model = load_model(DEMO_MODEL, device="cuda", dtype="fp16", quantize=kind)
    got = scores(model, documents)
    line: dict[str, object] = {
        "benchmark": "quantize gpu accuracy",
        "model": "bundled",
        "kind": kind,
    }
    line |= {"documents": len(documents), "tokens": sum(map(len, documents))}
    line |= against(got, wanted, documents)
    # Steps and prompts are other kernels: the same first tokens read both ways.
    first = [ids[: NUM_STEPS + 1] for ids in documents if len(ids) > NUM_STEPS][:32]
    read = [float(nats(*each).mean()) for each in zip(scores(model, first), first, strict=True)]
    by_step = step_nats(model, first)
    return line | {
        "nll_of_first_tokens": round(statistics.fmean(read), 6),
        "nll_by_step": round(by_step, 6),
    }


def take_cuts(path: Path) -> None:
    """Let products of few rows be cut as a sweep found best, where it has the shape."""
    found = json.loads(path.read_text())
    chosen = quantized_ops.choose_quantized_config

    def choose(
        form: str, rows: int, size_r: int, size_k: int, *, splittable: bool, **others: int
    ) -> LinearConfig:
        swept = 1 if rows == 1 else 4 if rows <= 16 else 32
        kind = "int8" if form == "fp8" else form
        key = f"{kind} {swept} {size_r} {size_k} {'any' if splittable else 'one part'}"
        if key in found:
            return LinearConfig(*found[key][1])
        return chosen(form, rows, size_r, size_k, splittable=splittable, **others)

    quantized_ops.choose_quantized_config = choose


def main() -> None:
    """Do a job in a process of its own, or all of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="1.5b")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--cuts", type=Path, help="of quantize_sweep.py --out, in place of ours")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cuts:
        os.environ["MRSS_CUTS"] = str(args.cuts.resolve())
    if "MRSS_CUTS" in os.environ:
        take_cuts(Path(os.environ["MRSS_CUTS"]))
    if args.job:
        job(args.model, args.job)
    else:
        gpu(args.model, args.kinds)


if __name__ == "__main__":
    main()
