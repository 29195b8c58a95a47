"""Merge rules against their formulas in fp64, and the identities that define them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider import mixture as names
from mrss_provider.engine.merge import LOG_PROB_FLOOR, MERGE_RULES, Rows

V = 50
Array = NDArray[np.float64]


def log_softmax(z: Array) -> Array:
    peak = z.max(-1, keepdims=True)
    return z - peak - np.log(np.exp(z - peak).sum(-1, keepdims=True))


def log_mass(z: Array) -> Array:
    peak = z.max(-1, keepdims=True)
    return (peak + np.log(np.exp(z - peak).sum(-1, keepdims=True)))[..., 0]


def oracle(rule: str, z: Array, w: Array, cut: float, first: int) -> Array:
    """Return log p [V] of one request in fp64: MRSS's formulas, written for reading."""
    lp = log_softmax(z)
    with np.errstate(divide="ignore", invalid="ignore"):
        if rule == "linear":
            merged = np.log((w[:, None] * np.exp(lp)).sum(0))
        elif rule == "geometric":
            merged = sum(w[k] * z[k] for k in range(len(w)) if w[k] > 0)
        else:
            floored = np.maximum(lp, LOG_PROB_FLOOR)
            merged = floored[0] + sum(w[k] * (floored[k] - floored[0]) for k in range(1, len(w)))
            best = lp[first:].max(0)
            threshold = best.max() + math.log(cut) if cut > 0 else -math.inf
            merged = np.where((best >= threshold) & (best > -np.inf), merged, -np.inf)
    return log_softmax(merged)


