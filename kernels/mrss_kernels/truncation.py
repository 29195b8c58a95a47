# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Exact truncation by top-k, top-p and min-p, without a sort.

Of few candidates each is compared with all others. Of many most are decided by their bins; those
in the bins in which top-k or top-p ends (`Bracket`) are listed by the programs of a request, and
decided by its last one: all compared with all or, if they are too many, by a search. No kernel
here: `draw_token.draw_token_kernel` calls these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.candidates import (
    COUNT_ABOVE_K,
    HIGHEST_PLACE,
    LOWEST_PLACE,
    bins_of,
    ids_of,
    load_block,
    load_listed,
    places_of,
)
from mrss_kernels.tail_common import fetch, weights_of

# Count and mass of what is ahead of a token, in one integer: the mass of 2^8 tokens is below 2^53,
# and how many they are stands above it.
RANK_BITS: tl.constexpr = tl.constexpr(53)
RANK_ONE: tl.constexpr = tl.constexpr(1 << 53)
RANK_MASS: tl.constexpr = tl.constexpr((1 << 53) - 1)


@triton.jit
def truncate_few(p_listed, p_ids, num, sampling, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Compare at most ROWS candidates all with all, WIDTH after WIDTH.

    Returns:
        Their places, the lowest beyond the list's end, and the weights they are drawn by; 0 where
        they are not kept.
    """
    top, scale = sampling.top, sampling.scale
    x, place = load_listed(p_listed, p_ids, tl.arange(0, ROWS), num)
    sums = tl.zeros([ROWS, WIDTH], tl.int64)
    for j in range(0, num, WIDTH):
        other, other_place = load_listed(p_listed, p_ids, j + tl.arange(0, WIDTH), num)
        part = weights_of(other, top, scale) + RANK_ONE
        sums += tl.where(other_place[None, :] > place[:, None], part[None, :], 0)
    ahead = tl.sum(sums, 1)
    kept = (place > LOWEST_PLACE) & (ahead >> RANK_BITS < sampling.top_k)
    whole = sampling.mass
    if sampling.is_nested:
        whole = tl.sum(tl.where(kept, weights_of(x, top, scale), 0), 0).to(tl.float64)
    want = tl.where(sampling.top_p < 1.0, whole * sampling.top_p, float("inf"))
    kept = kept & ((ahead & RANK_MASS).to(tl.float64) < want) & (x >= sampling.least)
    return place, tl.where(kept, weights_of(x, top, sampling.draw_scale), 0)


@triton.jit
def _is_between(bins, first, last):
    """Tell which bins are `first` to `last`."""
    return (bins >= first) & (bins <= last)


@triton.jit
def gather_undecided(
    p_x, p_least_cell, p_listed, p_ids, p_num_listed, p_sums, stride, i_b, bracket, sampling,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up what a block keeps for certain, and list what is not decided.

    Into `p_sums` [3, G, NB]: the mass to draw from, the mass in bins before those in which top-p
    ends and, if nested, before those in which top-k ends. The list's order depends on which block
    comes first, and nothing on that order.
    """
    top = sampling.top
    o_v = i_b * BLOCK + tl.arange(0, BLOCK)
    x, found = load_block(p_x, o_v, tl.load(p_least_cell + i_b), sampling.scale, V)
    bins = bins_of(x, top, sampling.bins_per_unit)
    first = tl.minimum(bracket.first_by_k, bracket.first_by_p)
    certain = found & (bins < first) & (x >= sampling.least)
    weights = weights_of(x, top, sampling.scale)
    p_drawn = p_sums + i_b
    drawn = tl.where(certain, weights_of(x, top, sampling.draw_scale), 0)
    tl.store(p_drawn, tl.sum(drawn, 0))
    above_p = tl.where(found & (bins < bracket.first_by_p), weights, 0)
    tl.store(p_sums + stride + i_b, tl.sum(above_p, 0))
    if sampling.is_nested:
        above_k = tl.where(found & (bins < bracket.first_by_k), weights, 0)
        tl.store(p_sums + 2 * stride + i_b, tl.sum(above_k, 0))
    by_k = _is_between(bins, bracket.first_by_k, bracket.last_by_k)
    by_p = _is_between(bins, bracket.first_by_p, bracket.last_by_p)
    # What one of them drops for certain the other need not decide, unless it counts its mass.
    last = tl.minimum(bracket.last_by_k, bracket.last_by_p)
    last = tl.where(sampling.is_nested, bracket.last_by_k, last)
    undecided = (found & (by_k | by_p) & (bins <= last)).to(tl.int32)
    num = tl.sum(undecided, 0)
    if num > 0:
        o_c = tl.atomic_add(p_num_listed, num, sem="relaxed") + tl.cumsum(undecided, 0) - 1
        tl.store(p_listed + o_c, x, mask=undecided > 0)
        tl.store(p_ids + o_c, o_v, mask=undecided > 0)


@triton.jit
def _listed_within(place, bins, first, last):
    """Tell which entries lie in the bins `first` to `last`, and not beyond the list's end."""
    return (place > LOWEST_PLACE) & (bins >= first) & (bins <= last)


@triton.jit
def _compare(
    p_listed, p_ids, num, count_above_k, mass_above_k, mass_above_p, bracket, sampling,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the last places that top-k and top-p keep of at most ROWS entries.

    All are compared with all, WIDTH after WIDTH.
    """
    top, bins_per_unit, scale = sampling.top, sampling.bins_per_unit, sampling.scale
    x, place = load_listed(p_listed, p_ids, tl.arange(0, ROWS), num)
    bins = bins_of(x, top, bins_per_unit)
    sums = tl.zeros([ROWS, WIDTH], tl.int64)
    for j in range(0, num, WIDTH):
        other, other_place = load_listed(p_listed, p_ids, j + tl.arange(0, WIDTH), num)
        other_bins = bins_of(other, top, bins_per_unit)
        by_p = _is_between(other_bins, bracket.first_by_p, bracket.last_by_p)
        by_k = _is_between(other_bins, bracket.first_by_k, bracket.last_by_k)
        part = tl.where(by_p, weights_of(other, top, scale), 0)
        part += by_k.to(tl.int64) << RANK_BITS
        sums += tl.where(other_place[None, :] > place[:, None], part[None, :], 0)
    ahead = tl.sum(sums, 1)
    by_k = _listed_within(place, bins, bracket.first_by_k, bracket.last_by_k)
    by_k = by_k & (count_above_k + (ahead >> RANK_BITS) < sampling.top_k)
    whole = sampling.mass
    if sampling.is_nested:
        mass = mass_above_k + tl.sum(tl.where(by_k, weights_of(x, top, scale), 0), 0)
        whole = mass.to(tl.float64)
    by_p = _listed_within(place, bins, bracket.first_by_p, bracket.last_by_p)
    by_p = by_p & ((mass_above_p + (ahead & RANK_MASS)).to(tl.float64) < whole * sampling.top_p)
    last_by_k = tl.min(tl.where(by_k, place, HIGHEST_PLACE), 0)
    return last_by_k, tl.min(tl.where(by_p, place, HIGHEST_PLACE), 0)


@triton.jit
def _load_measured(p_listed, p_ids, o_c, num, first, last, sampling, BY_COUNT: tl.constexpr):
    """Return places of entries in the bins `first` to `last`, and what a search adds up there.

    That is 1 an entry, or its weight. Other entries have the lowest place and nothing.
    """
    x, place = load_listed(p_listed, p_ids, o_c, num)
    bins = bins_of(x, sampling.top, sampling.bins_per_unit)
    within = _listed_within(place, bins, first, last)
    if BY_COUNT:
        measures = within.to(tl.int64)
    else:
        measures = tl.where(within, weights_of(x, sampling.top, sampling.scale), 0)
    return tl.where(within, place, LOWEST_PLACE), measures


@triton.jit
def _search(
    p_listed, p_ids, num, want, above, first, last, sampling, BY_COUNT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Find the last place in the bins `first` to `last` that has less than `want` ahead of it.

    Divides the interval of places, and shrinks it each time to places that occur.

    Returns:
        The place; the highest one of all if there is nothing in these bins.
    """
    o_c = tl.arange(0, TILE)
    lows = tl.full([TILE], HIGHEST_PLACE, tl.int64)
    highs = tl.full([TILE], LOWEST_PLACE, tl.int64)
    sums = tl.zeros([TILE], tl.int64)
    for c in range(0, num, TILE):
        place, measures = _load_measured(
            p_listed, p_ids, c + o_c, num, first, last, sampling, BY_COUNT
        )
        lows = tl.minimum(lows, tl.where(place > LOWEST_PLACE, place, HIGHEST_PLACE))
        highs = tl.maximum(highs, place)
        sums += measures
    low = tl.min(lows, 0)
    high = tl.max(highs, 0)
    # Invariant: from `low` on there is enough, from `high + 1` on there is not.
    enough = above + tl.sum(sums, 0)
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
        lows = tl.full([TILE], HIGHEST_PLACE, tl.int64)
        highs = tl.full([TILE], LOWEST_PLACE, tl.int64)
        sums = tl.zeros([TILE], tl.int64)
        for c in range(0, num, TILE):
            place, measures = _load_measured(
                p_listed, p_ids, c + o_c, num, first, last, sampling, BY_COUNT
            )
            sums += tl.where(place >= middle, measures, 0)
            lows = tl.minimum(lows, tl.where(place >= middle, place, HIGHEST_PLACE))
            highs = tl.maximum(highs, tl.where(place < middle, place, LOWEST_PLACE))
        found = above + tl.sum(sums, 0)
        if found.to(tl.float64) >= want:
            low = tl.min(lows, 0)
            enough = found
        else:
            high = tl.max(highs, 0)
            lacking = found
    return low


@triton.jit
def _last_places(
    p_listed, p_ids, num, p_sums, p_bracket, stride, bracket, sampling, NB: tl.constexpr,
    NBP: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the last places that top-k and top-p keep in the bins in which they end.

    From what `gather_undecided` has listed and added up. The highest place of all says that they
    keep nothing there.
    """
    count_above_k = fetch(p_bracket + COUNT_ABOVE_K).to(tl.int64)
    o_n = tl.arange(0, NBP)
    m_n = o_n < NB
    parts = tl.load(p_sums + stride + o_n, mask=m_n, other=0, cache_modifier=".cg")
    mass_above_p = tl.sum(parts, 0)
    mass_above_k = tl.full([], 0, tl.int64)
    if sampling.is_nested:
        parts = tl.load(p_sums + 2 * stride + o_n, mask=m_n, other=0, cache_modifier=".cg")
        mass_above_k = tl.sum(parts, 0)
    o_c = tl.arange(0, TILE)
    if num <= PAIRS:
        last_by_k, last_by_p = _compare(
            p_listed, p_ids, num, count_above_k, mass_above_k, mass_above_p, bracket, sampling,
            PAIRS, WIDTH,
        )  # fmt: skip
    else:
        first, last = bracket.first_by_k, bracket.last_by_k
        last_by_k = _search(
            p_listed, p_ids, num, sampling.top_k.to(tl.float64), count_above_k, first, last,
            sampling, True, TILE,
        )  # fmt: skip
        whole = sampling.mass
        if sampling.is_nested:
            sums = tl.zeros([TILE], tl.int64)
            for c in range(0, num, TILE):
                place, measures = _load_measured(
                    p_listed, p_ids, c + o_c, num, first, last, sampling, False
                )
                sums += tl.where(place >= last_by_k, measures, 0)
            whole = (mass_above_k + tl.sum(sums, 0)).to(tl.float64)
        last_by_p = _search(
            p_listed, p_ids, num, whole * sampling.top_p, mass_above_p, bracket.first_by_p,
            bracket.last_by_p, sampling, False, TILE,
        )  # fmt: skip
    return last_by_k, last_by_p


@triton.jit
def decide_undecided(
    p_listed, p_ids, num, p_sums, p_bracket, stride, bracket, sampling, NB: tl.constexpr,
    NBP: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Add the masses of what is kept of the list to those of its blocks in `p_sums`.

    Returns:
        The last place that is kept of the list; the highest one of all if nothing is.
    """
    last_by_k, last_by_p = _last_places(
        p_listed, p_ids, num, p_sums, p_bracket, stride, bracket, sampling, NB, NBP, PAIRS, WIDTH,
        TILE,
    )  # fmt: skip
    o_c = tl.arange(0, TILE)
    last_places = tl.full([TILE], HIGHEST_PLACE, tl.int64)
    for c in range(0, num, TILE):
        x, place = load_listed(p_listed, p_ids, c + o_c, num)
        bins = bins_of(x, sampling.top, sampling.bins_per_unit)
        kept = (place > LOWEST_PLACE) & (x >= sampling.least)
        by_k = (bins < bracket.first_by_k) | ((bins <= bracket.last_by_k) & (place >= last_by_k))
        kept = kept & by_k
        by_p = (bins < bracket.first_by_p) | ((bins <= bracket.last_by_p) & (place >= last_by_p))
        kept = kept & by_p
        last_places = tl.minimum(last_places, tl.where(kept, place, HIGHEST_PLACE))
        weights = weights_of(x, sampling.top, sampling.draw_scale)
        tl.atomic_add(p_sums + ids_of(place) // BLOCK, weights, mask=kept, sem="relaxed")
    return tl.min(last_places, 0)


@triton.jit
def truncate_block(
    p_x, p_least_cell, i_b, last_place, bracket, sampling, V: tl.constexpr, BLOCK: tl.constexpr
):
    """Return ids of a block, and the weights they are drawn by; 0 where they are not kept."""
    o_v = i_b * BLOCK + tl.arange(0, BLOCK)
    x, found = load_block(p_x, o_v, tl.load(p_least_cell + i_b), sampling.scale, V)
    bins = bins_of(x, sampling.top, sampling.bins_per_unit)
    first = tl.minimum(bracket.first_by_k, bracket.first_by_p)
    certain = (bins < first) & (x >= sampling.least)
    kept = found & (certain | (places_of(x, o_v) >= last_place))
    return o_v, tl.where(kept, weights_of(x, sampling.top, sampling.draw_scale), 0)
