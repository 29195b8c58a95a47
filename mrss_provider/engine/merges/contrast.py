"""`contrast`: `delta` whose strengths may be negative, to push an answer away from a state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrss_provider.engine.merges.delta import add_changes, cut
from mrss_provider.engine.merges.rows import Rows


class Contrast:
    """`lp_0 + sum_k l_k (lp_k - lp_0)` with any sign of l_k.

    A row that is pushed away from does not make a token plausible: the cut listens to the others.
    """

    name = "contrast"
    anchored = True
    sums_to_one = False
    has_cut = True

    def scale(self, ratios: Sequence[float], *, base_named: bool) -> tuple[float, ...]:
        """Keep the ratios as strengths. A named base is the unit that they are measured in."""
        return tuple(ratios)

    def merge(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return the sum above on the scale of the logits, -inf where cut; column 0 is unused."""
        is_against = (rows.named < 0).unsqueeze(-1)
        voices = torch.where(is_against, -torch.inf, rows.log_probs)
        return cut(rows, add_changes(rows, weights), voices)
