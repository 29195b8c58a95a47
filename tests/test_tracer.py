"""Traces in words: names, short numbers, and the running sums of an answer."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrss_provider.async_engine.traces import HalfLife, Tracer
from mrss_provider.engine.trace import RowsTrace

NAMES = ("base", "knowledge", "tone")


def rows_trace(who=1, disagreement=0.4, from_base=(0.0, 0.5, 0.25), names=NAMES):
    ones = (1.0,) * len(names)
    return RowsTrace(
        names=names,
        token_id=7,
        weights=ones,
        log_probs=(-1 / 3,) * len(names),
        merged_log_prob=-1e-7 / 3,
        responsibilities=ones,
        is_exact=True,
        additive=None,
        log_z=None,
        leave_one_out=(None,) * len(names),
        divergences=ones,
        from_base=from_base,
        entropies=ones,
        merged_entropy=1.0,
        disagreement=disagreement,
        would_say=tuple(range(len(names))),
        who=who,
    )


def tracer():
    return Tracer(NAMES, lambda token_id: b"<%d>" % token_id)


def test_numbers_have_five_digits_and_rows_their_names():
    trace = tracer().add(rows_trace())
    assert trace.who == "knowledge"
    assert trace.logprob == dict.fromkeys(NAMES, -0.33333)
    assert trace.merged_logprob == -3.3333e-08
    assert trace.loo == dict.fromkeys(NAMES)
    assert trace.would_say == {"base": b"<0>", "knowledge": b"<1>", "tone": b"<2>"}


def test_spoken_share_counts_who_where_they_differ_and_sums_to_one():
    words = tracer()
    for who, disagreement in ((1, 0.4), (1, 0.2), (2, 0.06), (2, 0.04), (0, 0.0)):
        words.add(rows_trace(who, disagreement))
    shares = words.summary().spoken_share
    assert shares == {"base": 0.0, "knowledge": 0.4, "tone": 0.2, "agreed": 0.4}


def test_token_with_fewer_rows_is_counted_all_the_same():
    words = tracer()
    trace = words.add(rows_trace(1, names=("base", "tone"), from_base=(0.0, 0.1)))
    assert trace.who == "tone"
    assert words.summary().spoken_share["tone"] == 1.0


@settings(deadline=None)
@given(half_life=st.floats(0.5, 500), start=st.floats(0.5, 8), count=st.integers(8, 40))
def test_half_life_of_an_exact_decay_is_found(half_life, start, count):
    fade = HalfLife()
    values = [start * 2 ** (-t / half_life) for t in range(count)]
    # Below the floor a divergence counts as noise.
    values = [value for value in values if value > 1e-4]
    for t, value in enumerate(values):
        fade.add(t, value)
    if len(values) >= 8:
        assert fade.tokens() == pytest.approx(half_life, rel=1e-3)
    else:
        assert fade.tokens() is None


@pytest.mark.parametrize("values", [[0.5] * 20, [0.01 * t for t in range(1, 20)], [1.0, 0.1]])
def test_no_half_life_where_nothing_fades_or_too_little_is_known(values):
    fade = HalfLife()
    for t, value in enumerate(values):
        fade.add(t, value)
    assert fade.tokens() is None


def test_without_a_base_no_half_life_is_told():
    words = tracer()
    for _ in range(20):
        words.add(rows_trace(from_base=None))
    assert words.summary().influence_half_life == dict.fromkeys(NAMES)


def test_half_lives_are_told_by_state():
    words = tracer()
    for t in range(20):
        words.add(rows_trace(from_base=(0.0, math.exp(-t / 10), 0.2)))
    told = words.summary().influence_half_life
    assert told == {"base": None, "knowledge": pytest.approx(6.9315, rel=1e-3), "tone": None}
