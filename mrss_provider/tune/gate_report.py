"""What a gate gains on text it never saw, against fixed weights and against `novelty`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mrss_provider.engine.gate_file import SHAPES
from mrss_provider.engine.gating_layer import FEATURES, fold, scores
from mrss_provider.resampling import Sample, judge
from mrss_provider.tune.gate_data import GateData
from mrss_provider.tune.gate_training import gated_log_probs

NOVELTY_TEMPERATURE = 0.3
"""What `novelty` has unless a request says another one."""

_EM_STEPS = 500
_DIVERGENCE = FEATURES.index("kl_to_base")


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, by resampling whole texts."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class GateReport:
    """Nats a token of the linear merge on held-out text, lower is better.

    Attributes:
        documents: texts with a token that counts.
        tokens: that count.
        nll: by `learned`, `novelty`, `fixed` (the best fixed weights) and `named` (the given ones).
        fixed_weights: the fixed weights with the least NLL on the text that the gate learnt from.
        over_fixed: nats a token that the gate gains over them.
        over_novelty: and over `novelty`.
    """

    documents: int
    tokens: int
    nll: dict[str, float]
    fixed_weights: tuple[float, ...]
    over_fixed: Interval
    over_novelty: Interval


def report_gate(
    tensors: dict[str, Tensor], learnt_from: GateData, held_out: GateData, *, seed: int = 0
) -> GateReport:
    """Judge a network.

    Args:
        tensors: by the names of a gate file.
        learnt_from: what it was trained on, which chooses the fixed weights too.
        held_out: what it is judged by, of the same rows.
        seed: of the resampling.
    """
    layer = fold(*(tensors[name] for name in SHAPES))
    heard = torch.ones(held_out.features.shape[:2], dtype=torch.bool)
    fixed = best_fixed_weights(learnt_from)
    u = {
        "learned": scores(held_out.features, heard, layer.hidden, layer.bias, layer.score),
        "novelty": held_out.features[..., _DIVERGENCE] / NOVELTY_TEMPERATURE,
        "fixed": (fixed / held_out.prior).log().expand_as(held_out.log_probs),
        "named": torch.zeros_like(held_out.log_probs),
    }
    nll = {name: -gated_log_probs(held_out, value).double() for name, value in u.items()}
    return GateReport(
        documents=held_out.num_documents,
        tokens=len(held_out.document),
        nll={name: float(values.mean()) for name, values in nll.items()},
        fixed_weights=tuple(fixed.tolist()),
        over_fixed=bootstrap(nll["fixed"] - nll["learned"], held_out.document, seed=seed),
        over_novelty=bootstrap(nll["novelty"] - nll["learned"], held_out.document, seed=seed),
    )


def best_fixed_weights(data: GateData) -> Tensor:
    """Return the weights [K] fp32 with the least NLL of the linear merge on `data`.

    The NLL is convex in them, and expectation maximisation goes down to its minimum.
    """
    probs = data.log_probs.double().exp()
    weights = torch.full(probs.shape[1:], 1 / probs.shape[1], dtype=torch.float64)
    for _ in range(_EM_STEPS):
        said = weights * probs
        weights = (said / said.sum(-1, keepdim=True)).mean(0)
    return weights.float()


def bootstrap(values: Tensor, document: Tensor, *, seed: int) -> Interval:
    """Return the mean of `values` [T] and its interval, as `resampling` makes it of whole texts.

    It is infinite for fewer than six texts, which tell nothing at 95 %.

    Args:
        values: fp64, one a token.
        document: [T] int64, which text each is of.
        seed: of the draws.
    """
    _, index = torch.unique(document, return_inverse=True)
    num = int(index.max()) + 1
    sums = torch.zeros(num, dtype=torch.float64).index_add_(0, index, values)
    counts = torch.zeros(num, dtype=torch.float64).index_add_(0, index, torch.ones_like(values))
    found = judge(Sample(sums.numpy(), counts.numpy()), seed)
    return Interval(found.mean, *found.interval(0.95))
