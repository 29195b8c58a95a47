"""Gates that look at the past: schedules, and posteriors over what the user wrote."""

import math
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from fake_model import fake_state, mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mrss_provider.engine.gates import Heard, gate_of, make_gate, named_weights
from mrss_provider.engine.gates.posterior import FLOOR, fixed_share
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture import parse_method

Array = NDArray[np.float64]
A, B, C = (fake_state(name) for name in "abc")


def heard(log_probs: object, **moment: int) -> Heard:
    return Heard(log_probs=np.asarray(log_probs, dtype=np.float32), **moment)


def prior(mixed: ResolvedMixture, said: Heard) -> tuple[float, ...]:
    return gate_of(mixed).prior(mixed, said)


def grouped(*groups: str, gate: str, weights: list[float]) -> ResolvedMixture:
    states = [None if group == "base" else fake_state(f"s{k}") for k, group in enumerate(groups)]
    mixed = mixture(*states, merge="delta", gate=gate, weights=weights)
    return replace(mixed, groups=tuple("" if group == "base" else group for group in groups))


def bayes(ratios: Array, log_probs: Array, share: float) -> Array:
    """Fixed share by its definition, in probabilities, with its floor."""
    w = ratios / ratios.sum()
    for row in log_probs:
        u = w * np.exp(row)
        u /= u.sum()
        w = np.maximum((1 - share) * u + share * (1 - u) / (len(u) - 1), FLOOR)
        w /= w.sum()
    return w


@pytest.mark.parametrize(
    ("position", "factor"), [(0, 0.0), (8, 0.0), (16, 0.25), (24, 0.5), (32, 0.75), (999, 0.75)]
)
def test_a_schedule_is_linear_between_its_points(position: int, factor: float) -> None:
    """numpy.interp is the code; the values here are by hand."""
    points = "b=0@8,0.5@24,0.75@32"
    mixed = mixture(None, A, B, weights=[0, 1, 0.5], merge="delta", gate=f"schedule:{points}")
    assert prior(mixed, Heard(position=position)) == (0.0, 1.0, 0.5 * factor)
    assert gate_of(mixed).moves_prior
    by_turn = replace(mixed, gate=parse_method(f"schedule:{points},turns", "gate", "gate"))
    assert prior(by_turn, Heard(position=999, turn=position)) == (0.0, 1.0, 0.5 * factor)
    assert not gate_of(by_turn).moves_prior


def test_a_schedule_moves_shares_against_each_other() -> None:
    mixed = mixture(A, B, weights=[1, 1], merge="linear", gate="schedule:a=0@0,3@10")
    assert named_weights(mixed, Heard(position=0)) == (0.0, 1.0)
    assert named_weights(mixed, Heard(position=10)) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("merge", "points", "message"),
    [
        ("linear", "c=1@0", "points for 'c', which is not a term; the terms are a, b"),
        ("linear", "base=1@0", "points for 'base'"),
        ("linear", "a=0@0+b=0@0,1@9", "under the merge rule 'linear' .* got none at 0"),
        ("product", "a=1@0,0@5+b=1@0,0@7", "'product' .* got none at 7"),
        ("delta", "a=0@0+b=0@0", None),
        ("linear", "a=0@0,1@9+b=1@0,0@9", None),
    ],
)
def test_a_schedule_is_checked_against_its_mixture(
    merge: str, points: str, message: str | None
) -> None:
    states = (None, A, B) if merge == "delta" else (A, B)
    weights = [0, 1, 1] if merge == "delta" else [1, 1]
    mixed = mixture(*states, weights=weights, merge=merge, gate=f"schedule:{points}")
    if message is None:
        gate_of(mixed).check(mixed)
        return
    with pytest.raises(InvalidRequestError, match=message) as caught:
        gate_of(mixed).check(mixed)
    assert caught.value.param == "mrss.gate"


@given(
    st.integers(0, 10_000), st.integers(2, 6), st.integers(0, 40), st.sampled_from([0.0, 0.02, 0.3])
)
@settings(max_examples=50, deadline=None)
def test_the_posterior_is_fixed_share(seed: int, num: int, length: int, share: float) -> None:
    random = np.random.default_rng(seed)
    log_probs = np.log(random.dirichlet(np.ones(50), (length, num))[..., 0].clip(1e-12))
    ratios = random.uniform(0.2, 1, num)
    mixed = mixture(*(fake_state(f"s{k}") for k in range(num)), weights=list(ratios),
                    gate=f"posterior:{share:g}")  # fmt: skip
    expected = bayes(ratios, log_probs.astype(np.float32).astype(np.float64), share)
    ours = prior(mixed, heard(log_probs.reshape(length, num)))
    np.testing.assert_allclose(ours, ratios.max() * expected, rtol=1e-9)


@given(st.integers(0, 10_000), st.integers(2, 4), st.sampled_from([0.01, 0.02, 0.1, 0.5]))
@settings(max_examples=40, deadline=None)
def test_the_loss_against_the_best_sequence_of_states_is_bounded(
    seed: int, num: int, share: float
) -> None:
    """`ln K + m ln((K - 1) / a) + (T - 1 - m) ln(1 / (1 - a))` for every path with m switches."""
    random = np.random.default_rng(seed)
    length = 6
    log_probs = np.log(random.dirichlet(np.full(4, 0.3), (length, num))[..., 0] + 1e-9)
    log_probs = log_probs.astype(np.float32).astype(np.float64)
    steps = fixed_share(np.full(num, 1 / num), log_probs.astype(np.float32), share)
    loss = -sum(math.log(w @ np.exp(row)) for w, row in zip(steps, log_probs, strict=False))
    for path in product(range(num), repeat=length):
        switches = sum(a != b for a, b in pairwise(path))
        of_path = -sum(log_probs[t, k] for t, k in enumerate(path))
        bound = math.log(num) + switches * math.log((num - 1) / share)
        bound += (length - 1 - switches) * math.log(1 / (1 - share))
        # The floor costs at most its mass, a token.
        assert loss <= of_path + bound + length * num * FLOOR


