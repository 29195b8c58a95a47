"""Random rows, every merge rule with parameters worth trying, and their formulas in numpy, fp64."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider.engine.merges import LOG_PROB_FLOOR, Rows, make_merge
from mrss_provider.mixture import MERGES, Method, parse_method

V = 50
Array = NDArray[np.float64]

RULES = (
    "linear",
    "geometric",
    "product",
    "power:0.5",
    "power:2",
    "power:-1",
    "power:0.002",
    "power:0",
    "delta",
    "contrast",
    "route",
)
assert {rule.partition(":")[0] for rule in RULES} == set(MERGES)

SHARES = tuple(r for r in RULES if make_merge(parse_method(r, "merge", "merge")).sums_to_one)
ANCHORED = ("delta", "contrast")


def method_of(rule: str) -> Method:
    return parse_method(rule, "merge", "merge")


def log_softmax(z: Array) -> Array:
    peak = z.max(-1, keepdims=True)
    return z - peak - np.log(np.exp(z - peak).sum(-1, keepdims=True))


def power_mean(a: float, lp: Array, w: Array) -> Array:
    """Return `log (sum_k w_k p_k^a)^(1/a)`, rows without weight left out."""
    terms = np.log(w)[w > 0, None] + a * lp[w > 0]
    peak = terms.max(0)
    with np.errstate(invalid="ignore"):
        safe = np.where(np.isfinite(peak), terms - peak, 0.0)
    return (peak + np.where(np.isfinite(peak), np.log(np.exp(safe).sum(0)), 0.0)) / a


def oracle(rule: str, z: Array, w: Array, cut: float = 0.0, first: int = 1) -> Array:
    """Return log p [V] of one request: the formulas, written for reading.

    `first` is the first row that a cut listens to.
    """
    method = method_of(rule)
    lp = log_softmax(z)
    with np.errstate(divide="ignore", invalid="ignore"):
        if method.name == "linear":
            merged = np.log((w[:, None] * np.exp(lp))[w > 0].sum(0))
        elif method.name in ("geometric", "product") or rule == "power:0":
            w = w / min(1.0, w.sum()) if w.sum() > 0 else w
            merged = sum(w[k] * lp[k] for k in range(len(w)) if w[k] > 0)
        elif method.name == "power":
            merged = power_mean(method.number("exponent"), lp, w)
        elif method.name == "route":
            merged = lp[w.argmax()]
        else:
            floored = np.maximum(lp, LOG_PROB_FLOOR)
            merged = floored[0] + sum(w[k] * (floored[k] - floored[0]) for k in range(1, len(w)))
            voices = [k for k in range(first, len(w)) if w[k] >= 0]
            best = lp[voices].max(0)
            threshold = best.max() + math.log(cut) if cut > 0 else -math.inf
            merged = np.where((best >= threshold) & (best > -np.inf), merged, -np.inf)
    return log_softmax(merged)


def random_rows(
    seed: int,
    num_groups: int = 3,
    num_rows: int = 3,
    *,
    bans: float = 0.2,
    scale: float = 3.0,
    vocab: int = V,
) -> Tensor:
    """Return logits [G, K, V]; the same random tokens are banned in all rows of a group."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_groups, num_rows, vocab, generator=generator) * scale
    banned = torch.rand(num_groups, 1, vocab, generator=generator) < bans
    banned[:, :, 0] = False
    return logits.masked_fill(banned, -torch.inf)


def merge(
    rule: str, logits: Tensor, weights: Tensor, cut: float = 0.0, *, base_named: bool = False
) -> Tensor:
    """Merge rows [G, K, V] by a rule of `RULES` with weights [G, K]."""
    rows = Rows(logits, weights, torch.full((len(logits),), cut), base_named=base_named)
    return make_merge(method_of(rule)).merge(rows, weights)


def some_weights(rule: str, num_groups: int, num_rows: int, seed: int = 0) -> Tensor:
    """Return weights [G, K] such as the rule takes: shares, strengths, or some below 0."""
    weights = torch.rand(num_groups, num_rows, generator=torch.Generator().manual_seed(seed)) + 0.1
    if make_merge(method_of(rule)).sums_to_one:
        return weights / weights.sum(-1, keepdim=True)
    if rule == "contrast" and num_rows > 2:
        weights[:, -1] *= -0.5
    if rule in ANCHORED:
        weights[:, 0] = 0
    return weights
