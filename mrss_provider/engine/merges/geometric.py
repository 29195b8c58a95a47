"""`geometric`: the mean of the logits; a token that any state hates dies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mrss_provider.engine.merges.rows import Rows
from mrss_provider.engine.merges.rule import sum_to_one, weigh_heard


class Geometric:
    """`log p = sum_k w_k lp_k - log Z`.

    The mean of the logits is that distribution on the usual scale, and what RWKV-Infer computes.
    """

    name = "geometric"
    anchored = False
    sums_to_one = True
    has_cut = False

    def scale(self, ratios: Sequence[float], *, base_named: bool) -> tuple[float, ...]:
        """Rescale to sum 1."""
        return sum_to_one(ratios)

    def merge(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return the weighted mean of the logits."""
        return weigh_heard(weights, rows.logits)
