# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""From the logits of a request's rows to one row of scores, and what a draw needs to know of it.

Three kernels, each over blocks of the vocabulary and requests: masses of the rows, divergences
from the base (for gates that want them), and the merge with penalties and bias. The last block of
a request to arrive adds the blocks' parts up, in their order. `tail.launch_tail` launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.tail_tensors import FLOAT_FIELDS, INT_FIELDS, NUM_BINS, NUM_LEVELS

LINEAR: tl.constexpr = tl.constexpr(0)
GEOMETRIC: tl.constexpr = tl.constexpr(1)
DELTA: tl.constexpr = tl.constexpr(2)
NOVELTY: tl.constexpr = tl.constexpr(1)
RWKV: tl.constexpr = tl.constexpr(1)

FIRST_ROW: tl.constexpr = tl.constexpr(INT_FIELDS.index("first_row"))
NUM_ROWS: tl.constexpr = tl.constexpr(INT_FIELDS.index("num_rows"))
NEXT_ROW: tl.constexpr = tl.constexpr(INT_FIELDS.index("next_row"))
RULE: tl.constexpr = tl.constexpr(INT_FIELDS.index("rule"))
GATE: tl.constexpr = tl.constexpr(INT_FIELDS.index("gate"))
BASE_NAMED: tl.constexpr = tl.constexpr(INT_FIELDS.index("base_named"))
KEEP_MERGED: tl.constexpr = tl.constexpr(INT_FIELDS.index("keep_merged"))
TOP_K: tl.constexpr = tl.constexpr(INT_FIELDS.index("top_k"))
ORDER: tl.constexpr = tl.constexpr(INT_FIELDS.index("order"))
CHOICE: tl.constexpr = tl.constexpr(INT_FIELDS.index("choice"))
POSITION: tl.constexpr = tl.constexpr(INT_FIELDS.index("position"))
COUNT_ROW: tl.constexpr = tl.constexpr(INT_FIELDS.index("count_row"))
BIAS_ROW: tl.constexpr = tl.constexpr(INT_FIELDS.index("bias_row"))
CUT: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("cut"))
TEMPERATURE: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("temperature"))
TOP_P: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("top_p"))
MIN_P: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("min_p"))
REPETITION: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("repetition"))
PRESENCE: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("presence"))
FREQUENCY: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("frequency"))
DECAY: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("decay"))

# The engine's constants; the checks of the kernels compare with the engine itself.
LOG_PROB_FLOOR: tl.constexpr = tl.constexpr(-30.0)
NOVELTY_TEMPERATURE: tl.constexpr = tl.constexpr(0.3)
MAX_DIVERGENCE: tl.constexpr = tl.constexpr(8.0)
MIN_DIVERGENCE: tl.constexpr = tl.constexpr(1e-4)
MIN_TEMPERATURE: tl.constexpr = tl.constexpr(1e-30)

LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# 2^18 weights of at most 1 stay below 2^63.
ONE: tl.constexpr = tl.constexpr(17592186044416.0)
LEVELS: tl.constexpr = tl.constexpr(NUM_LEVELS)
# Octaves of weight from one level to the next: a request that keeps n tokens looks at those n and
# at what is less than two octaves below them, and 8 levels reach 12 octaves down.
OCTAVES: tl.constexpr = tl.constexpr(2.0)
# Below so many levels from the top everything is a candidate.
MAX_DEPTH: tl.constexpr = tl.constexpr(16)
# A block's masses above its levels are integers, rounded down, in this part of its tokens' number:
# a warp adds integers up in one instruction.
LEVEL_ONE: tl.constexpr = tl.constexpr(1073741824)
# The levels are added up in fp32; what they decide leaves room for that rounding.
MARGIN: tl.constexpr = tl.constexpr(1.00001)
# Where a request's numbers are in `p_plan`: largest score, log-sum-exp of the merge, mass, what
# min-p leaves, bins a unit of score.
PLAN: tl.constexpr = tl.constexpr(8)
BINS: tl.constexpr = tl.constexpr(NUM_BINS)


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the kernel before; then let the next one start, which finds all older ones done.

    Every program must call it, also one that has nothing to do: a kernel in which nobody waits
    would let its successor overtake its predecessor.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def exp(x):
    """e^x of a difference of logits, 0 for -inf."""
    return tl.exp2(x * LOG2E)


