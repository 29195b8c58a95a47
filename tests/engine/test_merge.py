"""Merge rules against their formulas in fp64, and the identities that define them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import (
    ANCHORED,
    RULES,
    SHARES,
    Array,
    V,
    merge,
    method_of,
    oracle,
    random_rows,
    some_weights,
)
from torch import Tensor

from mrss_provider import mixture as names
from mrss_provider.engine.merges import MERGE_RULES, make_merge


def assert_same_distribution(merged: Tensor, expected: Array, tolerance: float = 2e-5) -> None:
    ours = merged.double().log_softmax(-1).numpy()
    assert (np.isneginf(ours) == np.isneginf(expected)).all()
    finite = ~np.isneginf(expected)
    np.testing.assert_allclose(ours[finite], expected[finite], atol=tolerance, rtol=tolerance)


def test_every_rule_that_a_name_may_have_is_registered() -> None:
    assert tuple(MERGE_RULES) == tuple(names.MERGES)
    assert all(make_merge(names.Method(name)).name == name for name in MERGE_RULES)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "power:0.002"])
@pytest.mark.parametrize("cut", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("num_rows", [2, 3, 6])
def test_rule_equals_its_formula(rule: str, cut: float, num_rows: int) -> None:
    for seed in range(4):
        logits = random_rows(seed, num_rows=num_rows)
        weights = some_weights(rule, 3, num_rows, seed)
        base_named = seed % 2 == 1
        merged = merge(rule, logits, weights, cut, base_named=base_named)
        for g in range(3):
            z, w = logits[g].double().numpy(), weights[g].double().numpy()
            expected = oracle(rule, z, w, cut, first=0 if base_named else 1)
            assert_same_distribution(merged[g], expected)


@pytest.mark.parametrize("exponent", [3.1e-3, 2.9e-3, 1e-3, -1e-3, -2.9e-3])
def test_small_exponents_keep_their_precision(exponent: float) -> None:
    """In total variation, by which a sampled token may differ; a plain fp32 form is far off."""
    rule = f"power:{exponent:.4g}"
    logits = random_rows(1, scale=2.0)
    weights = some_weights(rule, 3, 3)
    merged = merge(rule, logits, weights).double().softmax(-1)
    for g in range(3):
        expected = np.exp(oracle(rule, logits[g].double().numpy(), weights[g].double().numpy()))
        assert np.abs(merged[g].numpy() - expected).sum() / 2 < 2e-5


@pytest.mark.parametrize(("rule", "limit"), [("power:1", "linear"), ("power:0", "geometric")])
def test_power_has_linear_and_geometric_in_it(rule: str, limit: str) -> None:
    logits = random_rows(2)
    weights = some_weights(rule, 3, 3)
    torch.testing.assert_close(
        merge(rule, logits, weights), merge(limit, logits, weights), atol=1e-5, rtol=1e-5
    )
    near = merge(f"power:{method_of(rule).number('exponent') + 1e-4:.4g}", logits, weights)
    distance = near.softmax(-1) - merge(limit, logits, weights).softmax(-1)
    assert distance.abs().sum(-1).max() < 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_merged_distribution_sums_to_one(rule: str) -> None:
    merged = merge(rule, random_rows(1), some_weights(rule, 3, 3), 0.1)
    torch.testing.assert_close(merged.softmax(-1).sum(-1), torch.ones(3))


@pytest.mark.parametrize("rule", RULES)
def test_result_has_the_usual_scale_of_logits(rule: str) -> None:
    """Moving a row's logits up moves the result by the row's share; p stays as it is."""
    logits = random_rows(2, bans=0.0)
    weights = some_weights(rule, 3, 3)
    shares = weights.clone()
    if rule in ANCHORED:
        shares[:, 0] = 1 - weights.sum(-1)
    if rule == "product":
        shares /= weights.sum(-1, keepdim=True)
    if rule == "route":
        shares = torch.nn.functional.one_hot(weights.argmax(-1), 3).float()
    before = merge(rule, logits, weights)
    after = merge(rule, logits + torch.tensor([1.0, 20.0, -7.0])[:, None], weights)
    shift = (shares * torch.tensor([1.0, 20.0, -7.0])).sum(-1, keepdim=True)
    torch.testing.assert_close(after, before + shift, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", ["linear", "power:0.5", "power:-1"])
def test_means_are_log_p_plus_the_mean_log_mass(rule: str) -> None:
    logits = random_rows(2, bans=0.0)
    weights = some_weights(rule, 3, 3)
    mean = (weights * logits.logsumexp(-1)).sum(-1)
    for g in range(3):
        lp, w = logits[g].double().log_softmax(-1), weights[g].double()
        a = 1.0 if rule == "linear" else method_of(rule).number("exponent")
        log_p = (w.log()[:, None] + a * lp).logsumexp(0) / a
        torch.testing.assert_close(
            merge(rule, logits, weights)[g], (log_p + mean[g]).float(), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("rule", SHARES)
def test_equal_rows_give_that_row(rule: str) -> None:
    row = random_rows(3, num_rows=1)
    merged = merge(rule, row.expand(3, 4, V).contiguous(), some_weights(rule, 3, 4))
    torch.testing.assert_close(merged, row[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", [*SHARES, "product"])
def test_a_row_with_all_the_weight_comes_back_bit_for_bit(rule: str) -> None:
    logits = random_rows(4)
    logits[:, 0, 3] = -torch.inf
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    merged = merge(rule, logits, weights)
    assert merged[0].equal(logits[0, 1])
    assert merged[2].equal(logits[2, 2])


@pytest.mark.parametrize("rule", ANCHORED)
def test_strength_zero_is_the_base_and_a_single_strength_one_is_that_state(rule: str) -> None:
    logits = random_rows(4)
    merged = merge(rule, logits, torch.zeros(3, 3))
    torch.testing.assert_close(merged, logits[:, 0], atol=1e-5, rtol=1e-5)
    merged = merge(rule, logits, torch.tensor([[0.0, 0.0, 1.0]]).expand(3, 3))
    torch.testing.assert_close(merged, logits[:, 2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ANCHORED)
def test_strengths_that_sum_to_one_are_geometric(rule: str) -> None:
    logits = random_rows(6, bans=0.0)
    merged = merge(rule, logits, torch.tensor([[0.0, 0.3, 0.7]]).expand(3, 3))
    expected = merge("geometric", logits[:, 1:].contiguous(), torch.tensor([[0.3, 0.7]] * 3))
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)


def test_a_product_of_exponents_that_sum_to_one_is_geometric() -> None:
    logits = random_rows(6)
    weights = torch.tensor([[0.25, 0.25, 0.5]]).expand(3, 3)
    assert merge("product", logits, weights).equal(merge("geometric", logits, weights))


@pytest.mark.parametrize("weight", [1e-39, 0.3, 1.0])
def test_a_product_is_no_flatter_than_its_states(weight: float) -> None:
    """The gate may leave one named weight alone, however small it is."""
    logits = 20 + torch.randn(1, 2, V)
    assert merge("product", logits, torch.tensor([[weight, 0.0]])).equal(logits[:, 0])


def test_a_product_of_two_equal_rows_is_the_square_of_that_row() -> None:
    row = random_rows(5, num_rows=1)
    merged = merge("product", row.expand(3, 2, V).contiguous(), torch.ones(3, 2))
    torch.testing.assert_close(merged.softmax(-1), (2 * row[:, 0]).softmax(-1))


def test_contrast_without_a_negative_strength_is_delta() -> None:
    logits = random_rows(7)
    weights = some_weights("delta", 3, 3)
    assert merge("contrast", logits, weights, 0.1).equal(merge("delta", logits, weights, 0.1))


def test_contrast_removes_what_the_state_adds() -> None:
    """A negative strength divides by what a positive one multiplies with."""
    logits = random_rows(8, bans=0.0, scale=1.0)
    lp = logits.double().log_softmax(-1)
    merged = merge("contrast", logits, torch.tensor([[1.0, -0.5, 0.0]] * 3), base_named=True)
    expected = (1.5 * lp[:, 0] - 0.5 * lp[:, 1]).log_softmax(-1)
    torch.testing.assert_close(merged.double().log_softmax(-1), expected, atol=1e-5, rtol=1e-5)


def test_a_row_that_is_pushed_away_from_makes_no_token_plausible() -> None:
    logits = torch.zeros(1, 3, V)
    logits[0, 2, 9] = 20.0
    weights = torch.tensor([[1.0, 1.0, -0.5]])
    # It is sure of a token; the others' are kept all the same.
    merged = merge("contrast", logits, weights, 0.1, base_named=True)
    assert merged.isfinite().all()
    assert merged[0].argmin() == 9
    logits[0, :2, 9] = -20.0
    assert merge("contrast", logits, weights, 0.1, base_named=True)[0, 9].isneginf()


def test_route_takes_the_first_of_equals() -> None:
    logits = random_rows(9)
    weights = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.1, 0.2, 0.7]])
    assert merge("route", logits, weights).equal(logits[range(3), [0, 1, 2]])


@pytest.mark.parametrize("rule", RULES)
def test_order_of_states_does_not_matter(rule: str) -> None:
    logits = random_rows(7, num_rows=4)
    weights = some_weights(rule, 3, 4)
    order = [0, 3, 1, 2]
    merged = merge(rule, logits, weights, 0.1)
    permuted = merge(rule, logits[:, order].contiguous(), weights[:, order], 0.1)
    torch.testing.assert_close(permuted, merged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@given(st.integers(0, 10_000), st.floats(0.0, 0.95))
@settings(max_examples=40, deadline=None)
def test_banned_tokens_never_become_nan(rule: str, seed: int, cut: float) -> None:
    """Rows may ban different tokens; what all ban stays banned, and something is always left."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, V, generator=generator) * 10
    banned = torch.rand(2, 3, V, generator=generator) < 0.5
    banned[:, :, 1] = False
    logits = logits.masked_fill(banned, -torch.inf)
    merged = merge(rule, logits, some_weights(rule, 2, 3, seed), cut)
    assert not merged.isnan().any()
    assert not (merged == torch.inf).any()
    assert merged[banned.all(1)].isneginf().all()
    assert merged.isfinite().any(-1).all()


