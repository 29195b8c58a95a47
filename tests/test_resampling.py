"""Intervals and p-values of means of groups. Oracle: cases worked by hand, and Holm's paper."""

import itertools
import math

import numpy as np
import pytest

from mrss_provider.resampling import Sample, holm, judge


def sample(values):
    """Return a sample of one value a group."""
    return Sample.of(enumerate(map(float, values)))


def test_values_of_one_group_are_one_observation():
    values = [(f"p{i}", i / 10) for i in range(-4, 9)]
    few, many = judge(Sample.of(values)), judge(Sample.of(values * 50))
    assert many.num_groups == few.num_groups == 13
    assert many.mean == pytest.approx(few.mean)
    assert many.interval(0.95) == pytest.approx(few.interval(0.95))


def test_few_groups_can_show_nothing_and_six_that_agree_can():
    for num in range(1, 6):
        assert judge(sample([1.0] * num)).interval(0.95) == (-math.inf, math.inf)
    found = judge(sample([1.0] * 6))
    assert found.interval(0.95) == (1.0, 1.0)
    assert found.p == 2 / 2**6


def test_one_odd_group_hides_no_large_judge():
    low, high = judge(sample([1.0] * 23 + [0.5])).interval(0.95)
    assert 0.9 < low < high <= 1.0


@pytest.mark.parametrize("values", [np.zeros(20), [1, -1] * 10])
def test_no_difference_has_zero_inside_and_no_small_p(values):
    found = judge(sample(values))
    low, high = found.interval(0.95)
    assert low <= 0.0 <= high
    assert found.p > 0.5


def test_p_and_interval_agree():
    rng = np.random.default_rng(5)
    for num, shift in itertools.product((7, 15, 30), (0.0, 0.3, 0.5, 0.8)):
        found = judge(sample(rng.normal(shift, 1.0, num)))
        for level in (0.8, 0.95, 0.99):
            low, high = found.interval(level)
            assert (found.p <= 1 - level + 1e-9) == (not low <= 0 <= high)


def test_holm_is_as_published():
    # Holm (1979), section 4, with m = 3: 0.01 * 3, max(0.02 * 2, ...), 0.04 * 1.
    found = holm([0.04, 0.01, 0.02])
    assert [p for p, _ in found] == pytest.approx([0.04, 0.03, 0.04])
    assert [divisor for _, divisor in found] == [1, 3, 2]
    assert holm([]) == []
