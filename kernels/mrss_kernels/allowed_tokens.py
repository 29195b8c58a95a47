# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""What grammars leave of logits: tokens that may not come next become -inf, before gate and merge.

One kernel over blocks of the vocabulary and requests, the first of a step's tail. It only stores:
of the logits it reads those that mean the end. `tail.launch_tail` launches it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.tail_common import ALLOWED_ROW, FIRST_ROW, NUM_ROWS, anchor, exp, wait
from mrss_kernels.tail_tensors import MAX_ENDS

ENDS: tl.constexpr = tl.constexpr(MAX_ENDS)


@triton.jit
def _move_ends(p_row, ends):
    """Give token 0 the probability of `ends` [ENDS] as well (-1 is none), and them none."""
    is_end = ends >= 0
    others = tl.load(p_row + ends, mask=is_end, other=float("-inf"))
    own = tl.load(p_row)
    top = anchor(tl.maximum(tl.max(others, 0), own))
    mass = tl.sum(exp(others - top), 0) + exp(own - top)
    # Every warp has its own copy of what was loaded; none may store before all have loaded.
    tl.debug_barrier()
    tl.store(p_row, top + tl.log(mass))
    tl.store(p_row + ends, float("-inf"), mask=is_end)


@triton.jit
def allow_tokens_kernel(
    p_logits,
    p_ints,
    p_allowed,
    G,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (NB, requests). Of requests with a row of `allowed`: everything else becomes -inf."""
    WORDS: tl.constexpr = (V + 31) // 32
    i_b = tl.program_id(0)
    i_g = tl.program_id(1)
    first = tl.load(p_ints + FIRST_ROW * G + i_g).to(tl.int64)
    num_rows = tl.load(p_ints + NUM_ROWS * G + i_g)
    allowed_row = tl.load(p_ints + ALLOWED_ROW * G + i_g)
    o_v = i_b * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < V
    wait(PDL)
    if (num_rows > 0) & (allowed_row >= 0):
        p_own = p_allowed + allowed_row.to(tl.int64) * (WORDS + ENDS)
        words = tl.load(p_own + o_v // 32, mask=m_v, other=0)
        is_out = m_v & (((words >> (o_v % 32)) & 1) == 0)
        ends = tl.load(p_own + WORDS + tl.arange(0, ENDS))
        has_ends = (i_b == 0) & (tl.max(ends, 0) >= 0)
        for k in range(num_rows):
            p_row = p_logits + (first + k) * V
            if has_ends:
                _move_ends(p_row, ends)
            tl.store(p_row + o_v, float("-inf"), mask=is_out)
