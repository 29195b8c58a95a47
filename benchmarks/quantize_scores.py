"""How well a model predicts documents of the bundled model's world that it has not seen."""

from __future__ import annotations

import itertools
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mrss_provider.config import DEMO_MODEL
from mrss_provider.evaluate.world import base_document
from mrss_provider.model import Model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.demo.vocab import PieceEncoder, read_vocab

BATCH_ROWS = 40
# Its documents are not those of training, which began from small seeds.
SEED = 20_261_125


def unseen_documents(count: int) -> list[list[int]]:
    """Return the token ids of so many documents, always the same ones."""
    # Plain Python, where the package's tokenizer may be missing.
    encoder = PieceEncoder(read_vocab(DEMO_MODEL / "vocab.txt"))
    rng = random.Random(SEED)
    return [encoder.encode(base_document(rng).text) for _ in range(count)]


def scores(model: Model, documents: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return what may follow each token but the last: log-probabilities [T - 1, V] a document."""
    found: list[Tensor] = []
    device = model.device
    for start in range(0, len(documents), BATCH_ROWS):
        batch = documents[start : start + BATCH_ROWS]
        lengths = [len(ids) - 1 for ids in batch]
        tokens = torch.tensor([token for ids in batch for token in ids[:-1]], device=device)
        bounds = [0, *itertools.accumulate(lengths)]
        pool, slots = model.new_pool(len(batch)), torch.arange(len(batch), device=device)
        hidden = model.prefill(tokens, bounds, slots, pool, all_positions=True)
        found += model.head(hidden).log_softmax(-1).split(lengths)
    return found


def step_nats(model: Model, documents: Sequence[Sequence[int]]) -> float:
    """Return nats a token of documents of one length, read one token a step."""
    device = model.device
    ids = torch.tensor(documents, device=device)
    num_steps = ids.shape[1] - 1
    pool, slots = model.new_pool(len(ids)), torch.arange(len(ids), device=device)
    total = 0.0
    for i in range(num_steps):
        logits = model.head(model.decode(ids[:, i].contiguous(), slots, pool))
        total -= float(logits.log_softmax(-1).gather(-1, ids[:, i + 1 : i + 2]).double().sum())
    return total / (len(ids) * num_steps)


def nats(log_probs: Tensor, ids: Sequence[int]) -> Tensor:
    """Return what each token but the first of `ids` costs, [T - 1]."""
    wanted = torch.tensor(ids[1:], device=log_probs.device)
    return -log_probs.double().gather(-1, wanted[:, None])[:, 0]


def interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the mean over documents and half the width of its 95 % interval."""
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    return {name: round(statistics.fmean(values), 7), f"{name}_ci": round(half, 7)}


def against(
    got: Sequence[Tensor], wanted: Sequence[Tensor], documents: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Return how well `got` predicts, and how far it is from `wanted`, with 95 % intervals."""
    pairs = list(zip(got, wanted, documents, strict=True))
    nll = [float(nats(one, ids).mean()) for one, _, ids in pairs]
    more = [float((nats(one, ids) - nats(ref, ids)).mean()) for one, ref, ids in pairs]
    kl = [
        float((ref.double().exp() * (ref.double() - one)).sum(-1).mean()) for one, ref, _ in pairs
    ]
    same = [float((one.argmax(-1) == ref.argmax(-1)).double().mean()) for one, ref, _ in pairs]
    found: dict[str, float] = {}
    for name, values in (("nll", nll), ("nll_more_than_fp32", more), ("kl_to_fp32", kl)):
        found |= interval(name, values)
    return found | interval("same_top_1_as_fp32", same)
