"""Gates and merge rules in plain torch, any dtype: the oracle of the kernels that fuse them.

Written from the formulas of MRSS, not from the engine, which the checks compare with as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mrss_kernels.tail_tensors import GATE_SIZE, NUM_FEATURES, NUM_UNITS

LOG_PROB_FLOOR = -30.0
MAX_NATS = 8.0
MIN_DIVERGENCE = 1e-4
SMALL_EXPONENT = 3e-3
STRENGTHS = ("product", "delta", "contrast")


@dataclass(frozen=True)
class Mixing:
    """How the rows of a request become one.

    Attributes:
        rule: one of `RULES`.
        gate: one of `GATES`.
        cut: in [0, 1), of `delta` and `contrast`.
        base_named: whether row 0 is a base that the name contains.
        exponent: of `power`.
        tau: of all gates but `fixed` and `learned`.
        sharpness: of `novelty`.
        network: [GATE_SIZE] of `learned`; see `TailInputs.gates`.
    """

    rule: str
    gate: str = "fixed"
    cut: float = 0.0
    base_named: bool = False
    exponent: float = 1.0
    tau: float = 1.0
    sharpness: float = 1.0
    network: Tensor | None = None


class _Rows:
    """Rows [K, V], and what gates and rules know of them."""

    def __init__(self, logits: Tensor, named: Tensor) -> None:
        self.logits = logits
        self.named = named
        self.is_heard = named != 0
        self.log_probs = logits.log_softmax(-1)
        self.log_mass = logits.logsumexp(-1)
        self.floored = self.log_probs.clamp_min(LOG_PROB_FLOOR)

    def divergence(self, log_probs: Tensor) -> Tensor:
        """Return the divergence [K] of each row from `log_probs` [V]."""
        gains = self.log_probs.exp() * (self.floored - log_probs.clamp_min(LOG_PROB_FLOOR))
        return gains.sum(-1).clamp_min(0.0)

    def entropy(self) -> Tensor:
        return -(self.log_probs.exp() * self.floored).sum(-1)


def merge(logits: Tensor, named: Tensor, how: Mixing) -> Tensor:
    """Merge rows [K, V] with the weights that the names say [K] into one [V].

    One row comes back as it is. Each rule returns canonical logits, on the scale of the rows'
    weighted log-mass.
    """
    if len(logits) == 1:
        return logits[0]
    rows = _Rows(logits, named)
    weights = _gated(rows, how)
    if how.rule in ("linear", "power") and int((weights > 0).sum()) == 1:
        return logits[int(weights.argmax())]
    return _MERGES[how.rule](rows, weights, how)


def _gated(rows: _Rows, how: Mixing) -> Tensor:
    if how.gate == "fixed":
        return rows.named
    is_strength = how.rule in STRENGTHS
    if how.gate in ("novelty", "posterior-novelty"):
        divergence = rows.divergence(rows.log_probs[0])
        if is_strength:
            return _speaking(divergence, rows, how)
        nats = divergence.clamp_max(MAX_NATS) / how.tau
    elif how.gate == "confidence":
        nats = -rows.entropy() / how.tau
    else:
        nats = _scores(rows, how)
    if is_strength:
        largest = nats[rows.is_heard].amax() if bool(rows.is_heard.any()) else 0.0
        return torch.where(rows.is_heard, rows.named * (nats - largest).exp(), 0.0)
    return (rows.named.log() + nats).softmax(-1)


def _speaking(divergence: Tensor, rows: _Rows, how: Mixing) -> Tensor:
    heard = torch.where(rows.is_heard, divergence, 0.0)
    if heard.amax() < MIN_DIVERGENCE:
        return rows.named / rows.named.abs().sum().clamp_min(1e-30)
    voice = heard * rows.named.abs() if how.gate == "posterior-novelty" else heard
    shares: Tensor = (voice / voice.amax()) ** how.sharpness
    return rows.named * shares


def _scores(rows: _Rows, how: Mixing) -> Tensor:
    assert how.network is not None
    assert len(how.network) == GATE_SIZE
    mean = rows.log_probs[rows.is_heard].exp().mean(0).log()
    best = rows.log_probs.sort(-1, descending=True).values
    second = best[:, 1] if best.shape[-1] > 1 else torch.full_like(best[:, 0], -torch.inf)
    features = torch.stack(
        [
            rows.entropy(),
            best[:, 0],
            (best[:, 0] - second).clamp_max(MAX_NATS),
            rows.divergence(rows.log_probs[0]).clamp_max(MAX_NATS),
            rows.divergence(mean).clamp_max(MAX_NATS),
        ],
        -1,
    )
    network = how.network.to(features.dtype)
    wide = 2 * NUM_FEATURES * NUM_UNITS
    units, (bias, score) = network[:wide].view(NUM_UNITS, -1), network[wide:].view(2, -1)
    shared = features[rows.is_heard].mean(0).expand_as(features)
    seen = torch.cat((features, shared), -1) @ units.T + bias
    scores: Tensor = (seen.relu() * score).sum(-1)
    return scores


def _linear(rows: _Rows, weights: Tensor, how: Mixing) -> Tensor:
    terms = rows.log_probs + weights.log().unsqueeze(-1)
    return terms.logsumexp(0) + (weights * rows.log_mass).sum()


def _geometric(rows: _Rows, weights: Tensor, how: Mixing) -> Tensor:
    # 0 * -inf is no number, and a row without weight has no veto.
    heard = torch.where(weights.unsqueeze(-1) != 0, rows.logits, 0.0)
    return (weights.unsqueeze(-1) * heard).sum(0)


def _product(rows: _Rows, weights: Tensor, how: Mixing) -> Tensor:
    total = weights.sum()
    if not total > 0:
        return _geometric(rows, weights, how)
    if total < 1:
        weights, total = weights / total, torch.ones_like(total)
    mean = (weights * rows.log_mass).sum()
    return _geometric(rows, weights, how) + (mean / total - mean)


def _power(rows: _Rows, weights: Tensor, how: Mixing) -> Tensor:
    if abs(how.exponent) < SMALL_EXPONENT:
        mean = weights @ rows.floored
        spread = weights @ (rows.floored - mean).square()
        return _geometric(rows, weights, how) + how.exponent / 2 * spread
    terms = weights.log().unsqueeze(-1) + how.exponent * rows.log_probs
    heard = terms.masked_fill(weights.unsqueeze(-1) == 0, -torch.inf)
    return heard.logsumexp(0) / how.exponent + (weights * rows.log_mass).sum()


def _delta(rows: _Rows, weights: Tensor, how: Mixing) -> Tensor:
    shares = torch.cat((1.0 - weights[1:].sum(0, keepdim=True), weights[1:]))
    merged = (shares.unsqueeze(-1) * rows.floored).sum(0) + (shares * rows.log_mass).sum()
    voices = rows.log_probs
    if how.rule == "contrast":
        # A row that is argued against vouches for nothing.
        voices = voices.masked_fill(rows.named.unsqueeze(-1) < 0, -torch.inf)
    best = voices[0 if how.base_named else 1 :].amax(0)
    least = best.amax() + (math.log(how.cut) if how.cut > 0 else -math.inf)
    return merged.masked_fill(~((best >= least) & (best > -torch.inf)), -torch.inf)


def _route(rows: _Rows, weights: Tensor, how: Mixing) -> Tensor:
    return rows.logits[int(weights.argmax())]


_MERGES: dict[str, Callable[[_Rows, Tensor, Mixing], Tensor]] = {
    "linear": _linear,
    "geometric": _geometric,
    "product": _product,
    "power": _power,
    "delta": _delta,
    "contrast": _delta,
    "route": _route,
}
