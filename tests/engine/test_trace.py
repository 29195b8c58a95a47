"""A token's trace against its formulas in fp64, and the identities that define its numbers."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider.engine.merges import LOG_PROB_FLOOR, MergeRule, Rows, make_merge
from mrss_provider.engine.trace import AGREED_BELOW, MAX_LOG_PROB, RowsTrace, trace_token
from mrss_provider.mixture import MERGES, make_method

V = 60
# An unnamed base, and states whose weights a gate would have changed.
RATIOS = (0.0, 1.0, -0.4)
RULES = tuple(MERGES)
ANCHORED = ("delta", "contrast")
LOG_LINEAR = ("geometric", "product", *ANCHORED)
Array = NDArray[np.float64]


def rule_of(name: str) -> MergeRule:
    return make_merge(make_method("merge", name, {}))


def log_softmax(z: Array) -> Array:
    peak = z.max(-1, keepdims=True)
    return z - peak - np.log(np.exp(z - peak).sum(-1, keepdims=True))


def logits_of(seed: int, num_rows: int = 3, *, scale: float = 3.0, bans: float = 0.2) -> Tensor:
    """Return logits [1, K, V]; the same tokens are banned in all rows, never token 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, num_rows, V, generator=generator) * scale
    banned = torch.rand(V, generator=generator) < bans
    banned[0] = False
    return logits.masked_fill(banned, -torch.inf)


def weights_of(name: str, seed: int, num_rows: int = 3) -> Tensor:
    weights = torch.rand(1, num_rows, generator=torch.Generator().manual_seed(seed)) + 0.1
    rule = rule_of(name)
    if rule.anchored:
        weights[:, 0] = 0
    if name == "contrast":
        weights[:, -1] *= -0.5
    return weights / weights.sum() if rule.sums_to_one else weights


def trace_of(
    name: str,
    logits: Tensor,
    weights: Tensor,
    token: int = 0,
    *,
    cut: float = 0.1,
    has_base: bool = True,
    ratios: Sequence[float] = (),
) -> RowsTrace:
    rows = Rows(logits, weights, torch.tensor([cut]))
    rule = rule_of(name)
    merged = rule.merge(rows, weights)[0].log_softmax(-1)
    names = tuple(f"row{k}" for k in range(logits.shape[1]))
    return trace_token(
        rows,
        weights,
        rule,
        merged,
        token,
        names=names,
        ratios=ratios or [1.0] * len(names),
        has_base=has_base,
    )


def oracle_merged(name: str, z: Array, w: Array, cut: float) -> Array:
    """Return log p [V] in fp64 by MRSS's formulas."""
    lp = log_softmax(z)
    floored = np.maximum(lp, LOG_PROB_FLOOR)
    with np.errstate(divide="ignore", invalid="ignore"):
        if name == "linear":
            merged = np.log((w[:, None] * np.exp(lp)).sum(0))
        elif name == "power":
            merged = 2 * np.log((w[:, None] * np.exp(lp / 2)).sum(0))
        elif name == "route":
            merged = lp[w.argmax()]
        elif name in ANCHORED:
            merged = floored[0] + (w[1:, None] * (floored[1:] - floored[0])).sum(0)
            best = lp[1:][w[1:] >= 0].max(0)
            merged = np.where(best >= best.max() + math.log(cut), merged, -np.inf)
        else:
            w = exponents(w)
            merged = np.where(w[:, None] != 0, w[:, None] * lp, 0.0).sum(0)
    return log_softmax(np.where(np.isneginf(lp[0]), -np.inf, merged))


def exponents(w: Array) -> Array:
    """Return the weights of a product; those that sum to less than 1 are scaled up to it."""
    return w / min(1.0, w.sum())


def oracle_shares(name: str, w: Array) -> Array:
    if name == "route":
        return np.eye(len(w))[w.argmax()]
    shares = np.maximum(w, 0)
    if name in ANCHORED:
        shares[0] = max(0.0, 1 - w[1:].sum())
    return shares / shares.sum()


def entropy(p: Array) -> float:
    return -float((p[p > 0] * np.log(p[p > 0])).sum())


def divergence(p: Array, q: Array) -> float:
    kept = (p > 0) & (q > 0)
    p = np.where(kept, p, 0) / p[kept].sum()
    return float((p[kept] * np.log(p[kept] / q[kept])).sum())