@given(st.integers(0, 10_000), st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_tokens_that_were_sampled_from_the_mixture_say_nothing(seed: int, num: int) -> None:
    """`E[w'_k] = w_k` over the mixture's own tokens: a martingale, without a share."""
    random = np.random.default_rng(seed)
    rows = random.dirichlet(np.ones(9), num)
    beliefs = random.dirichlet(np.ones(num)) * 0.9 + 0.1 / num
    mixed = beliefs @ rows
    after = [
        fixed_share(beliefs, np.log(rows[None, :, x]).astype(np.float32), 0.0)[-1] for x in range(9)
    ]
    np.testing.assert_allclose(mixed @ np.array(after), beliefs, atol=1e-4)


@pytest.mark.parametrize("gate", ["posterior", "posterior-novelty"])
def test_a_posterior_picks_the_state_that_would_have_written_it(gate: str) -> None:
    mixed = grouped("base", "facts", "facts", "voice", gate=gate, weights=[0, 1, 1, 0.5])
    said = heard([[-1.0, -0.5, -4.0, -9.0]] * 20)
    _, right, wrong, voice = prior(mixed, said)
    assert right == pytest.approx(0.98, abs=0.02)
    assert wrong < 0.03
    # Across groups nothing is compared.
    assert voice == 0.5 if gate == "posterior-novelty" else voice < 0.03


def test_groups_keep_their_own_scale_and_the_base_and_loners_their_ratio() -> None:
    mixed = grouped(
        "base", "facts", "facts", "", "", "voice", "voice",
        gate="posterior-novelty:0", weights=[0.25, 1, 0.5, 0.7, 0.6, 0.2, 0.1],
    )  # fmt: skip
    nothing = prior(mixed, Heard())
    assert nothing == pytest.approx((0.25, 2 / 3, 1 / 3, 0.7, 0.6, 0.2 * 2 / 3, 0.2 / 3))
    said = heard([[0.0, -1.0, -2.0, -50.0, 0.0, -3.0, -3.0]] * 3)
    posterior = prior(mixed, said)
    odds = 2 * math.exp(3)
    assert posterior[1] == pytest.approx(odds / (1 + odds), rel=1e-4)
    assert posterior[5:] == pytest.approx((0.2 * 2 / 3, 0.2 / 3), rel=1e-4)
    assert posterior[0] == 0.25
    assert posterior[3:5] == (0.7, 0.6)


def test_states_that_are_pushed_away_from_are_no_candidates() -> None:
    mixed = grouped("base", "x", "x", "x", gate="posterior", weights=[0, 1, 1, -0.5])
    against = prior(mixed, heard([[0.0, -1.0, -5.0, 0.0]] * 9))
    assert against[3] == -0.5
    assert against[1] > 0.9


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_a_token_that_no_row_scores_says_nothing(bad: float) -> None:
    mixed = mixture(A, B, weights=[1, 1], gate="posterior")
    token, nothing = [-1.0, -3.0], [bad, bad]
    assert prior(mixed, heard([token, nothing])) == prior(mixed, heard([token]))
    # A ban in one row is evidence against it, from which it comes back.
    banned = prior(mixed, heard([[-1.0, -math.inf]]))
    assert banned == pytest.approx((0.98, 0.02), abs=1e-5)
    assert prior(mixed, heard([[-1.0, -math.inf], *[[-9.0, -1.0]] * 5]))[1] > 0.9


def test_a_posterior_is_permutation_equivariant() -> None:
    said = np.random.default_rng(0).normal(-3, 1, (9, 3)).astype(np.float32)
    straight = prior(mixture(A, B, C, weights=[1, 0.5, 0.7], gate="posterior"), heard(said))
    order = [2, 0, 1]
    permuted = mixture(C, A, B, weights=[0.7, 1, 0.5], gate="posterior")
    assert prior(permuted, heard(said[:, order])) == pytest.approx([straight[k] for k in order])


def test_only_a_posterior_of_its_own_samples_reads_the_answer() -> None:
    own, asked = (
        make_gate(parse_method(text, "gate", "gate"))
        for text in ("posterior:0.1,true", "posterior")
    )
    assert (own.reads_prompt, own.reads_answer, own.moves_prior) == (True, True, True)
    assert (asked.reads_prompt, asked.reads_answer, asked.moves_prior) == (True, False, False)


def test_candidates_are_what_a_posterior_can_choose_among() -> None:
    groups = ("base", "facts", "facts", "voice", "voice", "")
    mixed = grouped(*groups, gate="posterior-novelty", weights=[0, 1, 1, 1, -1, 1])
    assert gate_of(mixed).candidates(mixed) == {"s1", "s2"}
    everyone = replace(mixed, gate=parse_method("posterior", "gate", "gate"))
    assert gate_of(everyone).candidates(everyone) == {"s1", "s2", "s3", "s5"}
    nobody = replace(mixed, gate=parse_method("novelty", "gate", "gate"))
    assert gate_of(nobody).candidates(nobody) == frozenset()
