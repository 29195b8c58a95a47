# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""RWKV-6's recurrence over whole sequences in blocks of tokens, in place in the pool.

What does not depend on the state is prepared for all blocks of `BLOCK_LEN` tokens at once; then, a
block after the other, one product reads the state and one writes it. Decays are not bounded, so
only those between two tokens are formed. Derivation: kernels/README.md. Oracle:
`mrss_kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels import wkv6
from mrss_kernels._checks import FLOATS, check_prefill_args, expect_dtype
from mrss_kernels._launch import dependent_launch, next_power_of_2
from mrss_kernels.blocked import (
    BLOCK_LEN,
    MAX_SIZE,
    SCRATCH,
    Form,
    Precision,
    add_dot,
    dot,
    find_block,
    load_block,
    load_term,
    split,
    store_term,
)

HALF_SCALE = 1 / 64
"""In fp16 the state and a block's scores are rounded after this, so that they may be as large as
4 million: nothing takes away from RWKV-6's state but its decay."""

TERMS_WIDTH = 32
"""Channels whose part of a block's terms is computed at a time."""

MIN_LOG_DECAY = -1e4
"""What log decays are raised to: its exponential is 0, and sums of it fit in 16 bits."""


@triton.jit
def _sum_tokens(members, w_high, w_low):
    """Return for each token of a block the sum of w [BT, N] over its members, a mask [BT, BT].

    A product instead of a scan: nothing is taken away again, so no large sums cancel.
    """
    members = members.to(tl.float16)
    x = tl.dot(members, w_low, input_precision="ieee")
    return tl.dot(members, w_high, x, input_precision="ieee")


@triton.jit
def _block_scores(r, k, w_high, w_low, BT: tl.constexpr, PRECISION: tl.constexpr):
    """Return sum over channels of r[t] k[s] decay(s to t) for s < t, zeros elsewhere: [BT, BT].

    Two tokens are parted by the border between two neighbouring halves of 1, 2, 4 or 8 tokens.
    r decays from there, k up to there: exponents of both are sums of log decays.
    """
    i_t = tl.arange(0, BT)[:, None]
    j_t = tl.arange(0, BT)[None, :]
    scores = tl.zeros([BT, BT], tl.float32)
    for level in tl.static_range(4):
        after = ((i_t >> level) & 1) == 1
        x = tl.where(after, r, k)
        if level > 0:
            between = tl.where(after, j_t < i_t, j_t > i_t) & (i_t >> level == j_t >> level)
            x *= tl.exp2(_sum_tokens(between, w_high, w_low))
        x_high, x_low = split(x, PRECISION)
        # Of all pairs those count whose second token is in the half after the first one's.
        pairs = dot(x_high, x_low, tl.trans(x_high), tl.trans(x_low), PRECISION)
        scores += tl.where(after & ((i_t >> level) - 1 == j_t >> level), pairs, 0.0)
    return scores


@triton.jit(do_not_specialize=["n"])
def wkv6_terms_kernel(
    p_r,
    p_w,
    p_k,
    p_u,
    p_slots,
    p_cu_seqlens,
    p_terms,
    p_decay,
    n,
    H: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    LOWEST: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T // BT + n, H): one block of tokens a program, its terms [blocks, H, SIZE].

    With S [V, N] before the block and V its values [BT, V] it prepares query, key [BT, N], scores
    [BT, BT] and decay [N] of `Y = S query^T + V^T scores^T; S = S decay + V^T key`.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now: the next kernel reads its states before it waits for this one.
        tl.extra.cuda.gdc_launch_dependents()
    i_b = tl.program_id(0)
    i_h = tl.program_id(1)
    slot, begin, end = find_block(p_slots, p_cu_seqlens, i_b, n, BT, BN)
    if (slot >= 0) & (end - begin > 1):
        i_t = tl.arange(0, BT)[:, None]
        j_t = tl.arange(0, BT)[None, :]
        m_t = begin + tl.arange(0, BT) < end
        at = (begin.to(tl.int64) * H + i_h) * N
        i_term = i_b.to(tl.int64) * H + i_h
        p = p_terms + i_term * SIZE
        PART: tl.constexpr = BT * N
        PAIR: tl.constexpr = PART if PRECISION == "fp16" else 2 * PART
        scores = tl.zeros([BT, BT], tl.float32)
        # Some channels at a time, so that one warp can hold them.
        for c in tl.range(0, N, BC, num_stages=1):
            r = load_block(p_r, at + c, m_t, H * N, BC, BT).to(tl.float32)
            k = load_block(p_k, at + c, m_t, H * N, BC, BT).to(tl.float32)
            w = load_block(p_w, at + c, m_t, H * N, BC, BT).to(tl.float32)
            o_n = c + tl.arange(0, BC)
            u = tl.load(p_u + i_h * N + o_n).to(tl.float32)
            w = tl.maximum(w, LOWEST) * 1.4426950408889634
            w_high = w.to(tl.float16)
            w_low = (w - w_high.to(tl.float32)).to(tl.float16)
            scores += _block_scores(r, k, w_high, w_low, BT, PRECISION)
            scores += tl.where(i_t == j_t, tl.sum(r * u[None, :] * k, 1)[:, None], 0.0)
            query = r * tl.exp2(_sum_tokens(j_t < i_t, w_high, w_low))
            key = k * tl.exp2(_sum_tokens(j_t > i_t, w_high, w_low))
            q_high, q_low = split(query, PRECISION)
            k_high, k_low = split(key, PRECISION)
            store_term(p + c, q_high, q_low, PART, N, PRECISION)
            store_term(p + PAIR + c, k_high, k_low, PART, N, PRECISION)
            tl.store(p_decay + i_term * N + o_n, tl.exp2(tl.sum(w, 0)))
        x_high, x_low = split(scores * SCALE, PRECISION)
        store_term(p + 2 * PAIR, x_high, x_low, BT * BT, BT, PRECISION)


@triton.jit
def _advance(
    s, v, q_high, q_low, k_high, k_low, x_high, x_low, decay, SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the state [BV, N] after a block and SCALE times its output [BT, BV]."""
    if PRECISION == "fp16":
        v_high = tl.trans(v.to(tl.float16))
        v_low = v_high
    else:
        v_high, v_low = split(tl.trans(v.to(tl.float32)), PRECISION)
    s_high, s_low = split(s * SCALE, PRECISION)
    y = dot(s_high, s_low, tl.trans(q_high), tl.trans(q_low), PRECISION)
    y = add_dot(y, v_high, v_low, tl.trans(x_high), tl.trans(x_low), PRECISION)
    s = add_dot(s * decay[None, :], v_high, v_low, k_high, k_low, PRECISION)
    return s, tl.trans(y)


@triton.jit
def _one_token(
    s, p_r, p_w, p_k, p_v, p_u, p_y, at, y_scale, BV: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Advance the state [BV, N] by the token at `at`, the offset of its head."""
    o_n = tl.arange(0, N)
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    r = tl.load(p_r + at + o_n).to(tl.float32)
    k = tl.load(p_k + at + o_n).to(tl.float32)
    v = tl.load(p_v + at + o_v).to(tl.float32)
    u = tl.load(p_u + tl.program_id(1) * N + o_n).to(tl.float32)
    y = tl.sum(s * r[None, :], 1) + tl.sum(r * u * k, 0) * v
    tl.store(p_y + at + o_v, (y * y_scale).to(p_y.dtype.element_ty))
    decay = tl.exp(tl.load(p_w + at + o_n).to(tl.float32))
    return s * decay[None, :] + v[:, None] * k[None, :]


@triton.jit
def wkv6_scan_kernel(
    p_r,
    p_w,
    p_k,
    p_v,
    p_u,
    p_y,
    p_pool,
    p_slots,
    p_cu_seqlens,
    p_terms,
    p_decay,
    y_scale,
    H: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (N / BV, H, n). Applies the blocks that `wkv6_terms_kernel` prepared."""
    i_h = tl.program_id(1)
    # Decoding rows stand before prompts: what takes longest starts first.
    i_n = tl.num_programs(2) - 1 - tl.program_id(2)
    o_n = tl.arange(0, N)
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    o_t = tl.arange(0, BT)
    # Older than the kernel in front of us, which waited before it let us start.
    slot = tl.load(p_slots + i_n).to(tl.int64)
    start = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    length = (tl.load(p_cu_seqlens + i_n + 1) - start).to(tl.int32)
    live = (slot >= 0) & (length > 0)
    p_s = p_pool + (slot * H + i_h) * N * N + o_n[:, None] * N + o_v[None, :]
    s = tl.trans(tl.load(p_s, mask=live, other=0.0).to(tl.float32))
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if live:
        at = (start * H + i_h) * N
        at_b = (start // BT + i_n) * H + i_h
        o_y = o_t[:, None] * (H * N) + o_v[None, :]
        for i in tl.range(0, (length + BT - 2) // BT, num_stages=STAGES):
            m_t = i * BT + o_t < length
            at_i = at + i * (BT * H * N)
            p = p_terms + (at_b + i * H) * SIZE
            qh, ql, p = load_term(p, BT, N, PRECISION)
            kh, kl, p = load_term(p, BT, N, PRECISION)
            xh, xl, p = load_term(p, BT, BT, PRECISION)
            d = tl.load(p_decay + (at_b + i * H) * N + o_n)
            v = tl.load(p_v + at_i + o_y, mask=m_t[:, None], other=0.0)
            s, y = _advance(s, v, qh, ql, kh, kl, xh, xl, d, SCALE, PRECISION)
            y *= y_scale / SCALE
            tl.store(p_y + at_i + o_y, y.to(p_y.dtype.element_ty), mask=m_t[:, None])
        if length % BT == 1:
            at += (length - 1).to(tl.int64) * (H * N)
            s = _one_token(s, p_r, p_w, p_k, p_v, p_u, p_y, at, y_scale, BV, N)
        tl.store(p_s, tl.trans(s).to(p_pool.dtype.element_ty))


def wkv6_prefill(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    y_scale: float = 1.0,
    form: Form | None = None,
) -> Tensor:
    """Read several sequences into RWKV-6 states, 16 tokens at a time.

    What a sequence gives depends on its own tokens and on the form, which by default follows from
    r's dtype. Reading it in parts that begin at multiples of `BLOCK_LEN` gives the same bits.

    Args:
        r: receptance, packed [T, H, N], any float dtype, contiguous, as all vectors.
        w: LOG decay; may be as low as -inf.
        k: key.
        v: value.
        u: bonus of the current token [H, N].
        pool: states [S, H, K, V] fp32 or fp16, *modified*; read and written once a sequence.
        slots: int64 [n], one a sequence, no slot twice; -1 is a padding sequence: neither its
            state nor its y is written.
        cu_seqlens: n + 1 offsets into T. A host sequence goes from 0 to T and strictly grows. A
            tensor, int32 or int64 on the pool's device, is not read by the host: it begins with 0,
            never falls and may end before T; the y of tokens behind its end is not written.
        out_dtype: of y.
        y_scale: y is multiplied by it.
        form: how to cut the call; by default what `choose_form` says.

    Returns:
        y [T, H, N] in `out_dtype`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    named = [("r", r), ("w", w), ("k", k), ("v", v)]
    offsets = check_prefill_args(named, pool, slots, cu_seqlens)
    tokens, heads, size = r.shape
    wkv6.check_bonus(u, heads, size, pool.device)
    num_seqs = slots.shape[0]
    y = r.new_empty(r.shape, dtype=out_dtype)
    expect_dtype("y", y, FLOATS)
    form = form or choose_form(size, r.dtype)
    if not tokens or not num_seqs:
        return y
    if form is None:
        wkv6.launch_by_token([r, w, k, v, u], y, pool, slots, offsets, y_scale)
        return y
    scale = HALF_SCALE if form.precision == "fp16" else 1.0
    length = terms_size(size, form.precision)
    common = {"H": heads, "N": size, "BT": BLOCK_LEN, "PRECISION": form.precision, "SCALE": scale}
    common |= {"SIZE": length} | dependent_launch(pool.device)
    limit = {} if form.registers is None else {"maxnreg": form.registers}
    num_blocks = tokens // BLOCK_LEN + num_seqs
    terms = r.new_empty((num_blocks, heads, length), dtype=SCRATCH[form.precision])
    decay = r.new_empty((num_blocks, heads, size), dtype=torch.float32)
    wkv6_terms_kernel[(num_blocks, heads)](
        r, w, k, u, slots, offsets, terms, decay, num_seqs, LOWEST=MIN_LOG_DECAY,
        BC=min(size, TERMS_WIDTH), BN=next_power_of_2(num_seqs), num_warps=form.terms_warps,
        **common,
    )  # fmt: skip
    wkv6_scan_kernel[(size // form.block_v, heads, num_seqs)](
        r, w, k, v, u, y, pool, slots, offsets, terms, decay, y_scale,
        BV=form.block_v, STAGES=form.num_stages, num_warps=form.num_warps, **limit, **common,
    )  # fmt: skip
    return y


def terms_size(size: int, precision: Precision) -> int:
    """Return how many numbers `wkv6_terms_kernel` keeps of a block of a head of `size`."""
    parts = 1 if precision == "fp16" else 2
    return parts * BLOCK_LEN * (2 * size + BLOCK_LEN)


def choose_form(size: int, dtype: torch.dtype) -> Form | None:
    """Return how to read heads of `size`, or None: token by token.

    Args:
        size: N.
        dtype: of r. Products are as precise as it is; fp32 is read token by token.
    """
    if size > MAX_SIZE or dtype == torch.float32:
        return None
    if dtype == torch.float16:
        # By itself Triton 3.6 gives the scan 86 registers and is slower for it.
        return Form("fp16", size, 4, 3, terms_warps=1, registers=128)
    return Form("bf16x3", size, 4, 2)
