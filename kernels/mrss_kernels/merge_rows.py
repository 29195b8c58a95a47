# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""The merge of a request's rows, its penalties and bias, and what a draw needs to know of it.

One kernel over blocks of the vocabulary and requests. The last block of a request to arrive adds
the blocks' parts up, in their order. `tail.launch_tail` launches it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.merge_rules import merge
from mrss_kernels.tail_common import (
    BASE_NAMED,
    BIAS_ROW,
    BINS,
    COUNT_ROW,
    CUT,
    DECAY,
    EXPONENT,
    FIRST_ROW,
    FREQUENCY,
    KEEP_MERGED,
    LEVEL_ONE,
    LEVELS,
    LOG2E,
    MARGIN,
    MAX_DEPTH,
    NUM_ROWS,
    ONE,
    PLAN,
    PLAN_BINS_PER_UNIT,
    PLAN_LEAST,
    PLAN_LOG_MASS,
    PLAN_MASS,
    PLAN_TOP,
    PRESENCE,
    REPETITION,
    anchor,
    cells,
    cells_per_unit,
    exp,
    is_banned,
    is_finite,
    is_last,
    load_parts,
    load_sampling,
    wait,
    weights_of,
)


@triton.jit
def _mass(x, top, scale):
    """Return the sum of a block's weights, where that of `top` is 1."""
    return tl.sum(weights_of(x, anchor(top), scale), 0).to(tl.float32) / ONE


@triton.jit
def _one_row(p_logits, p_banned, p_bias, first, bias_row, o_v, m_v, V: tl.constexpr):
    """Return the only row of a request, bit for bit; banned ids become -inf there as well."""
    p_z = p_logits + first * V + o_v
    x = tl.load(p_z, mask=m_v, other=float("-inf"))
    banned = is_banned(p_banned, p_bias, bias_row, o_v, m_v, V)
    x = tl.where(banned, float("-inf"), x)
    tl.store(p_z, x, mask=m_v & banned)
    return x


@triton.jit
def _penalise(
    x, p_ints, p_floats, p_counts, p_marks, p_bias, G, i_g, count_row, bias_row, o_v, m_v,
    V: tl.constexpr,
):  # fmt: skip
    """Return merged logits [BLOCK] after penalties and bias; counts are *decayed*."""
    if count_row >= 0:
        at = count_row.to(tl.int64) * V + o_v
        marks = tl.load(p_marks + at, mask=m_v, other=0)
        counts = tl.load(p_counts + at, mask=m_v, other=0.0)
        factor = tl.load(p_floats + REPETITION * G + i_g)
        factors = tl.where(marks != 0, factor, 1.0)
        presence = tl.where((marks & 2) != 0, tl.load(p_floats + PRESENCE * G + i_g), 0.0)
        x = tl.where(x > 0, tl.div_rn(x, factors), x * factors)
        x -= presence + tl.load(p_floats + FREQUENCY * G + i_g) * counts
        # What `push` does to the others before it counts the token that this step draws.
        decay = tl.load(p_floats + DECAY * G + i_g)
        if decay != 1.0:
            tl.store(p_counts + at, counts * decay, mask=m_v & (counts != 0))
    if bias_row >= 0:
        bias = tl.load(p_bias + bias_row.to(tl.int64) * V + o_v, mask=m_v, other=0.0)
        x += tl.where(bias == float("-inf"), 0.0, bias)
    return x