def assert_near(ours: float | None, expected: float) -> None:
    assert ours is not None
    assert ours == pytest.approx(expected, abs=2e-4, rel=2e-4)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_every_number_is_the_one_of_the_formulas_in_fp64(name: str, seed: int) -> None:
    logits, weights = logits_of(seed), weights_of(name, seed)
    z, w = logits[0].double().numpy(), weights[0].double().numpy()
    merged = oracle_merged(name, z, w, 0.1)
    token = int(merged.argmax())
    trace = trace_of(name, logits, weights, token, ratios=RATIOS)
    lp, shares = log_softmax(z), oracle_shares(name, w)
    p = np.exp(lp)
    said = (shares * p[:, token]).sum()

    assert trace.token_id == token
    np.testing.assert_allclose(trace.weights, w, atol=1e-6)
    assert_near(trace.merged_log_prob, merged[token])
    assert_near(trace.merged_entropy, entropy(np.exp(merged)))
    named = np.abs(RATIOS) / np.abs(RATIOS).sum()
    mixed = (named[:, None] * p).sum(0)
    assert_near(trace.disagreement, sum(named[k] * divergence(p[k], mixed) for k in range(3)))
    assert trace.from_base is not None
    for k in range(3):
        assert_near(trace.log_probs[k], lp[k, token])
        assert_near(trace.responsibilities[k], shares[k] * p[k, token] / said)
        assert_near(trace.entropies[k], entropy(p[k]))
        assert_near(trace.divergences[k], divergence(p[k], np.exp(merged)))
        assert_near(trace.from_base[k], divergence(p[k], p[0]))
        assert trace.would_say[k] == z[k].argmax()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_leave_one_out_is_what_the_merge_loses_without_the_row(name: str, seed: int) -> None:
    logits, weights = logits_of(seed), weights_of(name, seed)
    z, w = logits[0].double().numpy(), weights[0].double().numpy()
    merged = oracle_merged(name, z, w, 0.1)
    token = int(merged.argmax())
    trace = trace_of(name, logits, weights, token)
    for k in range(3):
        if name in ANCHORED and k == 0:
            assert trace.leave_one_out[0] is None
            continue
        if name in ANCHORED:
            replaced = z[[0 if j == k else j for j in range(3)]]
            without = oracle_merged(name, replaced, w, 0.1)
        else:
            left = np.where(np.arange(3) == k, 0.0, w)
            left /= left.sum() if rule_of(name).sums_to_one else 1.0
            without = oracle_merged(name, z, left, 0.1)
        expected = min(MAX_LOG_PROB, merged[token] - without[token])
        assert_near(trace.leave_one_out[k], expected)


@pytest.mark.parametrize("name", LOG_LINEAR)
@pytest.mark.parametrize("seed", range(4))
def test_additive_terms_sum_to_the_merged_log_probability_and_log_z(name: str, seed: int) -> None:
    logits, weights = logits_of(seed), weights_of(name, seed)
    z, w = logits[0].double().numpy(), weights[0].double().numpy()
    lp = log_softmax(z)
    token = int(oracle_merged(name, z, w, 0.1).argmax())
    trace = trace_of(name, logits, weights, token)
    assert trace.additive is not None
    if name in ANCHORED:
        expected = [lp[0, token], *(w[1:] * (lp[1:, token] - lp[0, token]))]
        scores = np.maximum(lp, LOG_PROB_FLOOR)
        scores = scores[0] + (w[1:, None] * (scores[1:] - scores[0])).sum(0)
    else:
        w = exponents(w)
        expected = list(w * lp[:, token])
        scores = np.where(np.isneginf(lp[0]), -np.inf, (w[:, None] * lp).sum(0))
    possible = ~np.isneginf(oracle_merged(name, z, w, 0.1))
    for ours, theirs in zip(trace.additive, expected, strict=True):
        assert_near(ours, theirs)
    assert_near(trace.log_z, math.log(np.exp(scores[possible]).sum()))
    assert trace.log_z is not None
    assert_near(sum(trace.additive) - trace.log_z, trace.merged_log_prob)


@pytest.mark.parametrize("name", ["linear", "power", "route"])
def test_rules_that_add_no_log_probabilities_have_no_terms(name: str) -> None:
    trace = trace_of(name, logits_of(0), weights_of(name, 0))
    assert trace.additive is None
    assert trace.log_z is None


