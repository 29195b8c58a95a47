"""What the merged distribution can never do, on random rows: with bans, ties, one token, one row.

Oracle: numpy in fp64 on the rows; the merge itself runs in fp64 too where an equality is claimed.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import SHARES, Array, merge, some_weights
from torch import Tensor

ALL = settings(max_examples=60, deadline=None)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Return logits [1, K, V] and shares [1, K], fp64; at least one token is allowed."""
    num_rows, vocab = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 7, 50]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scale = draw(st.sampled_from([1e-4, 1.0, 5.0, 60.0]))
    logits = torch.randn(1, num_rows, vocab, generator=generator, dtype=torch.float64) * scale
    # Near-ties: rows that differ by less than fp32 tells.
    logits[:, 1:] = torch.lerp(logits[:, 1:], logits[:, :1], draw(st.sampled_from([0.0, 1 - 1e-8])))
    banned = torch.rand(vocab, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    banned[0] = False
    weights = torch.rand(1, num_rows, generator=generator, dtype=torch.float64)
    weights = weights ** draw(st.sampled_from([0.0, 1.0, 20.0]))
    return logits.masked_fill(banned, -torch.inf), weights / weights.sum()


def merged_log_probs(rule: str, logits: Tensor, weights: Tensor) -> Array:
    merged: Array = merge(rule, logits, weights)[0].log_softmax(-1).numpy()
    return merged


def rows_of(logits: Tensor, weights: Tensor) -> tuple[Array, Array, Array]:
    """Return which tokens are allowed [V], their log-probabilities [K, V'] and the weights [K]."""
    allowed = logits[0, 0].isfinite().numpy()
    return allowed, logits[0].log_softmax(-1).numpy()[:, allowed], weights[0].numpy()


def divergence(q: Array, log_p: Array) -> float:
    return float((q * (np.log(q) - log_p)).sum())


@ALL
@given(cases())
def test_linear_loses_at_most_a_rows_log_weight_and_never_more_than_the_mean(
    case: tuple[Tensor, Tensor],
) -> None:
    """`NLL <= min_k (NLL_k - log w_k)` and `NLL <= sum_k w_k NLL_k`, for every token."""
    allowed, lp, w = rows_of(*case)
    merged = merged_log_probs("linear", *case)[allowed]
    with np.errstate(divide="ignore"):
        assert (merged >= (lp + np.log(w)[:, None]).max(0) - 1e-9).all()
    assert (merged >= w @ lp - 1e-9).all()
    # No token is likelier than the row that likes it best finds it.
    assert (merged <= lp.max(0) + 1e-9).all()


@ALL
@given(cases())
def test_the_bound_of_linear_holds_in_fp32(case: tuple[Tensor, Tensor]) -> None:
    logits, weights = (tensor.float() for tensor in case)
    weights = weights / weights.sum()
    allowed, lp, w = rows_of(logits.double(), weights.double())
    merged = merge("linear", logits, weights)[0].double().log_softmax(-1).numpy()[allowed]
    with np.errstate(divide="ignore"):
        bound = (lp + np.log(w)[:, None]).max(0)
    assert (merged - bound >= -1e-6 * (10 + np.abs(logits.numpy()[0][:, allowed]).max())).all()


@ALL
@given(cases(), st.integers(0, 1000))
def test_geometric_is_the_weighted_mean_plus_its_agreement(
    case: tuple[Tensor, Tensor], seed: int
) -> None:
    """`NLL = sum_k w_k NLL_k + log Z`, `log Z <= 0`, and Heskes' decomposition for any truth q."""
    allowed, lp, w = rows_of(*case)
    merged = merged_log_probs("geometric", *case)[allowed]
    log_z = np.logaddexp.reduce(w @ lp)
    assert log_z <= 1e-9
    np.testing.assert_allclose(-merged, -(w @ lp) + log_z, atol=1e-9, rtol=1e-9)
    q = np.random.default_rng(seed).dirichlet(np.ones(lp.shape[1])) + 1e-12
    q /= q.sum()
    of_rows = sum(w[k] * divergence(q, lp[k]) for k in range(len(w)))
    assert divergence(q, merged) == pytest.approx(of_rows + log_z, abs=1e-9, rel=1e-9)


@ALL
@given(cases(), st.integers(0, 1000))
def test_a_mixture_is_no_further_from_the_truth_than_its_rows_on_average(
    case: tuple[Tensor, Tensor], seed: int
) -> None:
    allowed, lp, w = rows_of(*case)
    q = np.random.default_rng(seed).dirichlet(np.ones(lp.shape[1])) + 1e-12
    q /= q.sum()
    of_rows = sum(w[k] * divergence(q, lp[k]) for k in range(len(w)))
    for rule in ("linear", "geometric"):
        assert divergence(q, merged_log_probs(rule, *case)[allowed]) <= of_rows + 1e-9 * of_rows


@ALL
@given(cases(), st.lists(st.sampled_from([-3.0, -1, -0.2, 0.2, 0.5, 1, 2, 5]), min_size=2))
def test_power_means_grow_with_the_exponent(
    case: tuple[Tensor, Tensor], exponents: list[float]
) -> None:
    """Before they are normalised; their mass is at most 1 below an exponent of 1, at least 1 above.

    Canonical logits are shifted by the mean log-mass of the rows: taking it off gives the means.
    """
    allowed, _, w = rows_of(*case)
    mean_log_mass = float(w @ case[0][0].logsumexp(-1).numpy())
    tolerance = 1e-9 * (1 + float(case[0][0][:, torch.from_numpy(allowed)].abs().max()))
    before = None
    for exponent in sorted(set(exponents)):
        merged = merge(f"power:{exponent:g}", *case)[0].numpy()[allowed] - mean_log_mass
        mass = np.logaddexp.reduce(merged)
        assert mass <= tolerance if exponent <= 1 else mass >= -tolerance
        if before is not None:
            assert (merged >= before - tolerance).all()
        before = merged


@ALL
@given(cases(), st.integers(0, 5))
def test_leaving_a_row_out_of_linear_changes_at_most_its_weight(
    case: tuple[Tensor, Tensor], index: int
) -> None:
    """In total variation, the others' weights made to sum to 1 again."""
    logits, weights = case
    index %= weights.shape[1]
    kept = weights.clone()
    kept[0, index] = 0
    if kept.sum() == 0:
        return
    whole = np.exp(merged_log_probs("linear", logits, weights))
    without = np.exp(merged_log_probs("linear", logits, kept / kept.sum()))
    assert np.abs(whole - without).sum() / 2 <= float(weights[0, index]) + 1e-9


@pytest.mark.parametrize("rule", [*(rule for rule in SHARES if rule != "route"), "product"])
@ALL
@given(cases(), st.randoms())
def test_order_and_duplicates_do_not_matter(
    rule: str, case: tuple[Tensor, Tensor], random: object
) -> None:
    """A row given twice with half of the weight is that row once."""
    logits, weights = case
    merged = merged_log_probs(rule, logits, weights)
    order = list(range(weights.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert_close(merged_log_probs(rule, logits[:, order], weights[:, order]), merged)
    twice = torch.cat((logits, logits), 1), torch.cat((weights, weights), 1) / 2
    assert_close(merged_log_probs(rule, *twice), merged)


@ALL
@given(cases(), st.sampled_from([*SHARES, "product", "delta", "contrast"]))
def test_whatever_the_rows_the_result_is_a_distribution(
    case: tuple[Tensor, Tensor], rule: str
) -> None:
    logits, weights = (tensor.float() for tensor in case)
    if rule in ("delta", "contrast", "product"):
        weights = some_weights(rule, 1, weights.shape[1])
    merged = merge(rule, logits, weights, 0.1, base_named=weights.shape[1] == 1)
    allowed = logits[0, 0].isfinite()
    assert not merged.isnan().any()
    assert merged[0, ~allowed].isneginf().all()
    assert math.isclose(float(merged.double().softmax(-1).sum()), 1.0, rel_tol=1e-6)


def assert_close(ours: Array, expected: Array) -> None:
    with np.errstate(invalid="ignore"):
        same = (ours == expected) | (np.abs(ours - expected) <= 1e-9 * (1 + np.abs(expected)))
    assert same.all()
