"""`confidence`: a state speaks when it is sure, whatever it is sure of."""

from __future__ import annotations

import torch
from torch import Tensor

from mrss_provider.engine.gates.gate import Gate
from mrss_provider.engine.merges import Rows


class Confidence(Gate):
    """By the entropy `H_k` of each row.

    Shares: `w_k exp(-H_k / tau)`, normalised. Strengths: `w_k exp((min_j H_j - H_k) / tau)`, the
    minimum over rows with a weight.
    """

    name = "confidence"

    def __init__(self, tau: float) -> None:
        self._tau = tau

    def weights(self, rows: Rows, *, sums_to_one: bool) -> Tensor:
        """Return the named weights times what the entropies say."""
        entropy = rows.entropy()
        if sums_to_one:
            return (rows.named.log() - entropy / self._tau).softmax(-1)
        heard = torch.where(rows.named != 0, entropy, torch.inf)
        surest = heard.amin(-1, keepdim=True)
        # A row without weight may be surer than all that have one.
        behind = (entropy - surest).clamp_min(0.0)
        return rows.named * (-behind / self._tau).exp()