@pytest.mark.parametrize("rule", [*SHARES, "product"])
def test_a_row_without_weight_has_no_say(rule: str) -> None:
    logits = random_rows(8, bans=0.0)
    logits[:, 2, :40] = -torch.inf
    merged = merge(rule, logits, torch.tensor([[0.4, 0.6, 0.0]]).expand(3, 3))
    expected = merge(rule, logits[:, :2].contiguous(), torch.tensor([[0.4, 0.6]]).expand(3, 2))
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("rule", ANCHORED)
def test_cut_keeps_what_any_state_finds_plausible(rule: str) -> None:
    logits = torch.full((1, 3, V), -20.0)
    logits[0, 1, 3], logits[0, 1, 4], logits[0, 1, 5] = 10.0, 8.0, 7.5
    logits[0, 2, 6] = 9.0
    logits[0, 0, 7] = 10.0
    weights = torch.tensor([[0.0, 1.0, 1.0]])
    merged = merge(rule, logits, weights, 0.1)
    # exp(-2) > 0.1 > exp(-2.5); token 6 is certain in its own row; 7 is the base's idea alone.
    assert merged[0].isfinite().nonzero().flatten().tolist() == [3, 4, 6]
    named = merge(rule, logits, torch.tensor([[0.2, 0.4, 0.4]]), 0.1, base_named=True)
    assert named[0].isfinite().nonzero().flatten().tolist() == [3, 4, 6, 7]


