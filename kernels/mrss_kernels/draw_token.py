# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""From a request's scores to its token: exact truncation (`truncation`) and one draw.

One kernel over blocks of the vocabulary and requests, the last of a step's tail; `tail.launch_tail`
launches it. Masses are sums of integers (`weights_of`) and the order of tokens is one of integers
too: no order of adding changes a bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.candidates import (
    BRACKET,
    HIGHEST_ID,
    Sampling,
    ids_of,
    load_bracket,
    scores_of,
)
from mrss_kernels.tail_common import (
    CHOICE,
    COUNT_ROW,
    NEXT_ROW,
    NUM_ROWS,
    ONE,
    PLAN,
    PLAN_BINS_PER_UNIT,
    PLAN_LEAST,
    PLAN_LOG_MASS,
    PLAN_MASS,
    PLAN_TOP,
    POSITION,
    fetch,
    is_finite,
    is_last,
    load_parts,
    load_sampling,
    wait,
    weights_of,
)
from mrss_kernels.truncation import (
    decide_undecided,
    gather_undecided,
    truncate_block,
    truncate_few,
)


@triton.jit
def _pick(weights, ids, before, target):
    """Return the first id whose cumulative weight, from `before` on, is above `target`.

    Ids ascend.
    """
    cumulative = before + tl.cumsum(weights, 0)
    found = tl.min(tl.where(cumulative.to(tl.float64) > target, ids, HIGHEST_ID), 0)
    # Rounding may put the target on the sum itself.
    return tl.minimum(found, tl.max(tl.where(weights > 0, ids, 0), 0))


