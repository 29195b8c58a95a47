"""`novelty`: a state speaks when it differs from the base."""

from __future__ import annotations

import torch
from torch import Tensor

from mrss_provider.engine.gates.gate import Gate
from mrss_provider.engine.merges import Rows

MAX_DIVERGENCE = 8.0
"""Nats; beyond it a state is simply elsewhere, and how far says nothing."""

MIN_DIVERGENCE = 1e-4
"""Nats; below it all states agree with the base and their order is rounding noise."""


class Novelty(Gate):
    """By `d_k = KL(p_k || p_0)`.

    Shares: `w_k exp(d_k / tau)`, normalised. Strengths: `w_k (d_k / max_j d_j)^exponent`, or
    `w_k / sum_j |w_j|` while all states agree with the base. Rows without weight count nowhere.
    """

    name = "novelty"
    needs_base = True

    def __init__(self, tau: float, exponent: float = 1.0) -> None:
        self._tau = tau
        self._exponent = exponent

    def weights(self, rows: Rows, *, sums_to_one: bool) -> Tensor:
        """Return the named weights times what the divergences say."""
        divergence = rows.divergence_from_base()
        if sums_to_one:
            clipped = divergence.clamp_max(MAX_DIVERGENCE)
            return (rows.named.log() + clipped / self._tau).softmax(-1)
        heard = torch.where(rows.named != 0, divergence, 0.0)
        total = rows.named.abs().sum(-1, keepdim=True)
        agreed = rows.named / total.clamp_min(torch.finfo(torch.float32).tiny)
        all_agree = heard.amax(-1, keepdim=True) < MIN_DIVERGENCE
        return torch.where(all_agree, agreed, rows.named * self._voice(heard, rows.named))

    def _voice(self, divergence: Tensor, named: Tensor) -> Tensor:
        """Return how much of its strength each row has [G, K], where the states do not agree."""
        share = of_largest(divergence)
        return share if self._exponent == 1 else share.pow(self._exponent)


def of_largest(values: Tensor) -> Tensor:
    """Return `values` [G, K] >= 0 divided by the largest of each request; all 0 stay 0."""
    return values / values.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