@triton.jit
def _plan(
    p_top, p_mass, p_merged_top, p_merged_mass, p_low, p_cell, p_level_mass, p_level_count,
    p_least_cell, p_offset, p_count, p_plan, p_num_candidates, i_g, at, top_k, top_p, min_p,
    is_rwkv, is_truncated, scale, NB: tl.constexpr, NBP: tl.constexpr, BLOCK: tl.constexpr,
    TRUNCATE: tl.constexpr,
):  # fmt: skip
    """Add up a request's blocks: largest score, mass, log-sum-exp, and where candidates begin.

    The candidates are a superset of what top-k, top-p and min-p keep: all tokens above a level
    that has mass enough (count enough) above it.
    """
    o_n = tl.arange(0, NBP)
    m_n = o_n < NB
    merged_tops = load_parts(p_merged_top + at, o_n, NB, float("-inf"))
    merged_masses = load_parts(p_merged_mass + at, o_n, NB, 0.0)
    tops = load_parts(p_top + at, o_n, NB, float("-inf"))
    merged_top = tl.max(merged_tops, 0)
    merged_shares = exp(merged_tops - anchor(merged_top)).to(tl.float64)
    mass = tl.sum(merged_masses.to(tl.float64) * merged_shares, 0).to(tl.float32)
    top = tl.max(tops, 0)
    usable = is_finite(merged_top) & is_finite(top)
    p_plan += i_g * PLAN
    tl.store(p_plan + PLAN_TOP, tl.where(usable, top, float("-inf")))
    tl.store(p_plan + PLAN_LOG_MASS, merged_top + tl.log(mass))
    if TRUNCATE:
        num_candidates = 0
        if usable & is_truncated:
            shares = tl.exp2((tops - top) * scale)
            cell = load_parts(p_cell + at, o_n, NB, -536870912)
            highest = tl.max(cell, 0)
            o_j = tl.arange(0, MAX_DEPTH)
            index = (cell - highest)[:, None] + o_j[None, :]
            # The last level says nothing of what lies between it and the one before.
            p_level = (at + o_n)[:, None] * LEVELS + tl.minimum(tl.maximum(index, 0), LEVELS - 2)
            m_l = m_n[:, None] & (index >= 0)
            # In fp64, so that no order of adding shows in fp32.
            whole = load_parts(p_mass + at, o_n, NB, 0.0).to(tl.float64) * shares.to(tl.float64)
            total = tl.sum(whole, 0).to(tl.float32)
            tl.store(p_plan + PLAN_MASS, total)
            least = float("-inf")
            by_p = MAX_DEPTH - 1
            by_k = MAX_DEPTH - 1
            by_min = MAX_DEPTH - 1
            if top_p < 1.0:
                masses = tl.load(p_level_mass + p_level, mask=m_l, other=0, cache_modifier=".cg")
                above = tl.sum(masses.to(tl.float32) * (shares * (BLOCK / LEVEL_ONE))[:, None], 0)
                is_enough = above >= total * top_p * MARGIN
                by_p = tl.min(tl.where(is_enough, o_j, MAX_DEPTH - 1), 0)
            if top_k > 0:
                counts = tl.load(p_level_count + p_level, mask=m_l, other=0, cache_modifier=".cg")
                is_enough = tl.sum(counts, 0) >= top_k
                by_k = tl.min(tl.where(is_enough, o_j, MAX_DEPTH - 1), 0)
            if min_p > 0:
                # Probability at least `min_p` of the largest one, said of the scores.
                least = top + tl.log2(min_p) / scale
                by_min = tl.minimum(highest - cells(least, scale), MAX_DEPTH - 1)
            tl.store(p_plan + PLAN_LEAST, least)
            depth = tl.minimum(by_k, tl.minimum(by_p, by_min))
            # In OpenAI's order top-p needs the mass of all that top-k leaves.
            if (top_k > 0) & (top_p < 1.0) & (is_rwkv == 0):
                depth = by_k
            level = cell - highest + depth
            level = tl.where(depth == MAX_DEPTH - 1, LEVELS - 1, tl.minimum(level, LEVELS - 1))
            p_counts = p_level_count + (at + o_n) * LEVELS + tl.maximum(level, 0)
            kept = tl.load(p_counts, mask=m_n & (level >= 0), other=0, cache_modifier=".cg")
            tl.store(p_count + at + o_n, kept, mask=m_n)
            tl.store(p_offset + at + o_n, tl.cumsum(kept, 0) - kept, mask=m_n)
            # The last level is all.
            lowest = tl.where(level == LEVELS - 1, -2147483648, highest - depth)
            tl.store(p_least_cell + at + o_n, lowest, mask=m_n)
            num_candidates = tl.sum(kept, 0)
            # As many bins as there are, from the largest candidate to the least, which lies well
            # within the last one.
            bottom = tl.min(load_parts(p_low + at, o_n, NB, float("inf")), 0)
            if depth < MAX_DEPTH - 1:
                floor = (highest - depth).to(tl.float32) / cells_per_unit(scale)
                bottom = tl.maximum(bottom, floor)
            tl.store(
                p_plan + PLAN_BINS_PER_UNIT, 1.0 / tl.maximum(top - bottom, 1e-30) * (BINS - 0.5)
            )
        tl.store(p_num_candidates + i_g, num_candidates)


@triton.jit
def _store_levels(
    x, top, scale, top_p, p_low, p_cell, p_level_mass, p_level_count, at, BLOCK: tl.constexpr
):
    """Store how much mass, and how many tokens, a block has above each level; its least score."""
    tl.store(p_low + at, tl.min(tl.where(x > float("-inf"), x, float("inf")), 0))
    cell = cells(top, scale)
    tl.store(p_cell + at, cell)
    level = tl.minimum(cell - cells(x, scale), LEVELS - 1)
    level = tl.where(x > float("-inf"), level, LEVELS)
    o_l = tl.arange(0, LEVELS)
    is_above = level[None, :] <= o_l[:, None]
    p_level = at * LEVELS + o_l
    weight = (tl.exp2((x - anchor(top)) * scale) * (LEVEL_ONE / BLOCK)).to(tl.int32)
    tl.store(p_level_mass + p_level, tl.sum(tl.where(is_above, weight[None, :], 0), 1))
    tl.store(p_level_count + p_level, tl.sum(is_above.to(tl.int32), 1))


