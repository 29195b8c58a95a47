# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Candidates of the requests that truncate: a few are copied, many are counted in bins.

One kernel over blocks of the vocabulary and requests; `tail.launch_tail` launches it. Where there
are many, a request's last program finds the bins in which top-k and top-p end (`Bracket`), and
`truncation` the tokens. Counts and masses are integers: no order of adding changes a bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.candidates import (
    BRACKET,
    COUNT_ABOVE_K,
    FIRST_BY_K,
    FIRST_BY_P,
    LAST_BY_K,
    LAST_BY_P,
    bins_of,
    load_block,
    scores_of,
)
from mrss_kernels.tail_common import (
    BINS,
    NUM_ROWS,
    ONE,
    PLAN,
    PLAN_BINS_PER_UNIT,
    PLAN_MASS,
    PLAN_TOP,
    is_last,
    load_sampling,
    wait,
    weights_of,
)

# A bin has a count above these bits and below them a mass in units of 2^-25: 2^18 weights of at
# most 1 stay below 2^44, and the whole below 2^63.
BIN_BITS: tl.constexpr = tl.constexpr(44)
BIN_ONE: tl.constexpr = tl.constexpr(1 << 44)
BIN_MASS: tl.constexpr = tl.constexpr((1 << 44) - 1)
BIN_UNIT_BITS: tl.constexpr = tl.constexpr(19)
BIN_UNIT: tl.constexpr = tl.constexpr(524288.0)


@triton.jit
def _find_bracket(p_bins, p_bracket, top_k, top_p, is_rwkv, total, CHUNK: tl.constexpr):
    """Find the bins in which top-k and top-p end, and empty all bins for the next step.

    The masses of bins are rounded down, by less than their count.
    """
    o_c = tl.arange(0, CHUNK)
    # Counts and masses from the first bin on: of the bins that top-k keeps, and of those that it
    # does not drop. A larger count has no smaller mass.
    least_by_k = tl.full([], 0, tl.int64)
    most_by_k = tl.full([], 0, tl.int64)
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
            least_by_k = tl.maximum(least_by_k, tl.max(tl.where(kept, through, 0), 0))
            most_by_k = tl.maximum(most_by_k, tl.max(tl.where(undropped, through, 0), 0))
            first_by_k = tl.minimum(first_by_k, tl.min(tl.where(kept, BINS, c + o_c), 0))
            last_by_k = tl.maximum(last_by_k, tl.max(tl.where(undropped, c + o_c, -1), 0))
            before += tl.sum(own, 0)
    # As `truncation` reckons, in the bins' unit: powers of two change no bit.
    least_want = total.to(tl.float64) * (ONE / BIN_UNIT)
    most_want = least_want
    if (top_k > 0) & (is_rwkv == 0):
        least_want = (least_by_k & BIN_MASS).to(tl.float64)
        most_want = ((most_by_k & BIN_MASS) + (most_by_k >> BIN_BITS)).to(tl.float64)
    least_want = tl.where(top_p < 1.0, least_want * top_p, float("inf"))
    most_want = tl.where(top_p < 1.0, most_want * top_p, float("inf"))
    first_by_p = tl.full([], BINS, tl.int32)
    last_by_p = tl.full([], -1, tl.int32)
    before = tl.full([], 0, tl.int64)
    for c in range(0, BINS, CHUNK):
        own = tl.load(p_bins + c + o_c, cache_modifier=".cg")
        through = before + tl.cumsum(own, 0)
        most_mass = (through & BIN_MASS) + (through >> BIN_BITS)
        kept = most_mass.to(tl.float64) < least_want
        undropped = ((through - own) & BIN_MASS).to(tl.float64) < most_want
        first_by_p = tl.minimum(first_by_p, tl.min(tl.where(kept, BINS, c + o_c), 0))
        last_by_p = tl.maximum(last_by_p, tl.max(tl.where(undropped, c + o_c, -1), 0))
        before += tl.sum(own, 0)
        # Behind the barriers of these sums, when every warp has read.
        tl.store(p_bins + c + o_c, tl.zeros([CHUNK], tl.int64))
    tl.store(p_bracket + FIRST_BY_K, first_by_k)
    tl.store(p_bracket + LAST_BY_K, last_by_k)
    tl.store(p_bracket + FIRST_BY_P, first_by_p)
    tl.store(p_bracket + LAST_BY_P, last_by_p)
    tl.store(p_bracket + COUNT_ABOVE_K, (least_by_k >> BIN_BITS).to(tl.int32))


@triton.jit
def _count_in_bins(p_bins, x, found, top, bins_per_unit, scale):
    """Add a block's candidates to the request's bins."""
    bins = bins_of(x, top, bins_per_unit)
    one = (weights_of(x, top, scale) >> BIN_UNIT_BITS) + BIN_ONE
    # Where scores have a floor, all that is at it lies in the last bin: too many for one address.
    is_low = bins == BINS - 1
    low = tl.sum(tl.where(found & is_low, one, 0), 0)
    tl.atomic_add(p_bins + bins, one, mask=found & (is_low == 0), sem="relaxed")
    tl.atomic_add(p_bins + (BINS - 1), low, mask=low > 0, sem="relaxed")


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
    p_x = scores_of(p_logits, p_merged, p_scores, p_ints, G, i_g, V, True)
    wait(PDL)
    num = 0
    if num_rows > 0:
        num = tl.load(p_num_candidates + i_g)
    if num > 0:
        p_plan += i_g * PLAN
        top = tl.load(p_plan + PLAN_TOP)
        bins_per_unit = tl.load(p_plan + PLAN_BINS_PER_UNIT)
        for i_b in range(i_p * per, tl.minimum(i_p * per + per, NB)):
            at = i_g * NB + i_b
            if tl.load(p_count + at) > 0:
                o_v = i_b * BLOCK + tl.arange(0, BLOCK)
                x, found = load_block(p_x, o_v, tl.load(p_least_cell + at), scale, V)
                if num <= PAIRS:
                    rank = tl.cumsum(found.to(tl.int32), 0) - 1
                    o_c = i_g.to(tl.int64) * V + tl.load(p_offset + at) + rank
                    tl.store(p_candidates + o_c, x, mask=found)
                    tl.store(p_candidate_ids + o_c, o_v, mask=found)
                else:
                    p_own = p_bins + i_g.to(tl.int64) * BINS
                    _count_in_bins(p_own, x, found, top, bins_per_unit, scale)
        # Not `and`: `is_last` would count programs of requests with nothing to bracket as well.
        if num > PAIRS:  # noqa: SIM102
            if is_last(p_arrived + i_g, (NB + per - 1) // per):
                _find_bracket(
                    p_bins + i_g.to(tl.int64) * BINS, p_bracket + i_g * BRACKET, top_k, top_p,
                    is_rwkv, tl.load(p_plan + PLAN_MASS), CHUNK,
                )  # fmt: skip
