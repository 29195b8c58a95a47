"""`posterior`: which state would have written what the user wrote, by Bayes with a fixed share.

It chooses among states; they must have been tuned with a loss on all tokens, as a state that was
tuned on answers alone knows nothing of questions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mrss_provider.engine.gates.gate import Gate, Heard

if TYPE_CHECKING:
    from mrss_provider.engine.request import ResolvedMixture

FLOOR = 1e-6
"""No state's share falls below it: it could never come back."""


class Posterior(Gate):
    """All named rows are candidates; the one with the largest ratio sets the scale."""

    name = "posterior"
    reads_prompt = True

    def __init__(self, share: float, own: bool) -> None:
        self._share = share
        self.reads_answer = self.moves_prior = own

    def candidates(self, mixture: ResolvedMixture) -> frozenset[str]:
        """Return every named row."""
        rows = zip(mixture.names, mixture.ratios, strict=True)
        return frozenset(name for name, ratio in rows if ratio > 0)

    def prior(self, mixture: ResolvedMixture, heard: Heard) -> tuple[float, ...]:
        """Return the largest ratio times each row's share of belief."""
        ratios = np.array(mixture.ratios, dtype=np.float64)
        return tuple(choose(ratios, ratios > 0, heard.log_probs, self._share).tolist())


def choose(
    ratios: NDArray[np.float64],
    group: NDArray[np.bool_],
    log_probs: NDArray[np.float32],
    share: float,
) -> NDArray[np.float64]:
    """Return `ratios` [K] with those of `group` [K] replaced: its largest times the beliefs.

    Args:
        ratios: what the name says; those of the group are the beliefs to begin with.
        group: the candidates, each with a ratio above 0.
        log_probs: [T, K] of the tokens under each row.
        share: of `fixed_share`.
    """
    if group.sum() < 2:
        return ratios
    own = ratios[group]
    evidence = log_probs[:, group] if len(log_probs) else np.zeros((0, len(own)), np.float32)
    chosen = ratios.copy()
    chosen[group] = own.max() * fixed_share(own / own.sum(), evidence, share)[-1]
    return chosen


def fixed_share(
    beliefs: NDArray[np.float64], log_probs: NDArray[np.float32], share: float
) -> NDArray[np.float64]:
    """Return beliefs [T + 1, K] before each token and after the last.

    `u_k ~ w_k p_k(x)`, then `w_k = (1 - share) u_k + share (1 - u_k) / (K - 1)`: the loss against
    the best sequence of states grows with its switches only (Herbster and Warmuth, "Tracking the
    best expert", 1998). A token that every row bans, or with a NaN, says nothing.

    Args:
        beliefs: [K] > 0, sum 1, K >= 2.
        log_probs: [T, K].
        share: in [0, 0.5].
    """
    rows = log_probs.astype(np.float64)
    peaks = rows.max(1, keepdims=True)
    is_heard = np.isfinite(peaks)
    likelihoods = np.exp(rows - np.where(is_heard, peaks, 0.0))
    # In plain numbers: arrays of a few states cost three times as much, which a gate that listens
    # to the answer pays at every token.
    current = beliefs.tolist()
    steps = [current]
    for heard, likelihood in zip(is_heard[:, 0].tolist(), likelihoods.tolist(), strict=True):
        if heard:
            updated = [w * p for w, p in zip(current, likelihood, strict=True)]
            current = _shared(_normalised(updated), share)
        steps.append(current)
    return np.array(steps)


def _shared(beliefs: list[float], share: float) -> list[float]:
    others = len(beliefs) - 1
    return _normalised([max(FLOOR, (1 - share) * u + share * (1 - u) / others) for u in beliefs])


def _normalised(values: list[float]) -> list[float]:
    total = sum(values)
    return [value / total for value in values]
