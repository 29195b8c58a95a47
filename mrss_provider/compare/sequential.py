"""Intervals that hold at all times at once, so that looking often, and stopping then, is no error.

With probability 1 - alpha the truth is inside at every moment, from the first to the last; an
interval of fixed size, looked at every day, would leave it sooner or later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Interval = tuple[float, float]

# Before, a variance that is estimated says too little for the normal limit to hold.
MIN_CALLS = 100
# The number of calls an arm at which intervals are about as narrow as they can be.
_TUNED_FOR = 500
_BOUNDED_TUNED_FOR = 100
_NUM_HALVINGS = 60
# Of what is in [-1, 1]: its standard deviation is at most 1 (Hoeffding).
_BOUNDED_SIGMA = 1.0


@dataclass(frozen=True)
class Moments:
    """Attributes: how many values, their mean, and their variance (with n - 1)."""

    num: int
    mean: float
    variance: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Moments:
        """Return those of `values`, at least two."""
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(len(values), mean, squares / (len(values) - 1))


def mean_difference(a: Moments, b: Moments, alpha: float) -> Interval | None:
    """Return the interval of mean(a) - mean(b), None while an arm has fewer than MIN_CALLS.

    The normal mixture of Robbins (1970), as the mixture sequential probability ratio test of
    Johari, Koomen, Pekelis and Walsh (Operations Research 70, 2022) for two streams of calls,
    with estimated variances: an asymptotic confidence sequence (Waudby-Smith et al., Annals of
    Statistics 52, 2024). With V the variance of the difference and tau^2 that of the mixture,

        width^2 = V (V + tau^2) / tau^2 * log((V + tau^2) / (V alpha^2)).
    """
    if min(a.num, b.num) < MIN_CALLS:
        return None
    variance = a.variance / a.num + b.variance / b.num
    middle = a.mean - b.mean
    if variance == 0:
        return middle, middle
    width = _mixture_width(variance, (a.variance + b.variance) / _TUNED_FOR, alpha)
    return middle - width, middle + width


def proportion(successes: int, num: int, alpha: float) -> Interval:
    """Return the interval of a probability; exact at every number of trials.

    The beta mixture (Robbins 1970; Lai, Annals of Statistics 4, 1976) with Beta(1/2, 1/2): all p
    whose likelihood is not 1 / alpha times below that of the mixture (Ville's inequality).
    """
    if num == 0:
        return 0.0, 1.0
    failures = num - successes
    mixture = _log_beta(0.5 + successes, 0.5 + failures) - _log_beta(0.5, 0.5)

    def is_inside(p: float) -> bool:
        likelihood = _times_log(successes, p) + _times_log(failures, 1 - p)
        return mixture - likelihood < math.log(1 / alpha)

    best = successes / num
    low = 0.0 if successes == 0 else _edge(is_inside, best, 0.0)
    high = 1.0 if failures == 0 else _edge(is_inside, best, 1.0)
    return low, high


def proportion_difference(a: tuple[int, int], b: tuple[int, int], alpha: float) -> Interval:
    """Return the interval of p(a) - p(b), exact and somewhat wide: alpha is halved between them.

    Args:
        a: successes and trials.
        b: the same.
        alpha: error rate.
    """
    return _apart(proportion(*a, alpha / 2), proportion(*b, alpha / 2))


def bounded_mean(values: Sequence[float], alpha: float) -> Interval:
    """Return the interval of the mean of values in [-1, 1]; exact at every number of them.

    The normal mixture for sub-Gaussian values (Robbins 1970; Howard, Ramdas, McAuliffe and Sekhon,
    Annals of Statistics 49, 2021), with the scale that the bounds imply.
    """
    if not values:
        return -1.0, 1.0
    mean = math.fsum(values) / len(values)
    best = _BOUNDED_SIGMA**2 / _BOUNDED_TUNED_FOR
    width = _mixture_width(_BOUNDED_SIGMA**2 / len(values), best, alpha)
    return max(-1.0, mean - width), min(1.0, mean + width)


def bounded_mean_difference(a: Sequence[float], b: Sequence[float], alpha: float) -> Interval:
    """Return the interval of mean(a) - mean(b) of values in [-1, 1]; exact and somewhat wide."""
    return _apart(bounded_mean(a, alpha / 2), bounded_mean(b, alpha / 2))


def _mixture_width(variance: float, best: float, alpha: float) -> float:
    """Return half the width of the normal mixture's interval, narrowest at the variance `best`.

    tau^2 as Waudby-Smith et al. (2024) choose it.
    """
    tau2 = best * (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha)))
    total = variance + tau2
    return math.sqrt(variance * total / tau2 * math.log(total / (variance * alpha**2)))


def _apart(a: Interval, b: Interval) -> Interval:
    return a[0] - b[1], a[1] - b[0]


def _edge(is_inside: Callable[[float], bool], inside: float, outside: float) -> float:
    for _ in range(_NUM_HALVINGS):
        middle = (inside + outside) / 2
        if is_inside(middle):
            inside = middle
        else:
            outside = middle
    return outside


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _times_log(times: int, p: float) -> float:
    if times == 0:
        return 0.0
    return times * math.log(p) if p > 0 else -math.inf
