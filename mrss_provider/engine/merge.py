"""Merge rules: the rows of a mixture become one row of logits.

A rule is one class and one line in `MERGE_RULES`. It works on G requests at once that share rule,
gate and number of rows. Everything is fp32; -inf marks a banned token and never becomes NaN.
A NaN in a row stays a NaN in the result (or leaves no token at all): the engine ends that request.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

# A log-probability below this (1e-13) says nothing but "no": differences of such tails are noise,
# and -inf minus -inf is no number.
LOG_PROB_FLOOR = -30.0
_LOWEST = torch.finfo(torch.float32).min


class Rows:
    """What rules and gates may know about the rows of G requests, each part computed once.

    Attributes:
        logits: [G, K, V] fp32, -inf where banned.
        named: [G, K] weights that the names say, as `MergeRule.scale` gives them; 0 in column 0
            if the base row was not named.
        cut: [G] plausibility cuts in [0, 1).
        base_named: whether row 0 is a base that the name contains (all G alike).
    """

    def __init__(
        self, logits: Tensor, named: Tensor, cut: Tensor, *, base_named: bool = False
    ) -> None:
        self.logits = logits
        self.named = named
        self.cut = cut
        self.base_named = base_named

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities [G, K, V]."""
        return self.logits.softmax(-1)

    @cached_property
    def log_mass(self) -> Tensor:
        """Log-sum-exp of the logits [G, K]: `log_probs = logits - log_mass`."""
        # The likeliest token has both logit and probability at hand; a pass of logsumexp
        # costs 17 times as much.
        return self.logits.amax(-1) - self.probs.amax(-1).log()

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probabilities [G, K, V], -inf where banned."""
        return self.logits - self.log_mass.unsqueeze(-1)

    @cached_property
    def floored(self) -> Tensor:
        """Log-probabilities [G, K, V], finite: at least `LOG_PROB_FLOOR`."""
        return self.log_probs.clamp_min(LOG_PROB_FLOOR)

    def divergence_from_base(self) -> Tensor:
        """Return `KL(row || row 0)` [G, K] in nats, >= 0; the base is row 0."""
        # A plain sum: matrix products take other kernels for other G, whose last bits differ, and
        # a request's tokens must not depend on what shares its step.
        gains = self.probs * (self.floored - self.floored[:, :1])
        return gains.sum(-1).clamp_min(0.0)


class MergeRule(Protocol):
    """How rows become one distribution.

    Attributes:
        name: what a mixture's name says after `~`.
        anchored: the rule starts from the base (row 0) and adds what each state changes, its
            weights are strengths; otherwise the weights sum to 1.
        has_cut: whether `Rows.cut` does anything.
    """

    name: str
    anchored: bool
    has_cut: bool

    def scale(self, ratios: Sequence[float], base_ratio: float) -> tuple[tuple[float, ...], float]:
        """Turn canonical ratios of the states and of the base into weights for `merge`."""
        ...

    def merge(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return canonical logits [G, V] from `rows` and the gated weights [G, K]."""
        ...


class Linear:
    """`log p = logsumexp_k(log w_k + lp_k)`: a token that any state loves survives."""

    name = "linear"
    anchored = False
    has_cut = False

    def scale(self, ratios: Sequence[float], base_ratio: float) -> tuple[tuple[float, ...], float]:
        """Rescale to sum 1."""
        return _sum_to_one(ratios, base_ratio)

    def merge(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return `log p` shifted by the weighted mean of the rows' log-masses."""
        summed = _weigh(weights, rows.probs).log_()
        # Where every probability underflowed, the largest term stands for the sum (within log K).
        offset = weights.log() - rows.log_mass
        largest = (rows.logits + offset.unsqueeze(-1)).amax(1)
        return torch.maximum(summed, largest) + _mean_log_mass(rows, weights)


class Geometric:
    """`log p = sum_k w_k lp_k - log Z`: a token that any state hates dies.

    The mean of the logits is that distribution on the usual scale, and what RWKV-Infer computes.
    """

    name = "geometric"
    anchored = False
    has_cut = False

    def scale(self, ratios: Sequence[float], base_ratio: float) -> tuple[tuple[float, ...], float]:
        """Rescale to sum 1."""
        return _sum_to_one(ratios, base_ratio)

    def merge(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return the weighted mean of the logits."""
        # 0 * -inf is no number, and a row without weight has no veto.
        heard = torch.where(weights.unsqueeze(-1) > 0, rows.logits, 0.0)
        return _weigh(weights, heard)


class Delta:
    """`lp_0 + sum_k l_k (lp_k - lp_0)`: adds what each state changes (MRSS, DExperts).

    Where the base finds a token all but impossible the difference is noise, so tokens that no
    named row finds plausible are removed: `max_k lp_k < max_v max_k lp_k + log cut`.
    """

    name = "delta"
    anchored = True
    has_cut = True

    def scale(self, ratios: Sequence[float], base_ratio: float) -> tuple[tuple[float, ...], float]:
        """Keep the canonical ratios as strengths; with a named base rescale to sum 1."""
        return _sum_to_one(ratios, base_ratio) if base_ratio > 0 else (tuple(ratios), 0.0)

    def merge(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return the sum above on the scale of the logits, -inf where cut; column 0 is unused."""
        strengths = weights[:, 1:]
        shares = torch.cat((1.0 - strengths.sum(-1, keepdim=True), strengths), dim=1)
        merged = _weigh(shares, rows.floored) + _mean_log_mass(rows, shares)
        best = rows.log_probs[:, 0 if rows.base_named else 1 :].amax(1)
        # At `cut` 0 the threshold is the lowest float: only what all rows ban is below it.
        threshold = (best.amax(-1, keepdim=True) + rows.cut.log().unsqueeze(-1)).clamp_min(_LOWEST)
        return torch.where(best >= threshold, merged, -torch.inf)


MERGE_RULES: dict[str, MergeRule] = {rule.name: rule for rule in (Linear(), Geometric(), Delta())}
"""Every rule, by name: the one place where a rule is registered."""


def _sum_to_one(ratios: Sequence[float], base_ratio: float) -> tuple[tuple[float, ...], float]:
    total = sum(ratios) + base_ratio
    return tuple(ratio / total for ratio in ratios), base_ratio / total


def _weigh(weights: Tensor, rows: Tensor) -> Tensor:
    """Return `sum_k weights[g, k] * rows[g, k, v]` [G, V]."""
    return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)


def _mean_log_mass(rows: Rows, weights: Tensor) -> Tensor:
    return (weights * rows.log_mass).sum(-1, keepdim=True)