@triton.jit
def anchor(m):
    """What to subtract before exp: `m`, the largest, or 0 where nothing is possible."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def load_sampling(p_ints, p_floats, G, i_g):
    """Return a request's top_k, top_p, min_p, whether its order is RWKV's, and two scales.

    A scale is octaves of weight a unit of score: of what is drawn from (0 for a greedy request),
    and of the distribution that truncation looks at.
    """
    top_k = tl.load(p_ints + TOP_K * G + i_g)
    top_p = tl.load(p_floats + TOP_P * G + i_g)
    min_p = tl.load(p_floats + MIN_P * G + i_g)
    is_rwkv = tl.load(p_ints + ORDER * G + i_g) == RWKV
    temperature = tl.load(p_floats + TEMPERATURE * G + i_g)
    is_greedy = temperature < MIN_TEMPERATURE
    drawn = tl.where(is_greedy, 0.0, LOG2E / tl.where(is_greedy, 1.0, temperature))
    return top_k, top_p, min_p, is_rwkv, drawn, tl.where(is_rwkv, LOG2E, drawn)


@triton.jit
def weights_of(x, top, scale):
    """Return weights as integers: 2^44 for the score `top`, 0 below 2^-44 of its weight.

    Their sums have the same bits in any order, so in every variant of a kernel.
    """
    return (tl.exp2((x - top) * scale) * ONE).to(tl.int64)


@triton.jit
def _mass(x, top, scale):
    """Return the sum of a block's weights, where that of `top` is 1."""
    return tl.sum(weights_of(x, anchor(top), scale), 0).to(tl.float32) / ONE


@triton.jit
def _cells_per_unit(scale):
    # At tiny temperatures the grid gets coarser rather than leave int32.
    return tl.minimum(scale / OCTAVES, 1048576.0)


@triton.jit
def cells(score, scale):
    """Return a score's height on a grid that all blocks share, int32, monotone in the score."""
    height = score * _cells_per_unit(scale)
    return tl.floor(tl.clamp(height, -536870912.0, 536870912.0)).to(tl.int32)


@triton.jit
def load_parts(p, o_n, NB: tl.constexpr, other):
    # Past the L1, where a line may be older than what another multiprocessor has written since.
    return tl.load(p + o_n, mask=o_n < NB, other=other, cache_modifier=".cg")


@triton.jit
def _is_banned(p_banned, p_bias, bias_row, o_v, m_v, V: tl.constexpr):
    banned = tl.load(p_banned + o_v, mask=m_v, other=0) != 0
    if bias_row >= 0:
        bias = tl.load(p_bias + bias_row.to(tl.int64) * V + o_v, mask=m_v, other=0.0)
        banned = banned | (bias == float("-inf"))
    return banned


@triton.jit
def is_last(p_arrived, number):
    """Count this program in; tell the last of a request, which then sees what all have stored."""
    tl.debug_barrier()
    last = tl.atomic_add(p_arrived, 1, sem="acq_rel") == number - 1
    if last:
        tl.store(p_arrived, 0)
    tl.debug_barrier()
    return last


@triton.jit
def _row_weights(rule, weights, o_k):
    """Return what the merge multiplies each row with, from gated weights [KB]."""
    strengths = tl.where(o_k == 0, 0.0, weights)
    shares = tl.where(o_k == 0, 1.0 - tl.sum(strengths, 0), weights)
    return tl.where(rule == DELTA, shares, weights)


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
        banned = _is_banned(p_banned, p_bias, bias_row, o_v, m_v, V)
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
            tl.store(p_row_weight + first + o_k, _row_weights(rule, named, o_k), mask=m_k)


