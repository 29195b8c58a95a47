"""How fast states are tuned on a CUDA device: tokens a second by batch and length.

    python benchmarks/tuning_gpu.py --profile             # the 1.5B shape, about a minute
    python benchmarks/tuning_gpu.py --shape v6-1.6b --forms plain

Random weights of an official shape, in bf16. First a gate: hidden states and gradients of two
layers against the layer by layer form in fp32. Then `Learner.step` on random tokens, the second
half of each example learnt, in several forms: `plain` is the layer by layer form on padded rows,
`fused` the packed one as `mrss tune` runs it, `fused N` the same with fla's chunks of N tokens;
`keep` spares fla its second forward pass. The fastest form goes through all cells. A line for each
of them goes to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from measure import RESULTS, Machine, machine, write_line
from random_models import SHAPES, Shape, random_tensors, weight_bytes
from torch import Tensor

from mrss_provider.tune import Example, TuneConfig, network, packed7, wkv
from mrss_provider.tune.learner import Learner

FORMS = ("plain", "fused", "fused 16", "fused 64", "fused 64 keep")
CELLS = ("16x512", "8x512", "4x2048", "32x512", "16x64-512")
"""Examples a batch x tokens; of `A-B`, each example has a length between."""

MAX_ERROR = 4e-2
"""Of what the gate compares, relative to its norm: what bf16 does to two layers, and some."""

GATE_LENGTHS = (200, 70, 131)


@contextlib.contextmanager
def form(name: str) -> Iterator[None]:
    """Compute in a form of `FORMS`."""
    kind, *options = name.split()
    if kind == "plain":
        with mock.patch.object(network, "packs_rows", return_value=False):
            yield
        return
    if not options:
        yield
        return
    chunk_len, keep = int(options[0]), "keep" in options
    with (
        mock.patch.object(wkv, "FLA_CHUNK_LEN", chunk_len),
        mock.patch.object(packed7, "keeps_chunks", return_value=keep),
    ):
        yield


def official(shape: Shape, device: str) -> dict[str, Tensor]:
    """Return random bf16 weights in the layout of a checkpoint: LoRAs are [in, out] there."""
    tensors = random_tensors(shape, dtype="bf16", device=device)
    downs = ("w1", "a1", "v1", "g1", "time_maa_w1", "time_decay_w1")
    ups = ("w2", "a2", "v2", "g2", "time_maa_w2", "time_decay_w2")
    ends = tuple(f"att.{name}" for name in downs + ups)
    return {n: t.mT.contiguous() if n.endswith(ends) else t for n, t in tensors.items()}


def examples(cell: str, vocab_size: int, seed: int) -> list[Example]:
    """Return a batch of random tokens, the second half of each example to be learnt."""
    count, span = cell.split("x")
    low, high = (int(x) for x in (span.split("-") * 2)[:2])
    rng = random.Random(seed)
    made = []
    for _ in range(int(count)):
        size = rng.randint(low, high) + 1
        ids = tuple(rng.randrange(vocab_size) for _ in range(size))
        answer = tuple(i > size // 2 for i in range(size))
        made.append(Example(ids, answer, (False,) * size))
    return made


def gradients(
    weights: dict[str, Tensor], lengths: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """Return the hidden states of the real tokens, and the gradients of states and offsets."""
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    shape, device = network.Shape.of(cast), cast["emb.weight"].device
    gen = torch.Generator().manual_seed(1)
    count, width = len(lengths), max(lengths)
    ids = torch.randint(0, shape.vocab_size, (count, width), generator=gen).to(device)
    states = torch.randn(count, *shape.state_size, generator=gen).to(device).requires_grad_()
    offsets = torch.randn(count, shape.num_layers, shape.hidden_size, generator=gen)
    offsets = (0.1 * offsets).to(device).requires_grad_()
    hidden = network.read_rows(cast, ids, lengths, states, offsets=offsets).float()
    real = torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]
    toward = torch.randn(hidden.shape, generator=gen).to(device)
    grads = torch.autograd.grad((hidden * toward)[real].sum(), [states, offsets])
    return [hidden[real].detach(), *grads]


def errors(shape: Shape, device: str, name: str) -> list[float]:
    """Return the relative errors of a form in two layers: hidden, states, offsets."""
    weights = official(replace(shape, num_layers=2, vocab_size=1024), device)
    exact = gradients(weights, GATE_LENGTHS, torch.float32)
    with form(name):
        found = gradients(weights, GATE_LENGTHS, torch.bfloat16)
    return [
        float((got - wanted).norm() / wanted.norm())
        for got, wanted in zip(found, exact, strict=True)
    ]


def measure(
    weights: dict[str, Tensor], shape: Shape, cell: str, *, steps: int, loss_on: str
) -> dict[str, object]:
    """Return the speed of `steps` steps after two that are not counted."""
    config = TuneConfig(steps=steps + 2, max_len=4096, learning_rate=0.1, loss_on=loss_on)  # type: ignore[arg-type]
    learner = Learner(weights, [config], [None])
    batches = [examples(cell, shape.vocab_size, seed) for seed in range(steps + 2)]
    _reset_peak()
    began = time.perf_counter()
    for step in (0, 1):
        learner.step(step, [batches[step]])
    _wait()
    warm, began = time.perf_counter() - began, time.perf_counter()
    losses = [learner.step(step, [batches[step]])[0] for step in range(2, steps + 2)]
    _wait()
    seconds = time.perf_counter() - began
    tokens = sum(len(example.token_ids) - 1 for batch in batches[2:] for example in batch)
    # Frozen weights: a product forward, and one backward through the activations.
    flops = 2 * 2 * weight_bytes(replace(shape, vocab_size=0), "bf16") / 2
    head = 2 * 2 * shape.vocab_size * shape.hidden_size * (1 if loss_on == "all" else 0.5)
    return {
        "tokens_per_s": round(tokens / seconds),
        "step_ms": round(1e3 * seconds / steps, 1),
        "tflops": round((flops + head) * tokens / seconds / 1e12, 1),
        "peak_gb": round(_peak_bytes() / 1e9, 1),
        "first_two_s": round(warm, 1),
        "loss": round(losses[-1], 3),
    }


def shares(weights: dict[str, Tensor], shape: Shape, cell: str) -> dict[str, float]:
    """Return the milliseconds of one step on the device by kind of kernel, and the longest."""
    learner = Learner(weights, [TuneConfig(steps=4, max_len=4096)], [None])
    batch = examples(cell, shape.vocab_size, 0)
    learner.step(0, [batch])
    watched = torch.profiler.ProfilerActivity
    activity = watched.CUDA if torch.cuda.is_available() else watched.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        learner.step(1, [batch])
        _wait()
    kinds: dict[str, float] = {}
    each: dict[str, float] = {}
    for event in profile.key_averages():
        spent = event.self_device_time_total / 1e3
        kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0.0) + spent
        each[event.key[:60]] = each.get(event.key[:60], 0.0) + spent
    longest = sorted(each.items(), key=lambda item: -item[1])[:24]
    return {name: round(ms, 2) for name, ms in (*kinds.items(), *longest)}


def chosen() -> dict[str, list[int]]:
    """Return the warps that each of fla's kernels was found to run best with."""
    found: dict[str, list[int]] = {}
    for name, module in list(sys.modules.items()):
        for key, kernel in vars(module).items() if name.startswith("fla.ops.") else ():
            tuner = kernel
            while tuner is not None and not hasattr(tuner, "configs"):
                tuner = vars(tuner).get("fn") if hasattr(tuner, "__dict__") else None
            if tuner is not None and tuner.cache:
                found[key] = [config.num_warps for config in tuner.cache.values()]
    return found


