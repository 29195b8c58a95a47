# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""From a request's scores to its token: exact truncation and one draw, without a sort.

Few candidates are gathered by `find_candidates_kernel` and compared with each other by one program
of `draw_token_kernel`. Of many the first counts what lies in each of `NUM_BINS` bins of scores, and
the programs of the second share what is left to do. Masses are sums of integers (a weight times
2^44) and the order of tokens is one of integers too: no order of adding changes a bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.tail_common import (
    BIAS_ROW,
    BINS,
    CHOICE,
    COUNT_ROW,
    FIRST_ROW,
    NEXT_ROW,
    NUM_ROWS,
    ONE,
    PLAN,
    POSITION,
    cells,
    is_finite,
    is_last,
    load_sampling,
    wait,
    weights_of,
)

HIGHEST_ID: tl.constexpr = tl.constexpr(2147483647)
# Places: a key and an id in 64 bits, larger for what is ranked further ahead.
LOWEST: tl.constexpr = tl.constexpr(-9223372036854775808)
HIGHEST: tl.constexpr = tl.constexpr(9223372036854775807)
# A bin has a count above these bits and below them a mass in units of 2^-25: 2^18 weights of at
# most 1 stay below 2^44, and the whole below 2^63.
BIN_BITS: tl.constexpr = tl.constexpr(44)
BIN_ONE: tl.constexpr = tl.constexpr(1 << 44)
BIN_MASS: tl.constexpr = tl.constexpr((1 << 44) - 1)
BIN_UNIT_BITS: tl.constexpr = tl.constexpr(19)
BIN_UNIT: tl.constexpr = tl.constexpr(524288.0)
# The mass of 2^8 candidates is below 2^53; how many there are stands above it.
RANK_BITS: tl.constexpr = tl.constexpr(53)
RANK_ONE: tl.constexpr = tl.constexpr(1 << 53)
RANK_MASS: tl.constexpr = tl.constexpr((1 << 53) - 1)
# What `find_candidates_kernel` says of a request with many candidates, in `p_bracket`: tokens of
# bins below a `FIRST` are kept, those of bins above a `LAST` are not, between them none is decided.
BRACKET: tl.constexpr = tl.constexpr(8)
FIRST_BY_K: tl.constexpr = tl.constexpr(0)
LAST_BY_K: tl.constexpr = tl.constexpr(1)
FIRST_BY_P: tl.constexpr = tl.constexpr(2)
LAST_BY_P: tl.constexpr = tl.constexpr(3)
# How many tokens the bins below `FIRST_BY_K` have.
ABOVE_K: tl.constexpr = tl.constexpr(4)


@triton.jit
def _source(p_logits, p_merged, p_scores, p_ints, G, i_g, V: tl.constexpr, SCORED: tl.constexpr):
    """Return where a request's scores (SCORED), or its merged logits, are."""
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
def _fetch(p):
    # Past the L1, where a line may be older than what another multiprocessor has written since.
    return tl.load(p, cache_modifier=".cg")


@triton.jit
def _candidates(p_x, o_v, least_cell, scale, V: tl.constexpr):
    """Return a block's scores, and which of them are candidates."""
    x = tl.load(p_x + o_v, mask=o_v < V, other=float("-inf"))
    return x, (cells(x, scale) >= least_cell) & (x > float("-inf"))


@triton.jit
def _bins_of(x, top, fineness):
    """Return the bins of scores, from 0 at `top` on; the last one has all that is further down."""
    return tl.minimum((top - x) * fineness, BINS - 1).to(tl.int32)