@triton.jit
def _floored(log_prob):
    # Not a maximum, which would drop a NaN.
    return tl.where(log_prob < LOG_PROB_FLOOR, LOG_PROB_FLOOR, log_prob)


@triton.jit
def _novelty(rule, divergence, named):
    """Return the gated weights [KB] from divergences from the base; padding has weight 0."""
    if rule == DELTA:
        largest = tl.max(divergence, 0)
        agreed = named / tl.sum(named, 0)
        speaking = named * (divergence / tl.maximum(largest, MIN_DIVERGENCE))
        weights = tl.where(largest < MIN_DIVERGENCE, agreed, speaking)
    else:
        clipped = tl.where(divergence > MAX_DIVERGENCE, MAX_DIVERGENCE, divergence)
        logits = tl.log(named) + clipped / NOVELTY_TEMPERATURE
        weights = exp(logits - tl.max(logits, 0))
        weights = weights / tl.sum(weights, 0)
    return weights


@triton.jit
def divergence_kernel(
    p_logits,
    p_ints,
    p_named,
    p_row_max,
    p_row_mass,
    p_row_log_mass,
    p_part,
    p_arrived,
    p_row_weight,
    G,
    V: tl.constexpr,
    NB: tl.constexpr,
    NBP: tl.constexpr,
    BLOCK: tl.constexpr,
    KB: tl.constexpr,
    KT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (NB, requests). Of requests with the gate `novelty`: `KL(row || row 0)`, the weights."""
    i_b = tl.program_id(0)
    i_g = tl.program_id(1)
    first = tl.load(p_ints + FIRST_ROW * G + i_g).to(tl.int64)
    num_rows = tl.load(p_ints + NUM_ROWS * G + i_g)
    gate = tl.load(p_ints + GATE * G + i_g)
    o_v = i_b * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < V
    wait(PDL)
    if (num_rows > 1) & (gate == NOVELTY):
        base = tl.load(p_logits + first * V + o_v, mask=m_v, other=float("-inf"))
        base = _floored(base - tl.load(p_row_log_mass + first))
        for k in range(0, num_rows, KT):
            o_k = k + tl.arange(0, KT)
            m_k = o_k < num_rows
            log_mass = tl.load(p_row_log_mass + first + o_k, mask=m_k, other=0.0)
            p_z = p_logits + (first + o_k)[:, None] * V + o_v[None, :]
            z = tl.load(p_z, mask=m_k[:, None] & m_v[None, :], other=float("-inf"))
            log_prob = z - log_mass[:, None]
            # The mass is exact where the log-mass, some tens, has lost a few bits.
            top = tl.load(p_row_max + first + o_k, mask=m_k, other=0.0)
            mass = tl.load(p_row_mass + first + o_k, mask=m_k, other=1.0)
            gain = exp(z - top[:, None]) * (_floored(log_prob) - base[None, :])
            tl.store(p_part + (first + o_k) * NB + i_b, tl.sum(gain, 1) / mass, mask=m_k)
        if is_last(p_arrived + i_g, NB):
            o_k = tl.arange(0, KB)
            m_k = o_k < num_rows
            o_n = tl.arange(0, NBP)
            at = (first + o_k)[:, None] * NB + o_n[None, :]
            m_p = m_k[:, None] & (o_n < NB)[None, :]
            parts = tl.load(p_part + at, mask=m_p, other=0.0, cache_modifier=".cg")
            divergence = tl.sum(parts, 1)
            # A NaN stays one.
            divergence = tl.where(divergence < 0, 0.0, divergence)
            rule = tl.load(p_ints + RULE * G + i_g)
            named = tl.load(p_named + first + o_k, mask=m_k, other=0.0)
            weights = _row_weights(rule, _novelty(rule, divergence, named), o_k)
            tl.store(p_row_weight + first + o_k, weights, mask=m_k)


@triton.jit
def _add_rows(rule, z, top, mass, log_mass, weight, m_k, heard, total, best):
    """Add KT rows to a rule's two running values [BLOCK]. A new rule: a branch here and below.

    Args:
        rule: index in `RULES`.
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
    elif rule == GEOMETRIC:
        # 0 * -inf is no number, and a row without weight has no veto.
        said = tl.where((weight > 0)[:, None], z, 0.0)
        total += tl.sum(said * weight[:, None], 0)
    else:
        log_prob = z - log_mass[:, None]
        total += tl.sum(tl.where(m_k[:, None], _floored(log_prob), 0.0) * weight[:, None], 0)
        best = tl.maximum(best, tl.max(tl.where(heard[:, None], log_prob, float("-inf")), 0))
    return total, best


@triton.jit
def _finish_rule(rule, total, best, mean_log_mass, likeliest, cut):
    """Return the merged logits [BLOCK] from a rule's running values.

    Args:
        rule: index in `RULES`.
        total: as `_add_rows` left it.
        best: as `_add_rows` left it.
        mean_log_mass: the rows' log-masses, weighted: the usual scale of the logits.
        likeliest: the largest log-probability of any row that the cut looks at.
        cut: in [0, 1).
    """
    if rule == LINEAR:
        # Where every probability underflowed, the largest term stands for the sum. A NaN stays.
        summed = tl.log(total)
        x = tl.where(summed < best, best, summed) + mean_log_mass
    elif rule == GEOMETRIC:
        x = total
    else:
        # At `cut` 0 the threshold is the lowest float: only what all rows ban is below it.
        least = tl.maximum(likeliest + tl.log(cut), LOWEST)
        x = tl.where(best >= least, total + mean_log_mass, float("-inf"))
    return x


@triton.jit
def _merge(
    p_logits, p_row_max, p_row_mass, p_row_log_mass, p_row_weight, first, num_rows, rule, cut,
    base_named, o_v, m_v, V: tl.constexpr, BLOCK: tl.constexpr, KT: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
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
        total, best = _add_rows(rule, z, top, mass, log_mass, weight, m_k, heard, total, best)
        mean_log_mass += tl.sum(weight * log_mass, 0)
        peak = tl.where(heard, top - log_mass, float("-inf"))
        likeliest = tl.maximum(likeliest, tl.max(peak, 0))
    return _finish_rule(rule, total, best, mean_log_mass, likeliest, cut)


@triton.jit
def _one_row(p_logits, p_banned, p_bias, first, bias_row, o_v, m_v, V: tl.constexpr):
    """Return the only row of a request, bit for bit; banned ids become -inf there as well."""
    p_z = p_logits + first * V + o_v
    x = tl.load(p_z, mask=m_v, other=float("-inf"))
    banned = _is_banned(p_banned, p_bias, bias_row, o_v, m_v, V)
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
    tl.store(p_plan, tl.where(usable, top, float("-inf")))
    tl.store(p_plan + 1, merged_top + tl.log(mass))
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
            tl.store(p_plan + 2, total)
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
            tl.store(p_plan + 3, least)
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
                floor = (highest - depth).to(tl.float32) / _cells_per_unit(scale)
                bottom = tl.maximum(bottom, floor)
            tl.store(p_plan + 4, 1.0 / tl.maximum(top - bottom, 1e-30) * (BINS - 0.5))
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
    p_bias,
    p_banned,
    p_counts,
    p_marks,
    p_row_max,
    p_row_mass,
    p_row_log_mass,
    p_row_weight,
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
                rule = tl.load(p_ints + RULE * G + i_g)
                base_named = tl.load(p_ints + BASE_NAMED * G + i_g)
                cut = tl.load(p_floats + CUT * G + i_g)
                x = _merge(
                    p_logits, p_row_max, p_row_mass, p_row_log_mass, p_row_weight, first,
                    num_rows, rule, cut, base_named, o_v, m_v, V, BLOCK, KT,
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
