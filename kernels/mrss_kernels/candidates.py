# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Candidates of a draw: which scores of a block are, in which bins, and in which order.

What `find_candidates`, `truncation` and `draw_token` share; nothing here is a kernel. Bins divide
the scores from the largest one down. A place is a score and an id in one integer: no two are equal.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from mrss_kernels.tail_common import (
    BIAS_ROW,
    BINS,
    COUNT_ROW,
    FIRST_ROW,
    NUM_ROWS,
    cells,
    fetch,
)

HIGHEST_ID: tl.constexpr = tl.constexpr(2147483647)
LOWEST_PLACE: tl.constexpr = tl.constexpr(-9223372036854775808)
HIGHEST_PLACE: tl.constexpr = tl.constexpr(9223372036854775807)

# Where `find_candidates_kernel` puts a request's `Bracket` in `p_bracket`, and behind it how many
# tokens the bins below `first_by_k` have.
BRACKET: tl.constexpr = tl.constexpr(8)
FIRST_BY_K: tl.constexpr = tl.constexpr(0)
LAST_BY_K: tl.constexpr = tl.constexpr(1)
FIRST_BY_P: tl.constexpr = tl.constexpr(2)
LAST_BY_P: tl.constexpr = tl.constexpr(3)
COUNT_ABOVE_K: tl.constexpr = tl.constexpr(4)


class Sampling(NamedTuple):
    """What one request's truncation and draw go by.

    Attributes:
        top_k: tokens that top-k keeps; `HIGHEST_ID` if it is off.
        top_p: share of the mass that top-p keeps; 1 is off.
        is_nested: whether that is a share of what top-k leaves, else of everything.
        mass: of everything, fp64, in the unit of `weights_of`.
        least: least score that min-p keeps.
        top: largest score.
        bins_per_unit: bins a unit of score.
        scale: octaves of weight a unit of score, in the distribution that is truncated.
        draw_scale: the same in the distribution that is drawn from.
    """

    top_k: tl.tensor
    top_p: tl.tensor
    is_nested: tl.tensor
    mass: tl.tensor
    least: tl.tensor
    top: tl.tensor
    bins_per_unit: tl.tensor
    scale: tl.tensor
    draw_scale: tl.tensor


class Bracket(NamedTuple):
    """Bins in which top-k and top-p end.

    Each keeps what lies in bins below its first one and drops what lies in bins above its last one;
    what lies between is not decided by its bin.
    """

    first_by_k: tl.tensor
    last_by_k: tl.tensor
    first_by_p: tl.tensor
    last_by_p: tl.tensor


@triton.jit
def scores_of(p_logits, p_merged, p_scores, p_ints, G, i_g, V: tl.constexpr, SCORED: tl.constexpr):
    """Return a pointer to a request's scores (SCORED), or to its merged logits."""
    num_rows = tl.load(p_ints + NUM_ROWS * G + i_g)
    count_row = tl.load(p_ints + COUNT_ROW * G + i_g)
    bias_row = tl.load(p_ints + BIAS_ROW * G + i_g)
    first = tl.load(p_ints + FIRST_ROW * G + i_g).to(tl.int64)
    is_scored = (count_row >= 0) | (bias_row >= 0)
    row = i_g.to(tl.int64) * V
    p = p_logits + first * V
    if is_scored | (num_rows > 1):
        p = p_merged + row
    if SCORED and is_scored:
        p = p_scores + row
    return p


@triton.jit
def load_block(p_x, o_v, least_cell, scale, V: tl.constexpr):
    """Return a block's scores, and which of them are candidates."""
    x = tl.load(p_x + o_v, mask=o_v < V, other=float("-inf"))
    return x, (cells(x, scale) >= least_cell) & (x > float("-inf"))


@triton.jit
def bins_of(x, top, bins_per_unit):
    """Return the bins of scores, from 0 at `top` on; the last one has all that is further down."""
    return tl.minimum((top - x) * bins_per_unit, BINS - 1).to(tl.int32)


@triton.jit
def load_bracket(p_bracket):
    return Bracket(
        fetch(p_bracket + FIRST_BY_K),
        fetch(p_bracket + LAST_BY_K),
        fetch(p_bracket + FIRST_BY_P),
        fetch(p_bracket + LAST_BY_P),
    )


@triton.jit
def _keys(x):
    """Return integers in the order of the scores; the two zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def places_of(x, ids):
    """Return integers, no two the same: larger for a larger score, among equals for a lower id."""
    return (_keys(x).to(tl.int64) << 32) | (ids ^ HIGHEST_ID).to(tl.int64)


@triton.jit
def ids_of(place):
    """Return the ids of tokens by their places."""
    return (place & HIGHEST_ID).to(tl.int32) ^ HIGHEST_ID


@triton.jit
def load_listed(p_listed, p_ids, o_c, num):
    """Return scores and places of a list's entries; places are the lowest beyond its end."""
    m_c = o_c < num
    x = tl.load(p_listed + o_c, mask=m_c, other=0.0, cache_modifier=".cg")
    ids = tl.load(p_ids + o_c, mask=m_c, other=HIGHEST_ID, cache_modifier=".cg")
    return x, tl.where(m_c, places_of(x, ids), LOWEST_PLACE)