@triton.jit
def _bracket(p_bins, p_bracket, top_k, top_p, is_rwkv, total, CHUNK: tl.constexpr):
    """Find between which bins top-k and top-p end. The bins are emptied for the next step.

    The masses of bins are rounded down, by less than their count.
    """
    o_c = tl.arange(0, CHUNK)
    # Counts and masses from the first bin on: of the bins that top-k keeps, and of those that it
    # does not drop. A larger count has no smaller mass.
    least = tl.full([], 0, tl.int64)
    most = tl.full([], 0, tl.int64)
    first_by_k = tl.full([], BINS, tl.int32)
    last_by_k = tl.full([], BINS - 1, tl.int32)
    if top_k > 0:
        before = tl.full([], 0, tl.int64)
        last_by_k = tl.full([], -1, tl.int32)
        for c in range(0, BINS, CHUNK):
            own = tl.load(p_bins + c + o_c, cache_modifier=".cg")
            through = before + tl.cumsum(own, 0)
            kept = through >> BIN_BITS <= top_k
            undropped = (through - own) >> BIN_BITS < top_k
            least = tl.maximum(least, tl.max(tl.where(kept, through, 0), 0))
            most = tl.maximum(most, tl.max(tl.where(undropped, through, 0), 0))
            first_by_k = tl.minimum(first_by_k, tl.min(tl.where(kept, BINS, c + o_c), 0))
            last_by_k = tl.maximum(last_by_k, tl.max(tl.where(undropped, c + o_c, -1), 0))
            before += tl.sum(own, 0)
    # As `draw_token_kernel` reckons, in the bins' unit: powers of two change no bit.
    least_want = total.to(tl.float64) * (ONE / BIN_UNIT)
    most_want = least_want
    if (top_k > 0) & (is_rwkv == 0):
        least_want = (least & BIN_MASS).to(tl.float64)
        most_want = ((most & BIN_MASS) + (most >> BIN_BITS)).to(tl.float64)
    least_want = tl.where(top_p < 1.0, least_want * top_p, float("inf"))
    most_want = tl.where(top_p < 1.0, most_want * top_p, float("inf"))
    first_by_p = tl.full([], BINS, tl.int32)
    last_by_p = tl.full([], -1, tl.int32)
    before = tl.full([], 0, tl.int64)
    for c in range(0, BINS, CHUNK):
        own = tl.load(p_bins + c + o_c, cache_modifier=".cg")
        through = before + tl.cumsum(own, 0)
        most_mass = (through & BIN_MASS) + (through >> BIN_BITS)
        is_kept = most_mass.to(tl.float64) < least_want
        is_undropped = ((through - own) & BIN_MASS).to(tl.float64) < most_want
        first_by_p = tl.minimum(first_by_p, tl.min(tl.where(is_kept, BINS, c + o_c), 0))
        last_by_p = tl.maximum(last_by_p, tl.max(tl.where(is_undropped, c + o_c, -1), 0))
        before += tl.sum(own, 0)
        # Behind the barriers of these sums, when every warp has read.
        tl.store(p_bins + c + o_c, tl.zeros([CHUNK], tl.int64))
    tl.store(p_bracket + FIRST_BY_K, first_by_k)
    tl.store(p_bracket + LAST_BY_K, last_by_k)
    tl.store(p_bracket + FIRST_BY_P, first_by_p)
    tl.store(p_bracket + LAST_BY_P, last_by_p)
    tl.store(p_bracket + ABOVE_K, (least >> BIN_BITS).to(tl.int32))