def random_rows(
    seed: int, num_groups: int = 3, num_rows: int = 3, *, bans: float = 0.2, scale: float = 3.0
) -> Tensor:
    """Return logits [G, K, V]; the same random tokens are banned in all rows of a group."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_groups, num_rows, V, generator=generator) * scale
    banned = torch.rand(num_groups, 1, V, generator=generator) < bans
    banned[:, :, 0] = False
    return logits.masked_fill(banned, -torch.inf)


def merge(
    rule: str, logits: Tensor, weights: Tensor, cut: float = 0.0, *, base_named: bool = False
) -> Tensor:
    cuts = torch.full((len(logits),), cut)
    rows = Rows(logits, weights, cuts, base_named=base_named)
    return MERGE_RULES[rule].merge(rows, weights)


def some_weights(rule: str, num_groups: int, num_rows: int, seed: int = 0) -> Tensor:
    weights = torch.rand(num_groups, num_rows, generator=torch.Generator().manual_seed(seed)) + 0.1
    if rule == "delta":
        weights[:, 0] = 0
        return weights
    return weights / weights.sum(-1, keepdim=True)


def assert_same_distribution(merged: Tensor, expected: Array, tolerance: float = 2e-5) -> None:
    ours = merged.double().log_softmax(-1).numpy()
    assert (np.isneginf(ours) == np.isneginf(expected)).all()
    finite = ~np.isneginf(expected)
    np.testing.assert_allclose(ours[finite], expected[finite], atol=tolerance, rtol=tolerance)


def test_every_rule_that_a_name_may_have_is_registered() -> None:
    assert tuple(MERGE_RULES) == names.MERGES
    assert all(rule.name == name for name, rule in MERGE_RULES.items())


@pytest.mark.parametrize("rule", names.MERGES)
@pytest.mark.parametrize("cut", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_rule_equals_its_formula(rule: str, cut: float, seed: int) -> None:
    logits = random_rows(seed)
    weights = some_weights(rule, 3, 3, seed)
    base_named = seed % 2 == 1
    merged = merge(rule, logits, weights, cut, base_named=base_named)
    for g in range(3):
        z, w = logits[g].double().numpy(), weights[g].double().numpy()
        expected = oracle(rule, z, w, cut, first=0 if base_named else 1)
        assert_same_distribution(merged[g], expected)


@pytest.mark.parametrize("rule", names.MERGES)
def test_merged_distribution_sums_to_one(rule: str) -> None:
    merged = merge(rule, random_rows(1), some_weights(rule, 3, 3), 0.1)
    torch.testing.assert_close(merged.softmax(-1).sum(-1), torch.ones(3))


@pytest.mark.parametrize("rule", names.MERGES)
def test_result_has_the_usual_scale_of_logits(rule: str) -> None:
    """Moving a row's logits up moves the result by the row's share; p stays as it is."""
    logits = random_rows(2, bans=0.0)
    weights = some_weights(rule, 3, 3)
    shares = weights.clone()
    if rule == "delta":
        shares[:, 0] = 1 - weights.sum(-1)
    before = merge(rule, logits, weights)
    after = merge(rule, logits + torch.tensor([1.0, 20.0, -7.0])[:, None], weights)
    shift = (shares * torch.tensor([1.0, 20.0, -7.0])).sum(-1, keepdim=True)
    torch.testing.assert_close(after, before + shift, atol=2e-4, rtol=1e-4)


def test_linear_is_log_p_plus_the_mean_log_mass() -> None:
    logits = random_rows(2, bans=0.0)
    weights = some_weights("linear", 3, 3)
    merged = merge("linear", logits, weights)
    mean = (weights * logits.logsumexp(-1)).sum(-1)
    torch.testing.assert_close(merged.logsumexp(-1), mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", ["linear", "geometric"])
def test_equal_rows_give_that_row(rule: str) -> None:
    row = random_rows(3, num_rows=1)
    merged = merge(rule, row.expand(3, 4, V).contiguous(), some_weights(rule, 3, 4))
    torch.testing.assert_close(merged, row[:, 0], atol=1e-5, rtol=1e-5)


def test_delta_of_strength_zero_is_the_base() -> None:
    logits = random_rows(4)
    merged = merge("delta", logits, torch.zeros(3, 3))
    torch.testing.assert_close(merged, logits[:, 0], atol=1e-5, rtol=1e-5)


def test_delta_of_one_strength_one_is_that_state() -> None:
    logits = random_rows(5)
    merged = merge("delta", logits, torch.tensor([[0.0, 0.0, 1.0]]).expand(3, 3))
    torch.testing.assert_close(merged, logits[:, 2], atol=1e-5, rtol=1e-5)


def test_delta_of_strengths_that_sum_to_one_is_geometric() -> None:
    logits = random_rows(6, bans=0.0)
    merged = merge("delta", logits, torch.tensor([[0.0, 0.3, 0.7]]).expand(3, 3))
    expected = merge("geometric", logits[:, 1:].contiguous(), torch.tensor([[0.3, 0.7]] * 3))
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", names.MERGES)
def test_order_of_states_does_not_matter(rule: str) -> None:
    logits = random_rows(7, num_rows=4)
    weights = some_weights(rule, 3, 4)
    order = [0, 3, 1, 2]
    merged = merge(rule, logits, weights, 0.1)
    permuted = merge(rule, logits[:, order].contiguous(), weights[:, order], 0.1)
    torch.testing.assert_close(permuted, merged, atol=1e-5, rtol=1e-5)


@given(st.integers(0, 10_000), st.integers(2, 6), st.sampled_from([1.0, 5.0, 60.0]))
@settings(max_examples=60, deadline=None)
def test_linear_never_does_worse_than_its_best_row_by_more_than_its_weight(
    seed: int, num_rows: int, scale: float
) -> None:
    """NLL_mix <= min_k (NLL_k - log w_k) for every token, also where probabilities underflow."""
    logits = random_rows(seed, 2, num_rows, scale=scale)
    weights = some_weights("linear", 2, num_rows, seed)
    merged = merge("linear", logits, weights).double().log_softmax(-1)
    bound = (logits.double().log_softmax(-1) + weights.double().log()[..., None]).amax(1)
    allowed = logits[:, 0] > -torch.inf
    assert (merged - bound)[allowed].min() > -2e-5 * scale


@pytest.mark.parametrize("rule", names.MERGES)
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


def test_a_row_without_weight_has_no_say() -> None:
    logits = random_rows(8, bans=0.0)
    logits[:, 2, :40] = -torch.inf
    for rule in ("linear", "geometric"):
        merged = merge(rule, logits, torch.tensor([[0.4, 0.6, 0.0]]).expand(3, 3))
        expected = merge(rule, logits[:, :2].contiguous(), torch.tensor([[0.4, 0.6]]).expand(3, 2))
        torch.testing.assert_close(merged, expected)


def test_cut_keeps_what_any_state_finds_plausible() -> None:
    logits = torch.full((1, 3, V), -20.0)
    logits[0, 1, 3], logits[0, 1, 4], logits[0, 1, 5] = 10.0, 8.0, 7.5
    logits[0, 2, 6] = 9.0
    logits[0, 0, 7] = 10.0
    weights = torch.tensor([[0.0, 1.0, 1.0]])
    merged = merge("delta", logits, weights, 0.1)
    # exp(-2) > 0.1 > exp(-2.5); token 6 is certain in its own row; 7 is the base's idea alone.
    assert merged[0].isfinite().nonzero().flatten().tolist() == [3, 4, 6]
    named = merge("delta", logits, torch.tensor([[0.2, 0.4, 0.4]]), 0.1, base_named=True)
    assert named[0].isfinite().nonzero().flatten().tolist() == [3, 4, 6, 7]


def test_a_nan_reaches_only_its_own_request() -> None:
    for rule in names.MERGES:
        logits = random_rows(9, bans=0.0)
        clean = merge(rule, logits, some_weights(rule, 3, 3), 0.1)
        logits[1, 1, 17] = torch.nan
        merged = merge(rule, logits, some_weights(rule, 3, 3), 0.1)
        assert not merged[1].amax().isfinite()
        assert merged[[0, 2]].equal(clean[[0, 2]])


def test_scale_turns_ratios_into_weights() -> None:
    assert MERGE_RULES["linear"].scale([1.0, 0.25], 0.0) == ((0.8, 0.2), 0.0)
    assert MERGE_RULES["geometric"].scale([1.0, 0.5], 0.5) == ((0.5, 0.25), 0.25)
    assert MERGE_RULES["delta"].scale([1.0, 0.5], 0.0) == ((1.0, 0.5), 0.0)
    # base:0.2+tone:0.8, canonically base:0.25+tone: a strength of 0.8.
    assert MERGE_RULES["delta"].scale([1.0], 0.25) == ((0.8,), 0.2)