def kind_of(kernel: str) -> str:
    """Return what a kernel belongs to, by its name."""
    for kind, marks in {
        "fused": ("train_",),
        "fla": ("chunk_", "prepare_wy", "wu_fwd"),
        "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitK"),
    }.items():
        if any(mark in kernel for mark in marks):
            return kind
    return "elementwise and others"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def passes(shape: Shape, device: str, name: str) -> bool:
    """Print the errors of a form, and tell whether they are those of bf16."""
    try:
        found = errors(shape, device, name)
    except Exception as error:
        # A form that does not fit this machine must not cost the others their turn.
        print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return False
    print(f"{name}: errors " + " ".join(f"{x:.1e}" for x in found), flush=True)
    return max(found) <= MAX_ERROR


def run(args: argparse.Namespace, on: Machine, shape: Shape, device: str) -> None:
    """Gate every form and measure it in the first cell; then the fastest one in the others."""
    end = time.perf_counter() + args.seconds
    weights = official(shape, device)
    speeds: dict[str, float] = {}

    def cell_of(name: str, cell: str, loss_on: str) -> None:
        fields: dict[str, object] = {"model": args.shape, "form": name, "cell": cell}
        if time.perf_counter() > end:
            print(f"{name} {cell}: no time left", flush=True)
            return
        try:
            with form(name):
                found = measure(weights, shape, cell, steps=args.steps, loss_on=loss_on)
        except torch.OutOfMemoryError:
            print(f"{name} {cell}: out of memory", flush=True)
            return
        speeds.setdefault(name, float(str(found["tokens_per_s"])))
        write_line("tuning_gpu", fields | {"loss_on": loss_on} | found, on, args.out)

    for name in args.forms:
        if passes(shape, device, name):
            cell_of(name, args.cells[0], "answer")
    if not speeds:
        raise SystemExit("no form passed")
    best = max(speeds, key=lambda name: speeds[name])
    for cell in args.cells[1:]:
        cell_of(best, cell, "answer")
    cell_of(best, args.cells[0], "all")
    if "plain" in speeds and best != "plain":
        cell_of("plain", args.cells[-1], "answer")
    if args.profile:
        with form(best):
            print(best, shares(weights, shape, args.cells[0]), flush=True)
            print("warps", chosen(), flush=True)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description="Measure state tuning on a CUDA device.")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["plain", "fused"])
    parser.add_argument("--cells", nargs="+", default=list(CELLS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=90.0, help="after which no cell begins")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    run(args, machine(), SHAPES[args.shape], "cuda")


if __name__ == "__main__":
    main()
