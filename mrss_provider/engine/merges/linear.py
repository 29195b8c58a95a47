"""`linear`: the mixture of the rows' probabilities; a token that any state loves survives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrss_provider.engine.merges.rows import Rows
from mrss_provider.engine.merges.rule import mean_log_mass, or_alone, sum_to_one, weigh


class Linear:
    """`log p = logsumexp_k(log w_k + lp_k)`."""

    name = "linear"
    anchored = False
    sums_to_one = True
    has_cut = False

    def scale(self, ratios: Sequence[float], *, base_named: bool) -> tuple[float, ...]:
        """Rescale to sum 1."""
        return sum_to_one(ratios)

    def merge(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return `log p` shifted by the weighted mean of the rows' log-masses."""
        summed = weigh(weights, rows.probs).log_()
        # Where every probability underflowed, the largest term stands for the sum (within log K).
        offset = weights.log() - rows.log_mass
        largest = (rows.logits + offset.unsqueeze(-1)).amax(1)
        merged = torch.maximum(summed, largest) + mean_log_mass(rows, weights)
        return or_alone(merged, rows, weights)
