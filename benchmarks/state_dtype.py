"""What fp16 recurrent states cost in likelihood: nats a token of one long text, by position.

The bundled model reads 16,384 tokens of its own world, documents one after the other in one
context, a token at a time, so that the state is rounded at every token. Once with fp32 states, once
with fp16 ones; the same weights. Arithmetic is in fp32 in both.

    python benchmarks/state_dtype.py
    python benchmarks/state_dtype.py --device cuda --random 1.5b

`--random` adds a model of an official shape with random weights (CUDA): it has no likelihood worth
the name, so what is reported is the divergence of its predictions, KL(fp32 || fp16).
Ends with one JSON line a block of positions, kept in benchmarks/results/state_dtype.jsonl.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from measure import RESULTS, Machine, host, machine, write_line
from random_models import SHAPES, random_model
from torch import Tensor

from mrss_provider.config import DEMO_MODEL
from mrss_provider.evaluate.world import base_document
from mrss_provider.model import Model, load_model
from mrss_provider.tokenizer import Tokenizer, find_vocabulary

NUM_TOKENS = 16_384
STATE_DTYPES = ("fp32", "fp16")
# Predictions are compared this many positions at a time: [positions, V] must fit.
SPAN = 256


def world_ids(model: Path, num_tokens: int, seed: int = 0) -> list[int]:
    """Return token ids of documents of the world, ids of `model`'s own vocabulary."""
    rng = random.Random(seed)
    tokenizer = Tokenizer.load(find_vocabulary(model))
    ids: list[int] = []
    while len(ids) < num_tokens + 1:
        ids += [Tokenizer.eos_id, *tokenizer.encode(base_document(rng).text)]
    return ids[: num_tokens + 1]


def blocks(num_tokens: int) -> list[tuple[int, int]]:
    """Return ranges of positions, each as long as all before it: [0, 1024), [1024, 2048), ..."""
    edges = [0]
    edge = 1024
    while edge < num_tokens:
        edges.append(edge)
        edge *= 2
    return list(zip(edges, [*edges[1:], num_tokens], strict=True))


@torch.inference_mode()
def compare(models: tuple[Model, Model], ids: list[int]) -> tuple[Tensor, Tensor]:
    """Read `ids` with both models, a token at a time.

    Args:
        models: equal but for the dtype of their states.
        ids: T + 1 token ids.

    Returns:
        nats a token [2, T], and KL(first || second) [T], fp64 on the CPU.
    """
    pools = [model.new_pool(1) for model in models]
    device = models[0].device
    tokens = torch.tensor(ids, device=device)
    slot = torch.zeros(1, dtype=torch.int64, device=device)
    nats, divergences = [], []
    for start in range(0, len(ids) - 1, SPAN):
        span = tokens[start : min(start + SPAN, len(ids) - 1)]
        targets = tokens[start + 1 : start + 1 + len(span), None]
        log_p = []
        for model, pool in zip(models, pools, strict=True):
            hidden = torch.cat([model.decode(token, slot, pool) for token in span[:, None]])
            log_p.append(model.head(hidden).double().log_softmax(-1))
        nats.append(torch.stack([-p.gather(1, targets)[:, 0] for p in log_p]).cpu())
        divergences.append((log_p[0].exp() * (log_p[0] - log_p[1])).sum(-1).cpu())
    return torch.cat(nats, 1), torch.cat(divergences)


def report(name: str, dtype: str, nats: Tensor, kl: Tensor, on: Machine, out: Path) -> None:
    """Write a line for each block of positions, and one for the whole text."""
    total = kl.shape[0]
    for first, last in [*blocks(total), (0, total)]:
        inside = slice(first, last)
        fp32, fp16 = nats[:, inside].mean(1).tolist()
        fields: dict[str, object] = {
            "model": name,
            "first": first,
            "last": last,
            "nats_fp32_state": round(fp32, 6),
            "nats_fp16_state": round(fp16, 6),
            "difference": round(fp16 - fp32, 7),
            "kl_mean": float(f"{kl[inside].mean():.3g}"),
            "kl_max": float(f"{kl[inside].max():.3g}"),
            "dtype": dtype,
            "scope": "decoded a token at a time",
        }
        write_line("state_dtype", fields, on, out)


def main() -> None:
    """Measure the bundled model, then, if asked, one with random weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="auto", help="of the bundled model's weights")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--random", choices=sorted(SHAPES), help="also this shape (CUDA)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    on = machine() if args.device == "cuda" else host()
    print(on)
    demo = [
        load_model(DEMO_MODEL, device=args.device, dtype=args.dtype, threads=1, state_dtype=state)
        for state in STATE_DTYPES
    ]
    nats, kl = compare((demo[0], demo[1]), world_ids(DEMO_MODEL, args.tokens))
    report("demo", demo[0].config.dtype, nats, kl, on, args.out)
    if args.random:
        shape = SHAPES[args.random]
        fp32, fp16 = (random_model(shape, dtype="fp16", state_dtype=x) for x in STATE_DTYPES)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(1, shape.vocab_size, (args.tokens + 1,), generator=generator)
        nats, kl = compare((fp32, fp16), drawn.tolist())
        report(args.random, "fp16", nats, kl, on, args.out)


if __name__ == "__main__":
    main()
