"""`route`: one row a token, the one that weighs most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrss_provider.engine.merges.rows import Rows
from mrss_provider.engine.merges.rule import one_row, sum_to_one


class Route:
    """The row with the largest gated weight as it is; the first of equals."""

    name = "route"
    anchored = False
    sums_to_one = True
    has_cut = False

    def scale(self, ratios: Sequence[float], *, base_named: bool) -> tuple[float, ...]:
        """Rescale to sum 1."""
        return sum_to_one(ratios)

    def merge(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return that row's logits, bit for bit."""
        # Weights that are no numbers choose nobody: without this they would choose row 0.
        is_nan = weights.isnan().any(-1, keepdim=True)
        return torch.where(is_nan, torch.nan, one_row(rows, weights.argmax(-1)))
