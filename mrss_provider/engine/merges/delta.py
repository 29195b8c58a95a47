"""`delta`: the base, and added to it what each state changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrss_provider.engine.merges.rows import Rows
from mrss_provider.engine.merges.rule import mean_log_mass, sum_to_one, weigh

_LOWEST = torch.finfo(torch.float32).min


class Delta:
    """`lp_0 + sum_k l_k (lp_k - lp_0)`: model arithmetic, as in DExperts (arXiv 2105.03023).

    Where the base finds a token all but impossible the difference is noise, so tokens that no
    named row finds plausible are removed: `max_k lp_k < max_v max_k lp_k + log cut`.
    """

    name = "delta"
    anchored = True
    sums_to_one = False
    has_cut = True

    def scale(self, ratios: Sequence[float], *, base_named: bool) -> tuple[float, ...]:
        """Keep the ratios as strengths; with a named base rescale to sum 1."""
        return sum_to_one(ratios) if base_named else tuple(ratios)

    def merge(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return the sum above on the scale of the logits, -inf where cut; column 0 is unused."""
        return cut(rows, add_changes(rows, weights), rows.log_probs)


def add_changes(rows: Rows, weights: Tensor) -> Tensor:
    """Return `lp_0 + sum_k l_k (lp_k - lp_0)` [G, V] on the scale of the logits."""
    strengths = weights[:, 1:]
    shares = torch.cat((1.0 - strengths.sum(-1, keepdim=True), strengths), dim=1)
    return weigh(shares, rows.floored) + mean_log_mass(rows, shares)


def cut(rows: Rows, merged: Tensor, voices: Tensor) -> Tensor:
    """Return `merged` [G, V], -inf where none of the named rows of `voices` is plausible.

    Args:
        rows: their cuts, and whether row 0 is named.
        merged: logits [G, V].
        voices: log-probabilities [G, K, V] of those that may keep a token.
    """
    best = voices[:, 0 if rows.base_named else 1 :].amax(1)
    # At a cut of 0 the threshold is the lowest float: only what all rows ban is below it.
    threshold = (best.amax(-1, keepdim=True) + rows.cut.log().unsqueeze(-1)).clamp_min(_LOWEST)
    return torch.where(best >= threshold, merged, -torch.inf)