@triton.jit
def merge_rows_kernel(
    p_logits,
    p_ints,
    p_floats,
    p_named,
    p_bias,
    p_banned,
    p_counts,
    p_marks,
    p_row_max,
    p_row_mass,
    p_row_log_mass,
    p_row_weight,
    p_rule,
    p_merged,
    p_scores,
    p_top,
    p_best_id,
    p_mass,
    p_merged_top,
    p_merged_mass,
    p_low,
    p_cell,
    p_level_mass,
    p_level_count,
    p_least_cell,
    p_offset,
    p_count,
    p_plan,
    p_num_candidates,
    p_arrived,
    G,
    V: tl.constexpr,
    NB: tl.constexpr,
    NBP: tl.constexpr,
    BLOCK: tl.constexpr,
    KT: tl.constexpr,
    MIXED: tl.constexpr,
    TRUNCATE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (NB, requests). Merges, penalises, and says of each block what a draw needs.

    A request of one row that nothing changes leaves its scores where they are, in the logits.
    """
    i_b = tl.program_id(0)
    i_g = tl.program_id(1)
    first = tl.load(p_ints + FIRST_ROW * G + i_g).to(tl.int64)
    num_rows = tl.load(p_ints + NUM_ROWS * G + i_g)
    count_row = tl.load(p_ints + COUNT_ROW * G + i_g)
    bias_row = tl.load(p_ints + BIAS_ROW * G + i_g)
    keep = tl.load(p_ints + KEEP_MERGED * G + i_g)
    top_k, top_p, min_p, is_rwkv, drawn, looked_at = load_sampling(p_ints, p_floats, G, i_g)
    is_truncated = (drawn > 0) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0))
    o_v = i_b * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < V
    wait(PDL)
    if num_rows > 0:
        if MIXED:
            if num_rows > 1:
                rule = tl.load(p_rule + i_g)
                base_named = tl.load(p_ints + BASE_NAMED * G + i_g)
                cut = tl.load(p_floats + CUT * G + i_g)
                exponent = tl.load(p_floats + EXPONENT * G + i_g)
                x = merge(
                    p_logits, p_named, p_row_max, p_row_mass, p_row_log_mass, p_row_weight, first,
                    num_rows, rule, cut, exponent, base_named, o_v, m_v, V, BLOCK, KT,
                )  # fmt: skip
                x = tl.where(m_v, x, float("-inf"))
            else:
                x = _one_row(p_logits, p_banned, p_bias, first, bias_row, o_v, m_v, V)
        else:
            x = _one_row(p_logits, p_banned, p_bias, first, bias_row, o_v, m_v, V)
        at = i_g * NB + i_b
        o_row = i_g.to(tl.int64) * V + o_v
        is_scored = (count_row >= 0) | (bias_row >= 0)
        if is_scored | (keep != 0) | (num_rows > 1):
            tl.store(p_merged + o_row, x, mask=m_v)
        merged_top = tl.max(tl.where(x == x, x, float("inf")), 0)
        tl.store(p_merged_top + at, merged_top)
        merged_mass = _mass(x, merged_top, LOG2E)
        tl.store(p_merged_mass + at, merged_mass)
        top = merged_top
        if is_scored:
            x = _penalise(
                x, p_ints, p_floats, p_counts, p_marks, p_bias, G, i_g, count_row, bias_row,
                o_v, m_v, V,
            )  # fmt: skip
            tl.store(p_scores + o_row, x, mask=m_v)
            top = tl.max(x, 0)
        tl.store(p_top + at, top)
        # What this kind of request is drawn from, and nothing else.
        if drawn == 0:
            tl.store(p_best_id + at, tl.min(tl.where(x == top, o_v, V), 0))
        else:
            scale = drawn
            if TRUNCATE and is_truncated:
                scale = looked_at
                _store_levels(
                    x, top, scale, top_p, p_low, p_cell, p_level_mass, p_level_count, at, BLOCK
                )
            mass = merged_mass
            if is_scored | (scale != LOG2E):
                mass = _mass(x, top, scale)
            tl.store(p_mass + at, mass)
        if is_last(p_arrived + i_g, NB):
            _plan(
                p_top, p_mass, p_merged_top, p_merged_mass, p_low, p_cell, p_level_mass,
                p_level_count, p_least_cell, p_offset, p_count, p_plan, p_num_candidates, i_g,
                i_g * NB, top_k, top_p, min_p, is_rwkv, is_truncated, looked_at, NB, NBP, BLOCK,
                TRUNCATE,
            )  # fmt: skip