@pytest.mark.parametrize("rule", RULES)
def test_a_nan_reaches_only_its_own_request(rule: str) -> None:
    weights = some_weights(rule, 3, 3)
    # What no answer hears (a row that `route` does not take) may be anything.
    row = int(weights[1].argmax())
    logits = random_rows(9, bans=0.0)
    clean = merge(rule, logits, weights, 0.1)
    logits[1, row, 17] = torch.nan
    merged = merge(rule, logits, weights, 0.1)
    assert not merged[1].amax().isfinite()
    assert merged[[0, 2]].equal(clean[[0, 2]])


@pytest.mark.parametrize(
    ("rule", "ratios", "base_named", "weights"),
    [
        ("linear", (1.0, 0.25), False, (0.8, 0.2)),
        ("geometric", (0.5, 1.0, 0.5), True, (0.25, 0.5, 0.25)),
        ("linear", (0.0, 1.0, 1.0), False, (0.0, 0.5, 0.5)),
        ("product", (1.0, 0.5), False, (1.0, 0.5)),
        ("product", (0.25, 1.0), True, (0.2, 0.8)),
        ("delta", (0.0, 1.0, 0.5), False, (0.0, 1.0, 0.5)),
        # base:0.2+tone:0.8, canonically base:0.25+tone: a strength of 0.8.
        ("delta", (0.25, 1.0), True, (0.2, 0.8)),
        ("contrast", (1.0, -0.5), True, (1.0, -0.5)),
        ("contrast", (0.0, 1.0, -0.5), False, (0.0, 1.0, -0.5)),
    ],
)
def test_scale_turns_ratios_into_weights(
    rule: str, ratios: tuple[float, ...], base_named: bool, weights: tuple[float, ...]
) -> None:
    scaled = make_merge(method_of(rule)).scale(ratios, base_named=base_named)
    assert scaled == pytest.approx(weights)
