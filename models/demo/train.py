"""Train the demo model: a small RWKV-7 on documents of the invented world.

    python -m models.demo.train --out build/demo --seconds 300          # one large GPU
    python -m models.demo.train --out build/tiny --steps 20 --layers 2 --width 128 --batch 4

Weights and Adam's moments are fp32, products bf16 on CUDA. The length of the run is given in steps
or in seconds; the schedule follows whichever it is. Ctrl-C or SIGTERM ends it after a step; the
same command goes on, after a kill from the last checkpoint. With `--steps`, on one machine's CPU,
the weights are then those of a run that was never left.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from models.demo.checkpoint import Checkpoint, Left, until_asked
from models.demo.data import ANSWER, FACT, Feed, Feeder, max_facts_at, world_vocab
from models.demo.init import init_weights
from models.demo.vocab import write_vocab
from mrss_provider.tune.network import Shape, forward, logits, start_state
from mrss_provider.tune.wkv import Backend, wkv7

CONTEXT_WEIGHT = 0.5
"""Loss weight of tokens that no assistant says: notes are random, so they teach little."""

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.99)
VOCAB_MULTIPLE = 64


def main() -> None:
    """Parse the command line and train."""
    args = _parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, checkpoint = args.out / "model.safetensors", _checkpoint(args)
    if model.exists() and not checkpoint.path.exists():
        raise SystemExit(f"{model} is finished; choose another --out, or remove it to train anew")
    left = checkpoint.load()
    device = torch.device(args.device)
    backend = check_gradients(device) if device.type == "cuda" else "torch"
    entries = world_vocab()
    write_vocab(args.out / "vocab.txt", entries)
    vocab_size = -(-(len(entries) + 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    begun = left.weights or init_weights(args.layers, args.width, vocab_size, args.seed)
    weights = {k: v.to(device).requires_grad_() for k, v in begun.items()}
    count = sum(v.numel() for v in weights.values())
    print(f"{len(entries)} entries, {vocab_size} rows, {count / 1e6:.2f} M parameters", flush=True)
    feed = Feed(entries, args.batch, args.length, args.seed, args.steps)
    with Feeder(feed, args.workers, left.step) as feeder:
        log = train(weights, feeder, args, backend, checkpoint, left)
    if log is not None:
        save(weights, model, log)
        checkpoint.remove()


def train(
    weights: dict[str, Tensor],
    feeder: Feeder,
    args: argparse.Namespace,
    backend: Backend,
    checkpoint: Checkpoint,
    left: Left,
) -> dict[str, object] | None:
    """Train `weights` in place, from where the run was left.

    Returns:
        What the file's metadata should say; None if somebody asked it to end before its end.
    """
    optimizer = make_optimizer(weights)
    if left.optimizer is not None:
        optimizer.load_state_dict(dict(left.optimizer))
        print(f"goes on after step {left.step}", flush=True)
    device = weights["emb.weight"].device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    began, step, elapsed = time.perf_counter(), left.step, left.seconds
    next_log, next_save = elapsed, elapsed + args.checkpoint_every
    with until_asked() as is_asked:
        while (progress := _progress(args, step, elapsed)) < 1:
            if is_asked():
                checkpoint.save(step, elapsed, weights, optimizer)
                print(f"left off after step {step}; the same command goes on", flush=True)
                return None
            feeder.max_facts.value = max_facts_at(progress)
            rate = args.rate * schedule(step, progress)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            ids, kinds = (torch.from_numpy(x).to(device) for x in feeder.next())
            loss, right, facts = loss_of(weights, ids.long(), kinds, dtype, backend)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
            optimizer.step()
            step += 1
            elapsed = left.seconds + time.perf_counter() - began
            if elapsed >= next_log or _progress(args, step, elapsed) >= 1:
                next_log = elapsed + args.log_every
                rate_tok = step * ids.shape[0] * args.length / elapsed
                print(
                    f"{elapsed:6.1f} s step {step:5d} loss {loss.item():.4f} "
                    f"facts {(right / facts).item():.3f} norm {norm.item():.2f} lr {rate:.2e} "
                    f"max_facts {feeder.max_facts.value} {rate_tok / 1e3:.0f} ktok/s",
                    flush=True,
                )
                if not math.isfinite(loss.item()):
                    raise SystemExit("the loss is not finite")
            if elapsed >= next_save:
                checkpoint.save(step, elapsed, weights, optimizer)
                next_save = elapsed + args.checkpoint_every
    return {
        "steps": step,
        "tokens": step * args.batch * args.length,
        "seconds": round(elapsed, 1),
        "batch": args.batch,
        "length": args.length,
        "peak_learning_rate": args.rate,
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "wkv": backend,
        "products": str(dtype).removeprefix("torch."),
        "master_weights": "float32",
    }


def _progress(args: argparse.Namespace, step: int, elapsed: float) -> float:
    """Return the share of the run that is done, by its steps or by the clock."""
    return float(step / args.steps if args.steps else elapsed / args.seconds)


def _checkpoint(args: argparse.Namespace) -> Checkpoint:
    names = ("steps", "seconds", "layers", "width", "batch", "length", "rate", "seed", "device")
    settings = {name: getattr(args, name) for name in names}
    return Checkpoint(args.out / "model.unfinished", settings)


def loss_of(
    weights: dict[str, Tensor], ids: Tensor, kinds: Tensor, dtype: torch.dtype, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted loss, and how many of how many fact tokens are the most likely one."""
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    shape = Shape.of(cast)
    zeros = torch.zeros(
        ids.shape[0], shape.num_layers, shape.num_heads, shape.head_size, shape.head_size,
        device=ids.device,
    )  # fmt: skip
    hidden, _ = forward(cast, ids[:, :-1], start_state(shape, zeros, dtype), backend=backend)
    scores, targets, kinds = logits(cast, hidden).flatten(0, 1), ids[:, 1:].flatten(), kinds[:, 1:]
    nll = F.cross_entropy(scores, targets, reduction="none")
    weight = torch.where(kinds.flatten() >= ANSWER, 1.0, CONTEXT_WEIGHT)
    is_fact = kinds.flatten() == FACT
    right = ((scores.detach().argmax(-1) == targets) & is_fact).sum()
    return (nll * weight).sum() / weight.sum(), right, is_fact.sum()


