"""`product`: a product of experts; what several states find likely becomes likelier still."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrss_provider.engine.merges.rows import Rows
from mrss_provider.engine.merges.rule import mean_log_mass, sum_to_one, weigh_heard


class Product:
    """`log p = sum_k c_k lp_k - log Z` with exponents that need not sum to 1.

    At sum 1 it is `geometric`, which halves what a state knows that stands beside one without an
    opinion; with exponents of 1 each state keeps its full say. A gate may leave less than 1 of
    their sum: they are scaled up to it, or the answer would be flatter than any state's.
    """

    name = "product"
    anchored = False
    sums_to_one = False
    has_cut = False

    def scale(self, ratios: Sequence[float], *, base_named: bool) -> tuple[float, ...]:
        """Keep the ratios as exponents; with a named base rescale to sum 1."""
        return sum_to_one(ratios) if base_named else tuple(ratios)

    def merge(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return `sum_k c_k lp_k` shifted by the mean of the rows' log-masses."""
        weights = exponents(weights)
        total = weights.sum(-1, keepdim=True)
        # Of the sum of the logits, which needs no shift where the exponents sum to 1.
        mean = mean_log_mass(rows, weights)
        # Not the inverse of the total, which is infinite for the smallest that there are.
        shift = torch.where(total > 0, mean / total - mean, 0.0)
        return weigh_heard(weights, rows.logits) + shift


def exponents(weights: Tensor) -> Tensor:
    """Return gated weights [G, K] as exponents: those of a request whose sum is below 1 scaled."""
    total = weights.sum(-1, keepdim=True)
    return torch.where((total > 0) & (total < 1), weights / total, weights)