@pytest.mark.parametrize("name", RULES)
def test_responsibility_is_called_exact_only_where_it_is(name: str) -> None:
    logits, weights = logits_of(3), weights_of(name, 3)
    trace = trace_of(name, logits, weights, 0, cut=0.0)
    shares = oracle_shares(name, weights[0].double().numpy())
    said = float((shares * np.exp(trace.log_probs)).sum())
    is_linear = math.log(said) == pytest.approx(trace.merged_log_prob, abs=1e-5)
    assert trace.is_exact == is_linear == (name in ("linear", "route"))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(RULES),
    seed=st.integers(0, 10_000),
    num_rows=st.integers(3, 6),
    scale=st.sampled_from([0.01, 1.0, 5.0, 60.0]),
)
def test_identities_hold_for_all_rows_weights_and_scales(
    name: str, seed: int, num_rows: int, scale: float
) -> None:
    logits = logits_of(seed, num_rows, scale=scale)
    trace = trace_of(name, logits, weights_of(name, seed, num_rows))
    assert sum(trace.responsibilities) == pytest.approx(1.0, abs=1e-5)
    assert all(part >= 0 for part in trace.responsibilities)
    assert 0 <= trace.disagreement <= math.log(num_rows) + 1e-4
    assert all(value is None or value >= 0 for value in trace.divergences)
    assert 0 <= trace.who < num_rows
    numbers = [*trace.log_probs, *trace.entropies, *trace.leave_one_out, trace.merged_log_prob]
    numbers += [*(trace.additive or ()), *(trace.from_base or ())]
    assert all(math.isfinite(value) for value in numbers if value is not None)
    assert all(abs(value) <= MAX_LOG_PROB for value in numbers if value is not None)


@pytest.mark.parametrize("name", RULES)
def test_permuting_states_permutes_their_numbers(name: str) -> None:
    logits, weights = logits_of(5, 4), weights_of(name, 5, 4)
    order = [0, 3, 1, 2]
    ours = trace_of(name, logits, weights)
    permuted = trace_of(name, logits[:, order], weights[:, order])
    for field in ("weights", "log_probs", "responsibilities", "entropies", "divergences"):
        expected = [getattr(ours, field)[k] for k in order]
        assert getattr(permuted, field) == pytest.approx(expected, abs=1e-4)
    assert order[permuted.who] == ours.who


@pytest.mark.parametrize("name", RULES)
def test_rows_that_agree_are_called_agreed_and_say_the_same(name: str) -> None:
    logits = logits_of(1, 1).expand(1, 3, V).contiguous()
    trace = trace_of(name, logits, weights_of(name, 1))
    assert trace.agreed
    assert trace.disagreement == pytest.approx(0.0, abs=1e-5)
    assert len(set(trace.would_say)) == 1


@pytest.mark.parametrize("name", RULES)
def test_state_that_alone_expects_the_token_is_who_spoke(name: str) -> None:
    logits = torch.zeros(1, 3, V)
    logits[0, 1, 7] = 9.0
    weights = weights_of(name, 2) if name != "route" else torch.tensor([[0.1, 0.6, 0.3]])
    trace = trace_of(name, logits, weights, 7)
    assert trace.who == 1
    assert not trace.agreed


def test_gate_that_hears_one_row_does_not_make_the_rows_agree() -> None:
    logits = torch.zeros(1, 3, V)
    logits[0, 1, 7] = 9.0
    heard = trace_of("delta", logits, torch.tensor([[0.0, 1.0, 1e-6]]), 7, ratios=(0.0, 1.0, 1.0))
    assert heard.disagreement == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("name", ANCHORED)
def test_token_that_every_state_speaks_against_is_the_bases(name: str) -> None:
    logits = torch.zeros(1, 3, V)
    logits[0, 1:, 5] = -1.0
    trace = trace_of(name, logits, torch.tensor([[0.0, 0.5, 0.4]]), 5)
    assert trace.who == 0


@pytest.mark.parametrize("name", RULES)
def test_a_single_row_with_weight_cannot_be_left_out_but_where_the_base_remains(name: str) -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0]])
    trace = trace_of(name, logits_of(4), weights, 0, cut=0.0)
    assert (trace.leave_one_out[1] is not None) == (name in ANCHORED)
    assert trace.leave_one_out[2] == pytest.approx(0.0, abs=1e-5)


def test_row_alone_is_who_speaks_and_agrees() -> None:
    trace = trace_of("linear", logits_of(6, 1), torch.ones(1, 1), has_base=False)
    assert trace.who == 0
    assert trace.agreed
    assert trace.responsibilities == (1.0,)
    assert trace.leave_one_out == (None,)
    assert trace.from_base is None
    assert trace.divergences[0] == pytest.approx(0.0, abs=1e-6)


def test_given_token_that_the_cut_removed_has_finite_numbers_and_no_log_z() -> None:
    logits = torch.zeros(1, 3, V)
    logits[0, :, 3] = -12.0
    trace = trace_of("delta", logits, torch.tensor([[0.0, 1.0, 0.5]]), 3, cut=0.5)
    assert trace.merged_log_prob == -MAX_LOG_PROB
    assert trace.log_z is None
    assert trace.leave_one_out == (None, None, None)
    assert trace.additive is not None


def test_agreed_means_at_most_a_twentieth_of_a_nat() -> None:
    assert AGREED_BELOW == 0.05
