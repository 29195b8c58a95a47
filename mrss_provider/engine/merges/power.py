"""`power`: the family of means between `linear` (exponent 1) and `geometric` (0), and beyond."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrss_provider.engine.merges.rows import Rows
from mrss_provider.engine.merges.rule import (
    mean_log_mass,
    or_alone,
    sum_to_one,
    weigh,
    weigh_heard,
)

SMALL_EXPONENT = 3e-3
"""Below it 1/a magnifies the rounding of fp32 more than a second-order form leaves out."""


class Power:
    """`log p = logsumexp_k(log w_k + a lp_k) / a - log Z`."""

    name = "power"
    anchored = False
    sums_to_one = True
    has_cut = False

    def __init__(self, exponent: float) -> None:
        self._exponent = exponent

    def scale(self, ratios: Sequence[float], *, base_named: bool) -> tuple[float, ...]:
        """Rescale to sum 1."""
        return sum_to_one(ratios)

    def merge(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return the mean above, shifted by the weighted mean of the rows' log-masses."""
        if abs(self._exponent) < SMALL_EXPONENT:
            merged = self._near_geometric(rows, weights)
        else:
            merged = self._mean(rows, weights) + mean_log_mass(rows, weights)
        return or_alone(merged, rows, weights)

    def _mean(self, rows: Rows, weights: Tensor) -> Tensor:
        terms = weights.log().unsqueeze(-1) + self._exponent * rows.log_probs
        # With a negative exponent a ban is +inf, and a row without weight has no veto.
        heard = torch.where(weights.unsqueeze(-1) != 0, terms, -torch.inf)
        return heard.logsumexp(1) / self._exponent

    def _near_geometric(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return `sum_k w_k z_k + a/2 var_w(lp)`, the mean to second order in the exponent."""
        merged = weigh_heard(weights, rows.logits)
        if self._exponent == 0:
            return merged
        spread = rows.floored - weigh(weights, rows.floored).unsqueeze(1)
        return merged + self._exponent / 2 * weigh(weights, spread.square())
