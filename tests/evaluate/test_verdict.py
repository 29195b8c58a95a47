"""The verdict is what its conditions say, one by one."""

from dataclasses import replace

import pytest

from mrss_provider.evaluate.verdict import (
    Measured,
    conditions,
    negatives,
    preconditions,
    works,
)

GOOD = Measured(
    knowledge_alone=0.95,
    tone_alone=1.0,
    base_knows=0.04,
    chance=0.03,
    know=0.93,
    tone=0.97,
    both=0.91,
    both_t1=0.88,
    gain_low=0.3,
    baselines={"base": 0.0, "average": 0.4, "union": 0.2},
    prompt_only=0.85,
    both_greedy=0.95,
    fact_nats=0.1,
    well_formed=0.99,
    base_well_formed=1.0,
    perplexity=1.02,
    late_both=0.7,
    faded_both={"toned": 0.6, "plain": 0.5},
)


def test_what_meets_every_condition_works():
    assert works(GOOD) is True
    assert negatives(GOOD) == []


@pytest.mark.parametrize(
    "worse",
    [
        {"knowledge_alone": 0.8},
        {"tone_alone": 0.9},
        {"base_knows": 0.1},
        {"fact_nats": 0.4},
        {"baselines": {"base": 0.0, "average": 0.75}},
        {"gain_low": -0.01},
        {"both": 0.7},
        {"know": 0.8},
        {"tone": 0.85},
        {"well_formed": 0.95},
        {"perplexity": 1.1},
        {"late_both": 0.5},
    ],
    ids=lambda worse: next(iter(worse)),
)
def test_one_condition_that_fails_is_enough(worse):
    found = replace(GOOD, **worse)
    failed = [c for c in (*preconditions(found), *conditions(found)) if c.holds is False]
    assert failed
    assert works(found) is False


def test_a_share_that_is_just_enough_is_enough():
    # 0.95 - 0.75 and 0.88 - 0.9 are less than 0.2 and -0.02 to a computer.
    found = replace(GOOD, both=0.95, baselines={"average": 0.75, "union": 0.75})
    assert works(found) is True
    assert negatives(replace(GOOD, both=0.9, baselines={"union": 0.88}))


@pytest.mark.parametrize("part", ["well_formed", "perplexity", "late_both"])
def test_what_was_not_measured_is_neither(part):
    assert works(replace(GOOD, **{part: None})) is None


@pytest.mark.parametrize(
    ("worse", "code"),
    [
        ({"baselines": {"average": 0.90}}, "N1"),
        ({"baselines": {"sequential-kt": 0.90}}, "N2"),
        ({"prompt_only": 0.91}, "N3"),
        ({"faded_both": {"toned": 0.6, "plain": 0.2}}, "N4"),
        ({"knowledge_alone": 0.4}, "N5"),
        ({"both": 0.3, "both_greedy": 0.9}, "N6"),
    ],
)
def test_negative_findings_have_names(worse, code):
    assert any(text.startswith(f"{code}:") for text in negatives(replace(GOOD, **worse)))