@triton.jit(do_not_specialize=["per"])
def find_candidates_kernel(
    p_logits,
    p_merged,
    p_scores,
    p_ints,
    p_floats,
    p_plan,
    p_least_cell,
    p_offset,
    p_count,
    p_num_candidates,
    p_candidates,
    p_candidate_ids,
    p_bins,
    p_bracket,
    p_arrived,
    G,
    per,
    V: tl.constexpr,
    NB: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (NB / per, requests), per blocks each. Of requests that truncate.

    At most PAIRS candidates: copies their scores and ids, by id. More: counts them in bins.
    """
    i_p = tl.program_id(0)
    i_g = tl.program_id(1)
    num_rows = tl.load(p_ints + NUM_ROWS * G + i_g)
    top_k, top_p, _, is_rwkv, _, scale = load_sampling(p_ints, p_floats, G, i_g)
    p_x = _source(p_logits, p_merged, p_scores, p_ints, G, i_g, V, True)
    wait(PDL)
    num = 0
    if num_rows > 0:
        num = tl.load(p_num_candidates + i_g)
    if num > 0:
        p_plan += i_g * PLAN
        top = tl.load(p_plan)
        fineness = tl.load(p_plan + 4)
        for i_b in range(i_p * per, tl.minimum(i_p * per + per, NB)):
            at = i_g * NB + i_b
            if tl.load(p_count + at) > 0:
                o_v = i_b * BLOCK + tl.arange(0, BLOCK)
                x, found = _candidates(p_x, o_v, tl.load(p_least_cell + at), scale, V)
                if num <= PAIRS:
                    rank = tl.cumsum(found.to(tl.int32), 0) - 1
                    o_c = i_g.to(tl.int64) * V + tl.load(p_offset + at) + rank
                    tl.store(p_candidates + o_c, x, mask=found)
                    tl.store(p_candidate_ids + o_c, o_v, mask=found)
                else:
                    p_bin = p_bins + i_g.to(tl.int64) * BINS
                    bin = _bins_of(x, top, fineness)
                    one = (weights_of(x, top, scale) >> BIN_UNIT_BITS) + BIN_ONE
                    # What has a floor lies in the last bin: too many for one address.
                    is_low = bin == BINS - 1
                    low = tl.sum(tl.where(found & is_low, one, 0), 0)
                    tl.atomic_add(p_bin + bin, one, mask=found & (is_low == 0), sem="relaxed")
                    tl.atomic_add(p_bin + (BINS - 1), low, mask=low > 0, sem="relaxed")
        # Not `and`, which would count in what has nothing to bracket.
        if num > PAIRS:  # noqa: SIM102
            if is_last(p_arrived + i_g, (NB + per - 1) // per):
                _bracket(
                    p_bins + i_g.to(tl.int64) * BINS, p_bracket + i_g * BRACKET, top_k, top_p,
                    is_rwkv, tl.load(p_plan + 2), CHUNK,
                )  # fmt: skip


@triton.jit
def _keys(x):
    """Return integers in the order of the scores; the two zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _places(x, ids):
    """Return integers, no two the same: larger for a larger score, among equals for a lower id."""
    return (_keys(x).to(tl.int64) << 32) | (ids ^ HIGHEST_ID).to(tl.int64)


@triton.jit
def _ids_of(place):
    return (place & HIGHEST_ID).to(tl.int32) ^ HIGHEST_ID


@triton.jit
def _load_listed(p_x, p_ids, o_c, num):
    """Return scores and places of a list's entries; places are the lowest beyond its end."""
    m_c = o_c < num
    x = tl.load(p_x + o_c, mask=m_c, other=0.0, cache_modifier=".cg")
    ids = tl.load(p_ids + o_c, mask=m_c, other=HIGHEST_ID, cache_modifier=".cg")
    return x, tl.where(m_c, _places(x, ids), LOWEST)


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
def _draw_from_few(
    p_c, p_ids, num, u, top_k, top_p, is_nested, whole, least, top, looked_at, drawn,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Draw from at most ROWS candidates, in the order of their ids: all are compared with all."""
    x, place = _load_listed(p_c, p_ids, tl.arange(0, ROWS), num)
    # Counts and masses in one number.
    sums = tl.zeros([ROWS, WIDTH], tl.int64)
    for j in range(0, num, WIDTH):
        other, other_place = _load_listed(p_c, p_ids, j + tl.arange(0, WIDTH), num)
        part = weights_of(other, top, looked_at) + RANK_ONE
        sums += tl.where(other_place[None, :] > place[:, None], part[None, :], 0)
    ahead = tl.sum(sums, 1)
    kept = (place > LOWEST) & (ahead >> RANK_BITS < top_k)
    if is_nested:
        whole = tl.sum(tl.where(kept, weights_of(x, top, looked_at), 0), 0).to(tl.float64)
    want = tl.where(top_p < 1.0, whole * top_p, float("inf"))
    kept = kept & ((ahead & RANK_MASS).to(tl.float64) < want) & (x >= least)
    weights = tl.where(kept, weights_of(x, top, drawn), 0)
    return _pick(weights, _ids_of(place), 0, u * tl.sum(weights, 0).to(tl.float64))


@triton.jit
def _gather_undecided(
    p_x, p_least_cell, p_c, p_ids, p_num_undecided, p_sums, stride, i_b, first_by_k, last_by_k,
    first_by_p, last_by_p, is_nested, least, top, fineness, looked_at, drawn, V: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up what a block keeps for certain, and list what is not decided.

    The list's order depends on which block comes first, and nothing on that order.
    """
    o_v = i_b * BLOCK + tl.arange(0, BLOCK)
    x, found = _candidates(p_x, o_v, tl.load(p_least_cell + i_b), looked_at, V)
    at = _bins_of(x, top, fineness)
    certain = found & (at < tl.minimum(first_by_k, first_by_p)) & (x >= least)
    weights = weights_of(x, top, looked_at)
    tl.store(p_sums + i_b, tl.sum(tl.where(certain, weights_of(x, top, drawn), 0), 0))
    above_p = tl.where(found & (at < first_by_p), weights, 0)
    tl.store(p_sums + stride + i_b, tl.sum(above_p, 0))
    if is_nested:
        above_k = tl.where(found & (at < first_by_k), weights, 0)
        tl.store(p_sums + 2 * stride + i_b, tl.sum(above_k, 0))
    by_k = (at >= first_by_k) & (at <= last_by_k)
    by_p = (at >= first_by_p) & (at <= last_by_p)
    # What one of them drops for certain the other need not decide, unless it counts its mass.
    last = tl.where(is_nested, last_by_k, tl.minimum(last_by_k, last_by_p))
    undecided = (found & (by_k | by_p) & (at <= last)).to(tl.int32)
    num = tl.sum(undecided, 0)
    if num > 0:
        o_c = tl.atomic_add(p_num_undecided, num, sem="relaxed") + tl.cumsum(undecided, 0) - 1
        tl.store(p_c + o_c, x, mask=undecided > 0)
        tl.store(p_ids + o_c, o_v, mask=undecided > 0)


@triton.jit
def _compare_undecided(
    p_c, p_ids, num, top_k, top_p, is_nested, whole, first_by_k, last_by_k, first_by_p, last_by_p,
    above_k, mass_above_k, above_p, top, fineness, looked_at, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the last places that top-k and top-p keep of at most ROWS: all compared with all.

    The highest place of all says that they keep none of their bins.
    """
    x, place = _load_listed(p_c, p_ids, tl.arange(0, ROWS), num)
    at = _bins_of(x, top, fineness)
    sums = tl.zeros([ROWS, WIDTH], tl.int64)
    for j in range(0, num, WIDTH):
        other, other_place = _load_listed(p_c, p_ids, j + tl.arange(0, WIDTH), num)
        other_at = _bins_of(other, top, fineness)
        by_p = (other_at >= first_by_p) & (other_at <= last_by_p)
        by_k = (other_at >= first_by_k) & (other_at <= last_by_k)
        part = tl.where(by_p, weights_of(other, top, looked_at), 0)
        part += by_k.to(tl.int64) << RANK_BITS
        sums += tl.where(other_place[None, :] > place[:, None], part[None, :], 0)
    ahead = tl.sum(sums, 1)
    by_k = (place > LOWEST) & (at >= first_by_k) & (at <= last_by_k)
    by_k = by_k & (above_k + (ahead >> RANK_BITS) < top_k)
    if is_nested:
        mass = mass_above_k + tl.sum(tl.where(by_k, weights_of(x, top, looked_at), 0), 0)
        whole = mass.to(tl.float64)
    by_p = (place > LOWEST) & (at >= first_by_p) & (at <= last_by_p)
    by_p = by_p & ((above_p + (ahead & RANK_MASS)).to(tl.float64) < whole * top_p)
    last_k = tl.min(tl.where(by_k, place, HIGHEST), 0)
    return last_k, tl.min(tl.where(by_p, place, HIGHEST), 0)


@triton.jit
def _load_measured(p_c, p_ids, o_c, num, first, last, top, fineness, scale, BY_COUNT: tl.constexpr):
    """Return places of entries in the bins `first` to `last`, and what a search adds up there.

    That is 1 an entry, or its weight. Other entries have the lowest place and nothing.
    """
    x, place = _load_listed(p_c, p_ids, o_c, num)
    at = _bins_of(x, top, fineness)
    within = (place > LOWEST) & (at >= first) & (at <= last)
    measures = within.to(tl.int64) if BY_COUNT else tl.where(within, weights_of(x, top, scale), 0)
    return tl.where(within, place, LOWEST), measures


@triton.jit
def _search_undecided(
    p_c, p_ids, num, want, above, first, last, top, fineness, scale, BY_COUNT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Find the last place in the bins `first` to `last` that has less than `want` ahead of it.

    Divides the interval of places, and shrinks it each time to places that occur.

    Returns:
        The place; the highest one of all if there is nothing in these bins.
    """
    o_c = tl.arange(0, TILE)
    lows = tl.full([TILE], HIGHEST, tl.int64)
    highs = tl.full([TILE], LOWEST, tl.int64)
    all_measures = tl.zeros([TILE], tl.int64)
    for c in range(0, num, TILE):
        place, measures = _load_measured(
            p_c, p_ids, c + o_c, num, first, last, top, fineness, scale, BY_COUNT
        )
        lows = tl.minimum(lows, tl.where(place > LOWEST, place, HIGHEST))
        highs = tl.maximum(highs, place)
        all_measures += measures
    low = tl.min(lows, 0)
    high = tl.max(highs, 0)
    # Invariant: from `low` on there is enough, from `high + 1` on there is not.
    enough = above + tl.sum(all_measures, 0)
    lacking = above
    if enough.to(tl.float64) < want:
        high = low
    is_guess = low < high
    while low < high:
        # Above the mean, so that an interval of two shrinks; without overflow.
        middle = (low & high) + ((low ^ high) >> 1) + 1
        # Every other time a guess, as if all were spread evenly: among equals, ids often are.
        span = high - low
        if is_guess & (span > 0):
            share = (want - lacking.to(tl.float64)) / (enough - lacking).to(tl.float64)
            middle = tl.maximum(high - (span.to(tl.float64) * share).to(tl.int64), low + 1)
            middle = tl.minimum(middle, high)
        is_guess = is_guess == 0
        lows = tl.full([TILE], HIGHEST, tl.int64)
        highs = tl.full([TILE], LOWEST, tl.int64)
        sums = tl.zeros([TILE], tl.int64)
        for c in range(0, num, TILE):
            place, measures = _load_measured(
                p_c, p_ids, c + o_c, num, first, last, top, fineness, scale, BY_COUNT
            )
            sums += tl.where(place >= middle, measures, 0)
            lows = tl.minimum(lows, tl.where(place >= middle, place, HIGHEST))
            highs = tl.maximum(highs, tl.where(place < middle, place, LOWEST))
        found = above + tl.sum(sums, 0)
        if found.to(tl.float64) >= want:
            low = tl.min(lows, 0)
            enough = found
        else:
            high = tl.max(highs, 0)
            lacking = found
    return low


@triton.jit
def _draw_from_many(
    p_x, p_least_cell, p_c, p_ids, p_num_undecided, p_sums, p_bracket, stride, u, top_k,
    top_p, is_nested, whole, least, top, fineness, looked_at, drawn, V: tl.constexpr,
    NB: tl.constexpr, NBP: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Decide what is not decided, then draw a block by what it keeps, and a token of it."""
    num = _fetch(p_num_undecided)
    first_by_k = _fetch(p_bracket + FIRST_BY_K)
    last_by_k = _fetch(p_bracket + LAST_BY_K)
    first_by_p = _fetch(p_bracket + FIRST_BY_P)
    last_by_p = _fetch(p_bracket + LAST_BY_P)
    above_k = _fetch(p_bracket + ABOVE_K).to(tl.int64)
    o_n = tl.arange(0, NBP)
    m_n = o_n < NB
    above_p = tl.sum(tl.load(p_sums + stride + o_n, mask=m_n, other=0, cache_modifier=".cg"), 0)
    mass_above_k = tl.full([], 0, tl.int64)
    if is_nested:
        parts = tl.load(p_sums + 2 * stride + o_n, mask=m_n, other=0, cache_modifier=".cg")
        mass_above_k = tl.sum(parts, 0)
    o_c = tl.arange(0, TILE)
    if num <= PAIRS:
        last_k, last_p = _compare_undecided(
            p_c, p_ids, num, top_k, top_p, is_nested, whole, first_by_k, last_by_k, first_by_p,
            last_by_p, above_k, mass_above_k, above_p, top, fineness, looked_at, PAIRS, WIDTH,
        )  # fmt: skip
    else:
        last_k = _search_undecided(
            p_c, p_ids, num, top_k.to(tl.float64), above_k, first_by_k, last_by_k, top, fineness,
            looked_at, True, TILE,
        )  # fmt: skip
        if is_nested:
            sums = tl.zeros([TILE], tl.int64)
            for c in range(0, num, TILE):
                place, measures = _load_measured(
                    p_c, p_ids, c + o_c, num, first_by_k, last_by_k, top, fineness, looked_at, False
                )
                sums += tl.where(place >= last_k, measures, 0)
            whole = (mass_above_k + tl.sum(sums, 0)).to(tl.float64)
        last_p = _search_undecided(
            p_c, p_ids, num, whole * top_p, above_p, first_by_p, last_by_p, top, fineness,
            looked_at, False, TILE,
        )  # fmt: skip
    last_places = tl.full([TILE], HIGHEST, tl.int64)
    for c in range(0, num, TILE):
        x, place = _load_listed(p_c, p_ids, c + o_c, num)
        at = _bins_of(x, top, fineness)
        kept = (place > LOWEST) & (x >= least)
        kept = kept & ((at < first_by_k) | ((at <= last_by_k) & (place >= last_k)))
        kept = kept & ((at < first_by_p) | ((at <= last_by_p) & (place >= last_p)))
        last_places = tl.minimum(last_places, tl.where(kept, place, HIGHEST))
        weights = weights_of(x, top, drawn)
        tl.atomic_add(p_sums + _ids_of(place) // BLOCK, weights, mask=kept, sem="relaxed")
    last_place = tl.min(last_places, 0)
    tl.debug_barrier()
    tl.store(p_num_undecided, 0)
    masses = tl.load(p_sums + o_n, mask=m_n, other=0, cache_modifier=".cg")
    through = tl.cumsum(masses, 0)
    target = u * tl.sum(masses, 0).to(tl.float64)
    block = tl.min(tl.where(through.to(tl.float64) > target, o_n, NBP), 0)
    block = tl.minimum(block, tl.max(tl.where(masses > 0, o_n, 0), 0))
    before = tl.sum(tl.where(o_n < block, masses, 0), 0)
    o_v = block * BLOCK + tl.arange(0, BLOCK)
    x, found = _candidates(p_x, o_v, tl.load(p_least_cell + block), looked_at, V)
    kept = (_bins_of(x, top, fineness) < tl.minimum(first_by_k, first_by_p)) & (x >= least)
    kept = found & (kept | (_places(x, o_v) >= last_place))
    return _pick(tl.where(kept, weights_of(x, top, drawn), 0), o_v, before, target)


@triton.jit
def _draw_from_all(
    p_x, p_top, p_mass, u, top, drawn, V: tl.constexpr, NB: tl.constexpr, NBP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw from everything: a block by the blocks' masses, then a token of it."""
    o_n = tl.arange(0, NBP)
    tops = tl.load(p_top + o_n, mask=o_n < NB, other=float("-inf"))
    masses = tl.load(p_mass + o_n, mask=o_n < NB, other=0.0).to(tl.float64)
    masses *= tl.exp2((tops - top) * drawn).to(tl.float64)
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
    weights = weights_of(x, own_top, drawn)
    inner = (target - before) / mass * tl.sum(weights, 0).to(tl.float64)
    return _pick(weights, o_v, 0, inner)


@triton.jit
def _best(p_top, p_best_id, top, V: tl.constexpr, NB: tl.constexpr, NBP: tl.constexpr):
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
    p_x = _source(p_logits, p_merged, p_scores, p_ints, G, i_g, V, True)
    p_m = _source(p_logits, p_merged, p_scores, p_ints, G, i_g, V, False)
    top_k, top_p, _, is_rwkv, drawn, looked_at = load_sampling(p_ints, p_floats, G, i_g)
    is_nested = (top_k > 0) & (is_rwkv == 0)
    top_k = tl.where(top_k > 0, top_k, HIGHEST_ID)
    seed = tl.load(p_seeds + i_g)
    choice = tl.load(p_ints + CHOICE * G + i_g)
    # The kernel before this one lets it start only when the one before that is done: what the
    # merge has written can be read early, unless the merge itself is the kernel before.
    if not TRUNCATE:
        wait(PDL)
    p_plan += i_g * PLAN
    top = _fetch(p_plan)
    log_mass = _fetch(p_plan + 1)
    position = _fetch(p_ints + POSITION * G + i_g)
    word = tl.philox(seed, position, choice, 0, 0)[0]
    u = tl.uint_to_uniform_float(word).to(tl.float64)
    is_mine = i_p == 0
    if TRUNCATE:
        whole = _fetch(p_plan + 2).to(tl.float64) * ONE
        least = _fetch(p_plan + 3)
        fineness = _fetch(p_plan + 4)
        num = tl.where(num_rows > 0, _fetch(p_num_candidates + i_g), 0)
        p_least_cell += i_g * NB
        p_c = p_candidates + i_g.to(tl.int64) * V
        p_c_ids = p_candidate_ids + i_g.to(tl.int64) * V
        p_bracket += i_g * BRACKET
        p_sums += i_g * NB
        wait(PDL)
        if num > PAIRS:
            first_by_k = _fetch(p_bracket + FIRST_BY_K)
            last_by_k = _fetch(p_bracket + LAST_BY_K)
            first_by_p = _fetch(p_bracket + FIRST_BY_P)
            last_by_p = _fetch(p_bracket + LAST_BY_P)
            for i_b in range(i_p * per, tl.minimum(i_p * per + per, NB)):
                _gather_undecided(
                    p_x, p_least_cell, p_c, p_c_ids, p_num_undecided + i_g, p_sums, G * NB, i_b,
                    first_by_k, last_by_k, first_by_p, last_by_p, is_nested, least, top, fineness,
                    looked_at, drawn, V, BLOCK,
                )  # fmt: skip
            is_mine = is_last(p_arrived + i_g, (NB + per - 1) // per)
    if is_mine:
        token = -1
        if num_rows > 0:
            if is_finite(top):
                if drawn == 0:
                    token = _best(p_top + i_g * NB, p_best_id + i_g * NB, top, V, NB, NBP)
                elif TRUNCATE and num > PAIRS:
                    token = _draw_from_many(
                        p_x, p_least_cell, p_c, p_c_ids, p_num_undecided + i_g, p_sums, p_bracket,
                        G * NB, u, top_k, top_p, is_nested, whole, least, top, fineness, looked_at,
                        drawn, V, NB, NBP, BLOCK, PAIRS, WIDTH, TILE,
                    )  # fmt: skip
                elif TRUNCATE and num > FEW:
                    token = _draw_from_few(
                        p_c, p_c_ids, num, u, top_k, top_p, is_nested, whole, least, top,
                        looked_at, drawn, PAIRS, WIDTH,
                    )  # fmt: skip
                elif TRUNCATE and num > 0:
                    token = _draw_from_few(
                        p_c, p_c_ids, num, u, top_k, top_p, is_nested, whole, least, top,
                        looked_at, drawn, FEW, FEW,
                    )  # fmt: skip
                else:
                    token = _draw_from_all(
                        p_x, p_top + i_g * NB, p_mass + i_g * NB, u, top, drawn, V, NB, NBP, BLOCK
                    )
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
