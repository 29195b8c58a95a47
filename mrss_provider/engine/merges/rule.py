"""MergeRule: what every merge rule is, and the sums that they share.

A rule works on G requests at once that share rule, gate and number of rows. Everything is fp32;
-inf marks a banned token and never becomes NaN. A NaN in a row that is heard stays a NaN in the
result (or leaves no token at all): the engine ends that request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mrss_provider.engine.merges.rows import Rows


class MergeRule(Protocol):
    """How rows become one distribution. Parameters are arguments of the class, by name.

    Attributes:
        name: what a mixture's name says after `~`.
        anchored: the rule starts from the base (row 0) and adds what each state changes; it
            ignores the weight of row 0.
        sums_to_one: the weights are shares of the rows and sum to 1; otherwise they are strengths.
        has_cut: whether `Rows.cut` does anything.
    """

    name: str
    anchored: bool
    sums_to_one: bool
    has_cut: bool

    def scale(self, ratios: Sequence[float], *, base_named: bool) -> tuple[float, ...]:
        """Turn ratios of all rows into weights for `merge`.

        Args:
            ratios: in row order; 0 for a base row that only the rule or the gate needs.
            base_named: whether row 0 is a base that the mixture's name contains.
        """
        ...

    def merge(self, rows: Rows, weights: Tensor) -> Tensor:
        """Return canonical logits [G, V] from `rows` and the gated weights [G, K].

        Canonical: their log-softmax is the merged distribution, and their scale is that of the
        rows' logits, so that penalties act as ever. The result may share memory with the rows.
        """
        ...


def sum_to_one(ratios: Sequence[float]) -> tuple[float, ...]:
    """Divide `ratios` (>= 0, one above 0) by their sum."""
    total = sum(ratios)
    return tuple(ratio / total for ratio in ratios)


def weigh(weights: Tensor, rows: Tensor) -> Tensor:
    """Return `sum_k weights[g, k] * rows[g, k, v]` [G, V]."""
    return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)


def weigh_heard(weights: Tensor, rows: Tensor) -> Tensor:
    """Return the same where 0 times -inf is 0: a row without weight has no veto."""
    return weigh(weights, torch.where(weights.unsqueeze(-1) != 0, rows, 0.0))


def mean_log_mass(rows: Rows, weights: Tensor) -> Tensor:
    """Return `sum_k weights[g, k] * log_mass[g, k]` [G, 1]."""
    return (weights * rows.log_mass).sum(-1, keepdim=True)


def one_row(rows: Rows, index: Tensor) -> Tensor:
    """Return the logits [G, V] of row `index[g]` of each request, bit for bit."""
    return rows.logits[torch.arange(len(index), device=index.device), index]


def or_alone(merged: Tensor, rows: Rows, weights: Tensor) -> Tensor:
    """Return `merged` [G, V], but the row itself, bit for bit, where only one has a weight."""
    is_alone = (weights > 0).sum(-1, keepdim=True) == 1
    if not bool(is_alone.any()):
        return merged
    return torch.where(is_alone, one_row(rows, weights.argmax(-1)), merged)
