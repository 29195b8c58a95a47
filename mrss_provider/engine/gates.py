"""Gates: what each row weighs for the next token.

A gate is one class and one line in `GATES`. It multiplies what the mixture's name says, sees the
rows of this token only (never what will be sampled), and treats all states alike: permuting them
permutes its weights.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mrss_provider.engine.merge import Rows

NOVELTY_TEMPERATURE = 0.3
"""Nats of divergence that make a state e times heavier under the rules whose weights sum to 1."""

MAX_DIVERGENCE = 8.0
"""Nats; beyond it a state is simply elsewhere, and how far says nothing."""

MIN_DIVERGENCE = 1e-4
"""Nats; below it all states agree with the base and their order is rounding noise."""


class Gate(Protocol):
    """How the rows weigh.

    Attributes:
        name: what a mixture's name says after `~`.
        needs_base: whether row 0 must be the base.
    """

    name: str
    needs_base: bool

    def weights(self, rows: Rows, *, anchored: bool) -> Tensor:
        """Return weights [G, K] for the next token.

        Args:
            rows: of this token; `rows.named` are the weights to multiply.
            anchored: the merge rule takes strengths relative to row 0, and ignores column 0;
                otherwise the result sums to 1.
        """
        ...


class Fixed:
    """What the name says."""

    name = "fixed"
    needs_base = False

    def weights(self, rows: Rows, *, anchored: bool) -> Tensor:
        """Return the named weights."""
        return rows.named


class Novelty:
    """A state speaks when it differs from the base: by `d_k = KL(p_k || p_0)`.

    Anchored: `l_k = w_k d_k / max_j d_j`, or `w_k / sum_j w_j` while all states agree with the
    base. Otherwise `w_k exp(d_k / tau)`, normalised.
    """

    name = "novelty"
    needs_base = True

    def weights(self, rows: Rows, *, anchored: bool) -> Tensor:
        """Return the named weights times what the divergences say."""
        divergence = rows.divergence_from_base()
        if not anchored:
            clipped = divergence.clamp_max(MAX_DIVERGENCE)
            return (rows.named.log() + clipped / NOVELTY_TEMPERATURE).softmax(-1)
        largest = divergence.amax(-1, keepdim=True)
        agreed = rows.named / rows.named.sum(-1, keepdim=True)
        # The clamp keeps the branch that is not taken free of 0/0.
        speaking = rows.named * (divergence / largest.clamp_min(MIN_DIVERGENCE))
        return torch.where(largest < MIN_DIVERGENCE, agreed, speaking)


GATES: dict[str, Gate] = {gate.name: gate for gate in (Fixed(), Novelty())}
"""Every gate, by name: the one place where a gate is registered."""
