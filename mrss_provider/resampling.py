"""Means of values that come in groups: intervals, p-values, and Holm's correction over several.

Groups are the sample: answers to one prompt, or about one fact, are alike and stay together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUM_RESAMPLES = 4000
# Up to so many groups all subsets are looked at.
_MAX_ENUMERATED = 12
# Numbers of one matrix of resamples.
_MAX_CELLS = 4_000_000
# Rounding of values that are equal.
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Sample:
    """Values, mostly paired differences, summed over each group.

    Attributes:
        sums: of a group's values, [N].
        counts: of them, [N], at least 1 each.
    """

    sums: Floats
    counts: Floats

    @property
    def mean(self) -> float:
        """Over all values."""
        return float(self.sums.sum() / self.counts.sum())

    @classmethod
    def of(cls, values: Iterable[tuple[Hashable, float]]) -> Sample:
        """Gather (group, value) by group.

        Args:
            values: at least one; all finite.
        """
        sums: dict[Hashable, list[float]] = {}
        for group, value in values:
            sums.setdefault(group, []).append(value)
        return cls(
            np.array([math.fsum(own) for own in sums.values()]),
            np.array([float(len(own)) for own in sums.values()]),
        )


@dataclass(frozen=True)
class Mean:
    """What a sample says of a mean.

    Attributes:
        mean: of all values.
        num_groups: in the sample.
        bootstrap: means of resamples, ascending, [NUM_RESAMPLES].
        subsets: means of subsets, ascending, [M].
    """

    mean: float
    num_groups: int
    bootstrap: Floats
    subsets: Floats

    @property
    def p(self) -> float:
        """The p-value that goes with `interval`: 1 - level where an end just meets 0."""
        return max(_p_value(self.bootstrap), _p_value(self.subsets))

    def interval(self, level: float) -> tuple[float, float]:
        """Return the interval with coverage `level`, in (0, 1); infinite where too little is known.

        Each end is the outer one of two intervals. The bootstrap's percentiles (Efron 1979; whole
        groups are drawn) follow skewed values, but are too narrow for a handful of groups. The
        means of subsets (Hartigan 1969) are exact for symmetric values, however few: they are what
        flipping the signs of groups (Fisher's randomisation test) does not reject.
        """
        ends = [_ends(self.bootstrap, level), _ends(self.subsets, level)]
        return min(low for low, _ in ends), max(high for _, high in ends)


def judge(sample: Sample, seed: int = 0) -> Mean:
    """Judge a sample.

    Args:
        sample: of groups.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    num_groups = len(sample.sums)
    if num_groups <= _MAX_ENUMERATED:
        codes = np.arange(1, 2**num_groups)[:, None]
        chosen = ((codes >> np.arange(num_groups)) & 1).astype(np.float64)
        subsets = _means(sample, chosen)
    else:
        subsets = _drawn(sample, rng, is_subset=True)
    return Mean(
        mean=sample.mean,
        num_groups=num_groups,
        bootstrap=np.sort(_drawn(sample, rng, is_subset=False)),
        subsets=np.sort(subsets),
    )


def holm(p_values: Sequence[float]) -> list[tuple[float, int]]:
    """Return for each p-value its adjusted one, and by how many its level was divided.

    Holm (1979): the smallest is compared with alpha / m, the next with alpha / (m - 1), and so on.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted: list[tuple[float, int]] = [(1.0, 1)] * len(p_values)
    reached = 0.0
    for rank, i in enumerate(order):
        divisor = len(p_values) - rank
        reached = max(reached, min(1.0, divisor * p_values[i]))
        adjusted[i] = (reached, divisor)
    return adjusted


def _drawn(sample: Sample, rng: np.random.Generator, *, is_subset: bool) -> Floats:
    """Return means of NUM_RESAMPLES random subsets, or of resamples with replacement."""
    num_groups = len(sample.sums)
    step = max(1, _MAX_CELLS // num_groups)
    found: list[Floats] = []
    for start in range(0, NUM_RESAMPLES, step):
        size = min(step, NUM_RESAMPLES - start)
        if is_subset:
            chosen = rng.integers(0, 2, size=(size, num_groups), dtype=np.int8)
            weights = chosen.astype(np.float64)
            # The empty one has no mean; of this many groups it hardly ever comes.
            weights[weights.sum(axis=1) == 0] = 1.0
        else:
            even = np.full(num_groups, 1 / num_groups)
            weights = rng.multinomial(num_groups, even, size).astype(np.float64)
        found.append(_means(sample, weights))
    return np.concatenate(found)


def _means(sample: Sample, weights: Floats) -> Floats:
    """Return the means of samples whose groups are there `weights` times, [B, N] to [B]."""
    means: Floats = (weights @ sample.sums) / (weights @ sample.counts)
    means[np.abs(means) <= _TOLERANCE * np.abs(sample.sums).max(initial=0.0)] = 0.0
    return means


def _ends(means: Floats, level: float) -> tuple[float, float]:
    """Return the interval that leaves out as many of `means` on both sides as `level` allows.

    M means divide the line into M + 1 parts, in each of which the truth is as likely.
    """
    num_outside = math.floor((1 - level) / 2 * (len(means) + 1) + 1e-9)
    if num_outside == 0:
        return -math.inf, math.inf
    return float(means[num_outside - 1]), float(means[-num_outside])


def _p_value(means: Floats) -> float:
    """Return the smallest alpha at which 0 is outside of the interval of level 1 - alpha."""
    num_below = int(np.searchsorted(means, 0.0, side="right"))
    num_above = len(means) - int(np.searchsorted(means, 0.0, side="left"))
    return min(1.0, 2 * (min(num_below, num_above) + 1) / (len(means) + 1))
