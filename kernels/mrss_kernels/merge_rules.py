# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Merge rules on a block of the vocabulary: a request's rows and their weights to one row.

A rule goes through the rows a few at a time and has two running values a token. No kernel here:
`merge_rows.merge_rows_kernel` calls `merge`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.tail_common import (
    CONTRAST,
    DELTA,
    LINEAR,
    LOWEST,
    POWER,
    PRODUCT,
    exp,
    floored,
    is_finite,
)

# The engine's constant; the checks of the kernels compare. Below it 1 / exponent magnifies the
# rounding of fp32 more than a form of second order leaves out.
SMALL_EXPONENT: tl.constexpr = tl.constexpr(3e-3)


@triton.jit
def _add_powers(total, best, z, log_mass, weight, exponent):
    """Add KT rows to `sum_k w_k p_k^exponent`: `total * e^best`, or `total` if that is infinite."""
    terms = exponent * (z - log_mass[:, None]) + tl.log(weight)[:, None]
    terms = tl.where((weight != 0)[:, None], terms, float("-inf"))
    larger = tl.maximum(best, tl.max(terms, 0))
    pivot = tl.where(is_finite(larger), larger, 0.0)
    total = total * exp(best - pivot) + tl.sum(exp(terms - pivot[None, :]), 0)
    return total, larger


@triton.jit
def _add_rows(rule, exponent, z, top, mass, log_mass, weight, m_k, heard, total, best):
    """Add KT rows to a rule's two running values [BLOCK]. A new rule: a branch here and below.

    Args:
        rule: index in `RULES`.
        exponent: of `power`.
        z: logits [KT, BLOCK], -inf in padding rows.
        top: largest logits [KT].
        mass: sum of exp(z - top) [KT], 1 in padding rows.
        log_mass: log-sum-exp of the logits [KT], 0 in padding rows.
        weight: what the gate made of the rows' weights [KT], 0 in padding rows.
        m_k: which rows are there [KT].
        heard: rows that the cut may look at [KT].
        total: running sum, from 0.
        best: running maximum, from -inf.
    """
    if rule == LINEAR:
        total += tl.sum(exp(z - top[:, None]) * (weight / mass)[:, None], 0)
        terms = z + (tl.log(weight) - log_mass)[:, None]
        best = tl.maximum(best, tl.max(tl.where(m_k[:, None], terms, float("-inf")), 0))
    elif (rule == DELTA) | (rule == CONTRAST):
        log_prob = z - log_mass[:, None]
        total += tl.sum(tl.where(m_k[:, None], floored(log_prob), 0.0) * weight[:, None], 0)
        best = tl.maximum(best, tl.max(tl.where(heard[:, None], log_prob, float("-inf")), 0))
    elif (rule == POWER) & (tl.abs(exponent) >= SMALL_EXPONENT):
        total, best = _add_powers(total, best, z, log_mass, weight, exponent)
    else:
        # 0 * -inf is no number, and a row without weight has no veto.
        total += tl.sum(tl.where((weight != 0)[:, None], z, 0.0) * weight[:, None], 0)
    return total, best


@triton.jit
def _finish_rule(rule, exponent, total, best, sum_weights, mean_log_mass, likeliest, cut):
    """Return the merged logits [BLOCK] from a rule's running values.

    Args:
        rule: index in `RULES`.
        exponent: of `power`.
        total: as `_add_rows` left it.
        best: as `_add_rows` left it.
        sum_weights: of the rows' weights.
        mean_log_mass: the rows' log-masses times their weights, added up: the usual scale of the
            logits where weights sum to 1.
        likeliest: the largest log-probability of any row that the cut looks at.
        cut: in [0, 1).
    """
    if rule == LINEAR:
        # Where every probability underflowed, the largest term stands for the sum. A NaN stays.
        summed = tl.log(total)
        x = tl.where(summed < best, best, summed) + mean_log_mass
    elif (rule == DELTA) | (rule == CONTRAST):
        # At `cut` 0 the threshold is the lowest float: only what all rows ban is below it.
        least = tl.maximum(likeliest + tl.log(cut), LOWEST)
        x = tl.where(best >= least, total + mean_log_mass, float("-inf"))
    elif (rule == POWER) & (tl.abs(exponent) >= SMALL_EXPONENT):
        pivot = tl.where(is_finite(best), best, 0.0)
        x = (tl.log(total) + pivot) / exponent + mean_log_mass
    elif rule == PRODUCT:
        # Not the inverse of the sum, which is infinite for the smallest that there are.
        x = total + tl.where(sum_weights > 0, mean_log_mass / sum_weights - mean_log_mass, 0.0)
    else:
        # Geometric; `route`, whose weights are 0 but for a 1; small powers, but for `_spread`.
        x = total
    return x


@triton.jit
def _spread(
    p_logits, p_row_log_mass, p_row_weight, first, num_rows, o_v, m_v, V: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the variance of the rows' floored log-probabilities [BLOCK]."""
    mean = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for k in range(num_rows):
        z = tl.load(p_logits + (first + k) * V + o_v, mask=m_v, other=float("-inf"))
        log_prob = floored(z - tl.load(p_row_log_mass + first + k))
        weight = tl.load(p_row_weight + first + k)
        mean += log_prob * weight
        square += log_prob * log_prob * weight
    return square - mean * mean


@triton.jit
def merge(
    p_logits, p_named, p_row_max, p_row_mass, p_row_log_mass, p_row_weight, first, num_rows, rule,
    cut, exponent, base_named, o_v, m_v, V: tl.constexpr, BLOCK: tl.constexpr, KT: tl.constexpr,
):  # fmt: skip
    """Return the merged logits [BLOCK] of the `num_rows` rows from `first` on."""
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    sum_weights = 0.0
    mean_log_mass = 0.0
    likeliest = float("-inf")
    for k in range(0, num_rows, KT):
        o_k = k + tl.arange(0, KT)
        m_k = o_k < num_rows
        p_z = p_logits + (first + o_k)[:, None] * V + o_v[None, :]
        z = tl.load(p_z, mask=m_k[:, None] & m_v[None, :], other=float("-inf"))
        top = tl.load(p_row_max + first + o_k, mask=m_k, other=0.0)
        mass = tl.load(p_row_mass + first + o_k, mask=m_k, other=1.0)
        log_mass = tl.load(p_row_log_mass + first + o_k, mask=m_k, other=0.0)
        weight = tl.load(p_row_weight + first + o_k, mask=m_k, other=0.0)
        heard = m_k & (o_k + base_named > 0)
        if rule == CONTRAST:
            # A row that is argued against vouches for nothing.
            heard = heard & (tl.load(p_named + first + o_k, mask=m_k, other=0.0) >= 0)
        total, best = _add_rows(
            rule, exponent, z, top, mass, log_mass, weight, m_k, heard, total, best
        )
        sum_weights += tl.sum(weight, 0)
        mean_log_mass += tl.sum(weight * log_mass, 0)
        peak = tl.where(heard, top - log_mass, float("-inf"))
        likeliest = tl.maximum(likeliest, tl.max(peak, 0))
    x = _finish_rule(rule, exponent, total, best, sum_weights, mean_log_mass, likeliest, cut)
    if (rule == POWER) & (tl.abs(exponent) < SMALL_EXPONENT):
        spread = _spread(
            p_logits, p_row_log_mass, p_row_weight, first, num_rows, o_v, m_v, V, BLOCK
        )
        x += 0.5 * exponent * spread
    return x
