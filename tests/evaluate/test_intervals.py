"""Intervals cover what they should, tests find what is there, and not more often than they say."""

import math

import numpy as np
import pytest

from mrss_provider.evaluate.statistics import entropy, hypervolume, interval, mcnemar


def test_an_interval_over_groups_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 8)
    covered = 0
    for trial in range(60):
        # Answers about one fact are alike: the fact's own share is drawn first.
        shares = rng.beta(2, 2, size=40)
        values = (rng.random(320) < shares[groups]).astype(float)
        found = interval(values.tolist(), groups.tolist(), seed=trial)
        covered += found.low <= 0.5 <= found.high
    assert covered >= 52


def test_groups_that_are_alike_widen_the_interval():
    values = [1.0] * 80 + [0.0] * 80
    alike = interval(values, [i // 16 for i in range(160)])
    apart = interval(values, list(range(160)))
    assert alike.high - alike.low > 2 * (apart.high - apart.low)


def test_the_mean_is_of_all_values_and_p_is_small_where_all_are_above_0():
    values, facts = [0.5, 0.7] * 10 + [0.3], [i // 2 for i in range(20)] + [10]
    found = interval(values, facts)
    assert found.mean == pytest.approx(sum(values) / 21)
    assert found.p < 0.002
    assert interval([1.0, -1.0] * 4, list(range(8))).p == 1.0


def test_mcnemar_is_the_binomial_over_what_differs():
    one, other = [True] * 8 + [False] * 2 + [True] * 5, [False] * 8 + [True] * 2 + [True] * 5
    exact = 2 * sum(math.comb(10, k) for k in range(3)) / 2**10
    assert mcnemar(one, other) == pytest.approx(exact)
    assert mcnemar(one, one) == 1.0


def test_entropy_of_equal_forms_is_their_logarithm():
    assert entropy(["a", "b", "c", "d"]) == pytest.approx(math.log(4))
    assert entropy(["a"] * 7) == 0.0
    assert entropy([]) == 0.0


def test_hypervolume_is_the_area_of_the_union_of_rectangles():
    points = [(0.9, 0.2), (0.5, 0.8), (0.4, 0.5), (0.05, 1.0)]
    # Above (0.1, 0.1): 0.8 by 0.1, and on top of it 0.4 by 0.6.
    assert hypervolume(points, (0.1, 0.1)) == pytest.approx(0.8 * 0.1 + 0.4 * 0.6)
    assert hypervolume(points, (0.95, 0.0)) == 0.0