def make_optimizer(weights: dict[str, Tensor]) -> torch.optim.AdamW:
    """Matrices decay, the decay's bias learns twice as fast, the rest neither."""
    groups: dict[str, list[Tensor]] = {"matrix": [], "w0": [], "rest": []}
    for name, tensor in weights.items():
        is_matrix = name.endswith(".weight") and tensor.dim() == 2
        kind = "matrix" if is_matrix else "w0" if name.endswith("att.w0") else "rest"
        groups[kind].append(tensor)
    decays = {"matrix": WEIGHT_DECAY, "w0": 0.0, "rest": 0.0}
    scales = {"matrix": 1.0, "w0": 2.0, "rest": 1.0}
    return torch.optim.AdamW(
        [
            {"params": tensors, "weight_decay": decays[kind], "scale": scales[kind]}
            for kind, tensors in groups.items()
        ],
        lr=1e-3,
        betas=BETAS,
        eps=1e-10,
        fused=True,
    )


def schedule(step: int, progress: float) -> float:
    """Warm up over 200 steps, hold until half of the run, then a cosine down to 1 %."""
    warm = min(1.0, (step + 1) / 200)
    fall = max(0.0, (progress - 0.5) / 0.5)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fall)))


def check_gradients(device: torch.device) -> Backend:
    """Compare fla's kernels with the torch form, outputs and all gradients, on this device.

    Raises:
        SystemExit: they differ by more than bf16 explains.
    """
    gen = torch.Generator(device).manual_seed(0)
    size = (4, 100, 4, 64)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device=device)

    inputs = [draw(*size) for _ in range(6)]
    inputs[1] = -0.6065 * torch.sigmoid(3 * inputs[1])
    inputs[4] = F.normalize(inputs[4], dim=-1)
    inputs[5] = torch.sigmoid(inputs[5])
    inputs = [x if i == 1 else x.bfloat16() for i, x in enumerate(inputs)]
    inputs.append(draw(4, 4, 64, 64))
    grad_y, grad_s = draw(*size), draw(4, 4, 64, 64)
    results = []
    kinds: list[tuple[Backend, torch.dtype]] = [("fla", torch.bfloat16), ("torch", torch.float32)]
    for backend, cast in kinds:
        leaves = [
            (x if i in (1, 6) else x.to(cast)).clone().requires_grad_()
            for i, x in enumerate(inputs)
        ]
        y, state = wkv7(*leaves, backend=backend)
        loss = (y.float() * grad_y).sum() + (state * grad_s).sum()
        results.append([y, state, *torch.autograd.grad(loss, leaves)])
    names = ("y", "state", "r", "w", "k", "v", "kk", "a", "state0")
    worst = 0.0
    for name, fla, ref in zip(names, *results, strict=True):
        error = ((fla.float() - ref).norm() / ref.norm()).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
        print(f"gradient check {name:7s} {error:.2e}", flush=True)
    if worst > 2e-2:
        raise SystemExit(f"fla and the torch form differ by {worst:.2e}")
    return "fla"


def save(weights: dict[str, Tensor], path: Path, training: dict[str, object]) -> None:
    """Write bf16 tensors in official names, with how they came to be as metadata."""
    tensors = {k: v.detach().to(torch.bfloat16).cpu().contiguous() for k, v in weights.items()}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"format": "pt", "training": json.dumps(training)})
    partial.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, default=0)
    length.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=float, default=10.0, help="seconds")
    parser.add_argument("--checkpoint-every", type=float, default=30.0, help="seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    main()
