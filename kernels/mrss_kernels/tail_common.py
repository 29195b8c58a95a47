# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""What the kernels of a step's tail share: fields by number, weights as integers, who is last.

Nothing here is a kernel. `tail.launch_tail` launches those of `allowed_tokens`, `gate_rows`,
`merge_rows`, `find_candidates` and `draw_token`, in this order. Letters: G requests that there is
room for, V tokens in NB blocks of BLOCK, NBP the power of two from NB on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.tail_tensors import (
    FLOAT_FIELDS,
    GATES,
    INT_FIELDS,
    NUM_BINS,
    NUM_LEVELS,
    NUM_PARTS,
    ORDERS,
    RULES,
)

LINEAR: tl.constexpr = tl.constexpr(RULES.index("linear"))
GEOMETRIC: tl.constexpr = tl.constexpr(RULES.index("geometric"))
PRODUCT: tl.constexpr = tl.constexpr(RULES.index("product"))
POWER: tl.constexpr = tl.constexpr(RULES.index("power"))
DELTA: tl.constexpr = tl.constexpr(RULES.index("delta"))
CONTRAST: tl.constexpr = tl.constexpr(RULES.index("contrast"))
ROUTE: tl.constexpr = tl.constexpr(RULES.index("route"))
FIXED: tl.constexpr = tl.constexpr(GATES.index("fixed"))
NOVELTY: tl.constexpr = tl.constexpr(GATES.index("novelty"))
CONFIDENCE: tl.constexpr = tl.constexpr(GATES.index("confidence"))
LEARNED: tl.constexpr = tl.constexpr(GATES.index("learned"))
POSTERIOR_NOVELTY: tl.constexpr = tl.constexpr(GATES.index("posterior-novelty"))
RWKV: tl.constexpr = tl.constexpr(ORDERS.index("rwkv"))

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
GATE_ROW: tl.constexpr = tl.constexpr(INT_FIELDS.index("gate_row"))
ALLOWED_ROW: tl.constexpr = tl.constexpr(INT_FIELDS.index("allowed_row"))
CUT: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("cut"))
TEMPERATURE: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("temperature"))
TOP_P: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("top_p"))
MIN_P: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("min_p"))
REPETITION: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("repetition"))
PRESENCE: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("presence"))
FREQUENCY: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("frequency"))
DECAY: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("decay"))
EXPONENT: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("exponent"))
TAU: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("tau"))
SHARPNESS: tl.constexpr = tl.constexpr(FLOAT_FIELDS.index("sharpness"))

# The engine's constants; the checks of the kernels compare with the engine itself.
LOG_PROB_FLOOR: tl.constexpr = tl.constexpr(-30.0)
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
# Where a request's numbers are in `p_plan`: largest score, log-sum-exp of the merge, mass, least
# score that min-p keeps, bins a unit of score.
PLAN: tl.constexpr = tl.constexpr(8)
PLAN_TOP: tl.constexpr = tl.constexpr(0)
PLAN_LOG_MASS: tl.constexpr = tl.constexpr(1)
PLAN_MASS: tl.constexpr = tl.constexpr(2)
PLAN_LEAST: tl.constexpr = tl.constexpr(3)
PLAN_BINS_PER_UNIT: tl.constexpr = tl.constexpr(4)
BINS: tl.constexpr = tl.constexpr(NUM_BINS)
PARTS: tl.constexpr = tl.constexpr(NUM_PARTS)


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
def cells_per_unit(scale):
    # At tiny temperatures the grid gets coarser rather than leave int32.
    return tl.minimum(scale / OCTAVES, 1048576.0)


@triton.jit
def cells(score, scale):
    """Return a score's height on a grid that all blocks share, int32, monotone in the score."""
    height = score * cells_per_unit(scale)
    return tl.floor(tl.clamp(height, -536870912.0, 536870912.0)).to(tl.int32)


@triton.jit
def fetch(p):
    # Past the L1, where a line may be older than what another multiprocessor has written since.
    return tl.load(p, cache_modifier=".cg")


@triton.jit
def load_parts(p, o_n, NB: tl.constexpr, other):
    # Past the L1, as `fetch`.
    return tl.load(p + o_n, mask=o_n < NB, other=other, cache_modifier=".cg")


@triton.jit
def is_banned(p_banned, p_bias, bias_row, o_v, m_v, V: tl.constexpr):
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
def floored(log_prob):
    # Not a maximum, which would drop a NaN.
    return tl.where(log_prob < LOG_PROB_FLOOR, LOG_PROB_FLOOR, log_prob)
