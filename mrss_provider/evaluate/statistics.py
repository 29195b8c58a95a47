"""Numbers of an evaluation: intervals over facts, two systems that are right or not, areas.

Facts are the sample, not answers: several answers about one fact are alike. Of two systems that
were asked the same, the differences are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mrss_provider.resampling import Sample, judge

_LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, its 95 % interval, and how surely it is above or below 0.

    Attributes:
        mean: of all values.
        low, high: infinite of fewer than six facts, which tell too little.
        p: two-sided, that the mean is 0.
    """

    mean: float
    low: float
    high: float
    p: float


def interval(values: Sequence[float], groups: Sequence[int], *, seed: int = 0) -> Interval:
    """Return the mean of `values` and its interval, by resampling whole groups.

    Args:
        values: one an answer, or one pair's difference; at least one.
        groups: which fact each is about.
        seed: of the draws.
    """
    found = judge(Sample.of(zip(groups, values, strict=True)), seed)
    return Interval(found.mean, *found.interval(_LEVEL), found.p)


def mean(values: Sequence[float] | Sequence[bool]) -> float:
    """Return the mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Return the exact two-sided p-value that two systems are right equally often."""
    only_one = sum(a and not b for a, b in zip(one, other, strict=True))
    only_other = sum(b and not a for a, b in zip(one, other, strict=True))
    total = only_one + only_other
    tail = sum(math.comb(total, k) for k in range(min(only_one, only_other) + 1))
    return min(1.0, float(2 * tail / 2**total))


def entropy(forms: Sequence[str]) -> float:
    """Return the entropy of the empirical distribution over `forms`, in nats."""
    if not forms:
        return 0.0
    _, counts = np.unique(np.asarray(forms), return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Return the area that points (knowledge, tone) dominate above a reference point."""
    above = [(x, y) for x, y in points if x > reference[0] and y > reference[1]]
    area, reached = 0.0, reference[1]
    for x, y in sorted(above, reverse=True):
        if y > reached:
            area += (x - reference[0]) * (y - reached)
            reached = y
    return area
