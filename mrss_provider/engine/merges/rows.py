"""Rows: what merge rules and gates may know of the rows of G requests, each part computed once.

Everything is fp32; -inf marks a banned token. Requests never touch each other's numbers, not even
their last bits: sums over the vocabulary are plain sums, as matrix products take other kernels for
other G.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

# A log-probability below this (1e-13) says nothing but "no": differences of such tails are noise,
# and -inf minus -inf is no number.
LOG_PROB_FLOOR = -30.0


class Rows:
    """What rules and gates may know about the rows of G requests, each part computed once.

    Attributes:
        logits: [G, K, V] fp32, -inf where banned.
        named: [G, K] weights that the names say, as `MergeRule.scale` gives them; 0 in column 0
            if the base row was not named.
        cut: [G] plausibility cuts in [0, 1).
        base_named: whether row 0 is a base that the name contains (all G alike).
    """

    def __init__(
        self, logits: Tensor, named: Tensor, cut: Tensor, *, base_named: bool = False
    ) -> None:
        self.logits = logits
        self.named = named
        self.cut = cut
        self.base_named = base_named

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities [G, K, V]."""
        return self.logits.softmax(-1)

    @cached_property
    def log_mass(self) -> Tensor:
        """Log-sum-exp of the logits [G, K]: `log_probs = logits - log_mass`."""
        # The likeliest token has both logit and probability at hand; a pass of logsumexp
        # costs 17 times as much.
        return self.logits.amax(-1) - self.probs.amax(-1).log()

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probabilities [G, K, V], -inf where banned."""
        return self.logits - self.log_mass.unsqueeze(-1)

    @cached_property
    def floored(self) -> Tensor:
        """Log-probabilities [G, K, V], finite: at least `LOG_PROB_FLOOR`."""
        return self.log_probs.clamp_min(LOG_PROB_FLOOR)

    def divergence_from_base(self) -> Tensor:
        """Return `KL(row || row 0)` [G, K] in nats, >= 0; the base is row 0."""
        gains = self.probs * (self.floored - self.floored[:, :1])
        return gains.sum(-1).clamp_min(0.0)

    def entropy(self) -> Tensor:
        """Return the entropy of each row [G, K] in nats, >= 0."""
        return (self.probs * self.floored).sum(-1).neg().clamp_min(0.0)
