# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""From the logits of a request's rows to what the merge multiplies each with.

Two kernels over blocks of the vocabulary and requests: masses of the rows, and what gates look at
(entropies, divergences, margins). The last block of a request to arrive adds the blocks' parts up,
in their order. `tail.launch_tail` launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.gate_weights import at_least_0, gated, scores, settle
from mrss_kernels.tail_common import (
    BIAS_ROW,
    CONFIDENCE,
    FIRST_ROW,
    FIXED,
    GATE,
    GATE_ROW,
    LEARNED,
    NUM_ROWS,
    PARTS,
    RULE,
    SHARPNESS,
    TAU,
    anchor,
    exp,
    floored,
    is_banned,
    is_last,
    wait,
)
from mrss_kernels.tail_tensors import GATE_SIZE

SIZE: tl.constexpr = tl.constexpr(GATE_SIZE)
# Which of a block's parts says what of a row. The first is minus the entropy for `confidence`.
FROM_BASE: tl.constexpr = tl.constexpr(0)
ENTROPY: tl.constexpr = tl.constexpr(1)
FROM_MEAN: tl.constexpr = tl.constexpr(2)
SECOND: tl.constexpr = tl.constexpr(3)


@triton.jit
def row_stats_kernel(
    p_logits,
    p_ints,
    p_named,
    p_bias,
    p_banned,
    p_part_max,
    p_part_mass,
    p_arrived,
    p_row_max,
    p_row_mass,
    p_row_log_mass,
    p_row_weight,
    p_rule,
    G,
    V: tl.constexpr,
    NB: tl.constexpr,
    NBP: tl.constexpr,
    BLOCK: tl.constexpr,
    KB: tl.constexpr,
    KT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (NB, requests). Of requests of two rows or more: largest logit, log-mass and weight.

    Banned ids of these rows become -inf in the logits. Requests of one row have nothing to merge.
    """
    i_b = tl.program_id(0)
    i_g = tl.program_id(1)
    first = tl.load(p_ints + FIRST_ROW * G + i_g).to(tl.int64)
    num_rows = tl.load(p_ints + NUM_ROWS * G + i_g)
    bias_row = tl.load(p_ints + BIAS_ROW * G + i_g)
    o_v = i_b * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < V
    wait(PDL)
    if num_rows > 1:
        banned = is_banned(p_banned, p_bias, bias_row, o_v, m_v, V)
        for k in range(0, num_rows, KT):
            o_k = k + tl.arange(0, KT)
            m_k = o_k < num_rows
            p_z = p_logits + (first + o_k)[:, None] * V + o_v[None, :]
            m_z = m_k[:, None] & m_v[None, :]
            z = tl.load(p_z, mask=m_z, other=float("-inf"))
            z = tl.where(banned[None, :], float("-inf"), z)
            tl.store(p_z, z, mask=m_z & banned[None, :])
            top = tl.max(z, 1)
            mass = tl.sum(exp(z - anchor(top)[:, None]), 1)
            at = (first + o_k) * NB + i_b
            tl.store(p_part_max + at, top, mask=m_k)
            tl.store(p_part_mass + at, mass, mask=m_k)
        if is_last(p_arrived + i_g, NB):
            o_k = tl.arange(0, KB)
            m_k = o_k < num_rows
            o_n = tl.arange(0, NBP)
            at = (first + o_k)[:, None] * NB + o_n[None, :]
            m_p = m_k[:, None] & (o_n < NB)[None, :]
            tops = tl.load(p_part_max + at, mask=m_p, other=float("-inf"), cache_modifier=".cg")
            masses = tl.load(p_part_mass + at, mask=m_p, other=0.0, cache_modifier=".cg")
            top = tl.max(tops, 1)
            mass = tl.sum(masses * exp(tops - anchor(top)[:, None]), 1)
            tl.store(p_row_max + first + o_k, top, mask=m_k)
            tl.store(p_row_mass + first + o_k, mass, mask=m_k)
            tl.store(p_row_log_mass + first + o_k, top + tl.log(mass), mask=m_k)
            rule = tl.load(p_ints + RULE * G + i_g)
            named = tl.load(p_named + first + o_k, mask=m_k, other=0.0)
            rule, weights = settle(rule, named, o_k)
            tl.store(p_rule + i_g, rule)
            tl.store(p_row_weight + first + o_k, weights, mask=m_k)


@triton.jit
def _load_rows(p_logits, first, o_k, num_rows, o_v, m_v, V: tl.constexpr):
    p_z = p_logits + (first + o_k)[:, None] * V + o_v[None, :]
    return tl.load(p_z, mask=(o_k < num_rows)[:, None] & m_v[None, :], other=float("-inf"))


@triton.jit
def _load_masses(p_row_max, p_row_mass, p_row_log_mass, rows, m_k):
    """Return largest logits, masses and log-masses of rows [KT].

    The mass is exact where the log-mass, some tens, has lost a few bits.
    """
    log_mass = tl.load(p_row_log_mass + rows, mask=m_k, other=0.0)
    top = tl.load(p_row_max + rows, mask=m_k, other=0.0)
    return top, tl.load(p_row_mass + rows, mask=m_k, other=1.0), log_mass


@triton.jit
def _log_mean(
    p_logits, p_named, p_row_max, p_row_mass, first, num_rows, o_v, m_v, V: tl.constexpr,
    BLOCK: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """Return logarithms of the mean probabilities [BLOCK] of the rows with a weight, floored."""
    total = tl.zeros([BLOCK], tl.float32)
    num_heard = 0.0
    for k in range(0, num_rows, KL):
        o_k = k + tl.arange(0, KL)
        m_k = o_k < num_rows
        top = tl.load(p_row_max + first + o_k, mask=m_k, other=0.0)
        mass = tl.load(p_row_mass + first + o_k, mask=m_k, other=1.0)
        part = exp(_load_rows(p_logits, first, o_k, num_rows, o_v, m_v, V) - top[:, None])
        is_heard = tl.load(p_named + first + o_k, mask=m_k, other=0.0) != 0
        total += tl.sum(part * tl.where(is_heard, 1.0 / mass, 0.0)[:, None], 0)
        num_heard += tl.sum(is_heard.to(tl.float32), 0)
    return floored(tl.log(total / num_heard))


@triton.jit
def _second(z, top):
    """Return the second largest logit [KT] of rows of a block, whose largest are `top`."""
    num = tl.sum((z == top[:, None]).to(tl.int32), 1)
    below = tl.max(tl.where(z < top[:, None], z, float("-inf")), 1)
    return tl.where(num > 1, top, below)


@triton.jit
def _store_features(
    p_logits, p_named, p_row_max, p_row_mass, p_row_log_mass, p_part_max, p_parts, first, num_rows,
    i_b, o_v, m_v, V: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """Store what else a learned gate sees of a block, beside the divergence from the base."""
    mean = _log_mean(
        p_logits, p_named, p_row_max, p_row_mass, first, num_rows, o_v, m_v, V, BLOCK, KL
    )
    for k in range(0, num_rows, KL):
        o_k = k + tl.arange(0, KL)
        m_k = o_k < num_rows
        z = _load_rows(p_logits, first, o_k, num_rows, o_v, m_v, V)
        own_top = tl.load(p_part_max + (first + o_k) * NB + i_b, mask=m_k, other=0.0)
        p_own = p_parts + (first + o_k) * (PARTS * NB) + i_b
        tl.store(p_own + SECOND * NB, _second(z, own_top), mask=m_k)
        top, mass, log_mass = _load_masses(p_row_max, p_row_mass, p_row_log_mass, first + o_k, m_k)
        part = exp(z - top[:, None])
        log_prob = floored(z - log_mass[:, None])
        entropy = tl.sum(-part * log_prob, 1) / mass
        tl.store(p_own + ENTROPY * NB, entropy, mask=m_k)
        from_mean = tl.sum(part * (log_prob - mean[None, :]), 1) / mass
        tl.store(p_own + FROM_MEAN * NB, from_mean, mask=m_k)


@triton.jit
def _sum_parts(p_parts, o_k, o_n, mask, part, NB: tl.constexpr):
    p_at = p_parts + (o_k * PARTS + part)[:, None] * NB + o_n[None, :]
    # Past the L1, where a line may be older than what another multiprocessor has written since.
    return tl.sum(tl.load(p_at, mask=mask, other=0.0, cache_modifier=".cg"), 1)


@triton.jit
def _margin(p_part_max, p_parts, top, o_k, o_n, mask, NB: tl.constexpr):
    """Return how far the second largest logit of each row [KB] is below the largest, `top`."""
    p_at = p_part_max + o_k[:, None] * NB + o_n[None, :]
    tops = tl.load(p_at, mask=mask, other=float("-inf"))
    p_at = p_parts + (o_k * PARTS + SECOND)[:, None] * NB + o_n[None, :]
    within = tl.load(p_at, mask=mask, other=float("-inf"), cache_modifier=".cg")
    return top - tl.maximum(_second(tops, top), tl.max(within, 1))


@triton.jit
def gate_kernel(
    p_logits,
    p_ints,
    p_floats,
    p_named,
    p_gates,
    p_row_max,
    p_row_mass,
    p_row_log_mass,
    p_part_max,
    p_parts,
    p_arrived,
    p_row_weight,
    p_rule,
    G,
    V: tl.constexpr,
    NB: tl.constexpr,
    NBP: tl.constexpr,
    BLOCK: tl.constexpr,
    KB: tl.constexpr,
    KT: tl.constexpr,
    KL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (NB, requests). Of requests whose gate looks at the rows: the weights of this token."""
    i_b = tl.program_id(0)
    i_g = tl.program_id(1)
    first = tl.load(p_ints + FIRST_ROW * G + i_g).to(tl.int64)
    num_rows = tl.load(p_ints + NUM_ROWS * G + i_g)
    gate = tl.load(p_ints + GATE * G + i_g)
    o_v = i_b * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < V
    wait(PDL)
    if (num_rows > 1) & (gate != FIXED):
        base = tl.load(p_logits + first * V + o_v, mask=m_v, other=float("-inf"))
        base = floored(base - tl.load(p_row_log_mass + first))
        # Divergence from certainty is minus the entropy.
        base = tl.where(gate == CONFIDENCE, 0.0, base)
        for k in range(0, num_rows, KT):
            o_k = k + tl.arange(0, KT)
            m_k = o_k < num_rows
            top, mass, log_mass = _load_masses(
                p_row_max, p_row_mass, p_row_log_mass, first + o_k, m_k
            )
            z = _load_rows(p_logits, first, o_k, num_rows, o_v, m_v, V)
            log_prob = floored(z - log_mass[:, None])
            part = exp(z - top[:, None])
            gain = tl.sum(part * (log_prob - base[None, :]), 1) / mass
            p_own = p_parts + (first + o_k) * (PARTS * NB) + i_b
            tl.store(p_own + FROM_BASE * NB, gain, mask=m_k)
        if gate == LEARNED:
            _store_features(
                p_logits, p_named, p_row_max, p_row_mass, p_row_log_mass, p_part_max, p_parts,
                first, num_rows, i_b, o_v, m_v, V, NB, BLOCK, KL,
            )  # fmt: skip
        if is_last(p_arrived + i_g, NB):
            o_k = tl.arange(0, KB)
            m_k = o_k < num_rows
            o_n = tl.arange(0, NBP)
            m_p = m_k[:, None] & (o_n < NB)[None, :]
            p_parts += first * (PARTS * NB)
            rule = tl.load(p_ints + RULE * G + i_g)
            named = tl.load(p_named + first + o_k, mask=m_k, other=0.0)
            nats = _sum_parts(p_parts, o_k, o_n, m_p, FROM_BASE, NB)
            if gate == LEARNED:
                top = tl.load(p_row_max + first + o_k, mask=m_k, other=0.0)
                log_mass = tl.load(p_row_log_mass + first + o_k, mask=m_k, other=0.0)
                entropy = _sum_parts(p_parts, o_k, o_n, m_p, ENTROPY, NB)
                from_mean = at_least_0(_sum_parts(p_parts, o_k, o_n, m_p, FROM_MEAN, NB))
                margin = _margin(p_part_max + first * NB, p_parts, top, o_k, o_n, m_p, NB)
                p_gate = p_gates + tl.load(p_ints + GATE_ROW * G + i_g) * SIZE
                nats = scores(
                    p_gate, entropy, top - log_mass, margin, at_least_0(nats), from_mean, named
                )
            tau = tl.load(p_floats + TAU * G + i_g)
            sharpness = tl.load(p_floats + SHARPNESS * G + i_g)
            weights = gated(gate, rule, nats, named, tau, sharpness)
            rule, weights = settle(rule, weights, o_k)
            tl.store(p_rule + i_g, rule)
            tl.store(p_row_weight + first + o_k, weights, mask=m_k)