@triton.jit
def _draw_from_few(p_listed, p_ids, num, u, sampling, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Draw from at most ROWS candidates, in the order of their ids."""
    place, weights = truncate_few(p_listed, p_ids, num, sampling, ROWS, WIDTH)
    return _pick(weights, ids_of(place), 0, u * tl.sum(weights, 0).to(tl.float64))


@triton.jit
def _draw_from_many(
    p_x, p_least_cell, p_listed, p_ids, p_num_listed, p_sums, p_bracket, stride, u, sampling,
    V: tl.constexpr, NB: tl.constexpr, NBP: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Draw a block by what is kept of it, then a token of it."""
    num = fetch(p_num_listed)
    bracket = load_bracket(p_bracket)
    last_place = decide_undecided(
        p_listed, p_ids, num, p_sums, p_bracket, stride, bracket, sampling, NB, NBP, BLOCK, PAIRS,
        WIDTH, TILE,
    )  # fmt: skip
    # Until every warp has read the list's length and added to the sums.
    tl.debug_barrier()
    tl.store(p_num_listed, 0)
    o_n = tl.arange(0, NBP)
    masses = load_parts(p_sums, o_n, NB, 0)
    through = tl.cumsum(masses, 0)
    target = u * tl.sum(masses, 0).to(tl.float64)
    block = tl.min(tl.where(through.to(tl.float64) > target, o_n, NBP), 0)
    block = tl.minimum(block, tl.max(tl.where(masses > 0, o_n, 0), 0))
    before = tl.sum(tl.where(o_n < block, masses, 0), 0)
    ids, weights = truncate_block(p_x, p_least_cell, block, last_place, bracket, sampling, V, BLOCK)
    return _pick(weights, ids, before, target)


@triton.jit
def _draw_from_all(
    p_x, p_top, p_mass, u, top, draw_scale, V: tl.constexpr, NB: tl.constexpr, NBP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw from everything: a block by the blocks' masses, then a token of it."""
    o_n = tl.arange(0, NBP)
    tops = tl.load(p_top + o_n, mask=o_n < NB, other=float("-inf"))
    masses = tl.load(p_mass + o_n, mask=o_n < NB, other=0.0).to(tl.float64)
    masses *= tl.exp2((tops - top) * draw_scale).to(tl.float64)
    cumulative = tl.cumsum(masses, 0)
    target = u * tl.max(cumulative, 0)
    block = tl.min(tl.where(cumulative > target, o_n, NBP), 0)
    block = tl.minimum(block, tl.max(tl.where(masses > 0, o_n, 0), 0))
    before = tl.max(tl.where(o_n < block, cumulative, 0.0), 0)
    mass = tl.sum(tl.where(o_n == block, masses, 0.0), 0)
    own_top = tl.max(tl.where(o_n == block, tops, float("-inf")), 0)
    o_v = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o_v, mask=o_v < V, other=float("-inf"))
    # How far into the block: its mass here and there differ by their rounding.
    weights = weights_of(x, own_top, draw_scale)
    inner = (target - before) / mass * tl.sum(weights, 0).to(tl.float64)
    return _pick(weights, o_v, 0, inner)


@triton.jit
def _argmax(p_top, p_best_id, top, V: tl.constexpr, NB: tl.constexpr, NBP: tl.constexpr):
    """Return the first id of the largest score."""
    o_n = tl.arange(0, NBP)
    tops = tl.load(p_top + o_n, mask=o_n < NB, other=float("-inf"))
    ids = tl.load(p_best_id + o_n, mask=o_n < NB, other=V)
    return tl.min(tl.where(tops == top, ids, V), 0)


@triton.jit(do_not_specialize=["per"])
def draw_token_kernel(
    p_logits,
    p_merged,
    p_scores,
    p_ints,
    p_floats,
    p_seeds,
    p_counts,
    p_marks,
    p_top,
    p_best_id,
    p_mass,
    p_plan,
    p_least_cell,
    p_num_candidates,
    p_candidates,
    p_candidate_ids,
    p_bracket,
    p_sums,
    p_num_undecided,
    p_arrived,
    p_token_ids,
    p_ids,
    p_log_probs,
    G,
    per,
    V: tl.constexpr,
    NB: tl.constexpr,
    NBP: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    FEW: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TRUNCATE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (NB / per, requests). Draws, hands the token to the rows of the next step, counts it.

    That is the work of a request's first program; if its candidates are more than PAIRS, of the
    last one that has looked at its blocks. Without TRUNCATE one program a request is enough.
    """
    i_p = tl.program_id(0)
    i_g = tl.program_id(1)
    num_rows = tl.load(p_ints + NUM_ROWS * G + i_g)
    next_row = tl.load(p_ints + NEXT_ROW * G + i_g)
    count_row = tl.load(p_ints + COUNT_ROW * G + i_g)
    p_x = scores_of(p_logits, p_merged, p_scores, p_ints, G, i_g, V, True)
    p_m = scores_of(p_logits, p_merged, p_scores, p_ints, G, i_g, V, False)
    top_k, top_p, _, is_rwkv, draw_scale, scale = load_sampling(p_ints, p_floats, G, i_g)
    is_nested = (top_k > 0) & (is_rwkv == 0)
    top_k = tl.where(top_k > 0, top_k, HIGHEST_ID)
    seed = tl.load(p_seeds + i_g)
    choice = tl.load(p_ints + CHOICE * G + i_g)
    # The kernel before this one lets it start only when the one before that is done: what the
    # merge has written can be read early, unless the merge itself is the kernel before.
    if not TRUNCATE:
        wait(PDL)
    p_plan += i_g * PLAN
    top = fetch(p_plan + PLAN_TOP)
    log_mass = fetch(p_plan + PLAN_LOG_MASS)
    position = fetch(p_ints + POSITION * G + i_g)
    word = tl.philox(seed, position, choice, 0, 0)[0]
    u = tl.uint_to_uniform_float(word).to(tl.float64)
    is_mine = i_p == 0
    if TRUNCATE:
        mass = fetch(p_plan + PLAN_MASS).to(tl.float64) * ONE
        least = fetch(p_plan + PLAN_LEAST)
        bins_per_unit = fetch(p_plan + PLAN_BINS_PER_UNIT)
        sampling = Sampling(
            top_k, top_p, is_nested, mass, least, top, bins_per_unit, scale, draw_scale
        )
        num = tl.where(num_rows > 0, fetch(p_num_candidates + i_g), 0)
        p_least_cell += i_g * NB
        # Few candidates as they were copied; of many, what is undecided is listed here.
        p_listed = p_candidates + i_g.to(tl.int64) * V
        p_listed_ids = p_candidate_ids + i_g.to(tl.int64) * V
        p_bracket += i_g * BRACKET
        p_sums += i_g * NB
        wait(PDL)
        if num > PAIRS:
            bracket = load_bracket(p_bracket)
            for i_b in range(i_p * per, tl.minimum(i_p * per + per, NB)):
                gather_undecided(
                    p_x, p_least_cell, p_listed, p_listed_ids, p_num_undecided + i_g, p_sums,
                    G * NB, i_b, bracket, sampling, V, BLOCK,
                )  # fmt: skip
            is_mine = is_last(p_arrived + i_g, (NB + per - 1) // per)
    if is_mine:
        token = -1
        if num_rows > 0:
            if is_finite(top):
                if draw_scale == 0:
                    token = _argmax(p_top + i_g * NB, p_best_id + i_g * NB, top, V, NB, NBP)
                elif TRUNCATE and num > PAIRS:
                    token = _draw_from_many(
                        p_x, p_least_cell, p_listed, p_listed_ids, p_num_undecided + i_g, p_sums,
                        p_bracket, G * NB, u, sampling, V, NB, NBP, BLOCK, PAIRS, WIDTH, TILE,
                    )  # fmt: skip
                elif TRUNCATE and num > FEW:
                    token = _draw_from_few(p_listed, p_listed_ids, num, u, sampling, PAIRS, WIDTH)
                elif TRUNCATE and num > 0:
                    token = _draw_from_few(p_listed, p_listed_ids, num, u, sampling, FEW, FEW)
                else:
                    token = _draw_from_all(
                        p_x, p_top + i_g * NB, p_mass + i_g * NB, u, top, draw_scale, V, NB, NBP,
                        BLOCK,
                    )  # fmt: skip
                tl.store(p_ints + POSITION * G + i_g, position + 1)
                tl.store(p_log_probs + i_g, tl.load(p_m + token) - log_mass)
                if count_row >= 0:
                    at = count_row.to(tl.int64) * V + token
                    tl.store(p_counts + at, tl.load(p_counts + at) + 1.0)
                    tl.store(p_marks + at, 3)
            # A request that failed gets token 0 in its rows: something that can be looked up.
            if next_row >= 0:
                for k in range(num_rows):
                    tl.store(p_token_ids + next_row + k, tl.maximum(token, 0))
        tl.store(p_ids + i_g, token)
