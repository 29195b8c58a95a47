# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""RWKV-7's recurrence over whole sequences in blocks of tokens, in place in the pool.

What does not depend on the state is prepared for all blocks of `BLOCK_LEN` tokens at once; then, a
block after the other, one product reads the state and one writes it. Derivation: kernels/README.md.
Oracle: `mrss_kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels import wkv7
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
from mrss_kernels.wkv7 import wkv7_step

FEW_STATES = 64
"""Up to so many sequences x heads, fp32 is read in blocks; its products are three passes."""


@triton.jit
def _invert(lower, BT: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse of I + lower, split; lower [BT, BT] is strictly lower triangular.

    Diagonal blocks of 2, 4, 8, .. are inverted in turn: [[A, 0], [C, B]] has -B^-1 C A^-1 in its
    corner. A product of powers of `lower` would cost the same and cancel large terms.
    """
    i_t = tl.arange(0, BT)[:, None]
    j_t = tl.arange(0, BT)[None, :]
    inverse = tl.where(i_t == j_t, 1.0, tl.where(i_t // 2 == j_t // 2, -lower, 0.0))
    i_high, i_low = split(inverse, PRECISION)
    for level in tl.static_range(1, 4):
        corner = (i_t >> (level + 1) == j_t >> (level + 1)) & (i_t >> level != j_t >> level)
        c_high, c_low = split(tl.where(corner, -lower, 0.0), PRECISION)
        x = dot(c_high, c_low, i_high, i_low, PRECISION)
        x_high, x_low = split(x, PRECISION)
        inverse = add_dot(inverse, i_high, i_low, x_high, x_low, PRECISION)
        i_high, i_low = split(inverse, PRECISION)
    return i_high, i_low


@triton.jit
def _block_terms(r, w, k, kk, a, BT: tl.constexpr, PRECISION: tl.constexpr):
    """Prepare a block of tokens [BT, N]; zeros behind its end are tokens that change nothing.

    With S [V, N] before the block and V its values [BT, V], the block does

        X = S removal_q^T;  Y = S query^T + V^T read^T;  S = S decay + V^T key - X removal_k

    Returns query, removal_q, key, removal_k [BT, N], read [BT, BT], all split, and decay [N].
    """
    r, w, k, kk, a = (
        r.to(tl.float32), w.to(tl.float32), k.to(tl.float32), kk.to(tl.float32), a.to(tl.float32),
    )  # fmt: skip
    i_t = tl.arange(0, BT)[:, None]
    j_t = tl.arange(0, BT)[None, :]
    w = w * 1.4426950408889634
    total = tl.sum(w, 0)
    until = tl.cumsum(w, 0)
    if PRECISION == "fp16":
        # Seen from the middle of its decay, a block's keys are in the range of half precision.
        until -= 0.5 * total[None, :]
    # A token's log decay is at least -0.6065, so this multiplies by at most exp(16 * 0.6065).
    inverse = tl.exp2(-until)
    r_q = r * tl.exp2(until)
    b_k = kk * a * inverse
    k_k = k * inverse
    q_high, q_low = split(kk * tl.exp2(until - w), PRECISION)
    b_high, b_low = split(b_k, PRECISION)
    kb = dot(q_high, q_low, tl.trans(b_high), tl.trans(b_low), PRECISION)
    i_high, i_low = _invert(tl.where(i_t > j_t, kb, 0.0), BT, PRECISION)
    k_high, k_low = split(k_k, PRECISION)
    kv = dot(q_high, q_low, tl.trans(k_high), tl.trans(k_low), PRECISION)
    r_high, r_low = split(r_q, PRECISION)
    rb = dot(r_high, r_low, tl.trans(b_high), tl.trans(b_low), PRECISION)
    rv = dot(r_high, r_low, tl.trans(k_high), tl.trans(k_low), PRECISION)
    kv = tl.where(i_t > j_t, kv, 0.0)
    rb = tl.where(i_t >= j_t, -rb, 0.0)
    rv = tl.where(i_t >= j_t, rv, 0.0)
    x_high, x_low = split(kv, PRECISION)
    from_value = dot(i_high, i_low, x_high, x_low, PRECISION)
    from_state = dot(i_high, i_low, q_high, q_low, PRECISION)
    x_high, x_low = split(from_value, PRECISION)
    q_high, q_low = split(from_state, PRECISION)
    r_high, r_low = split(rb, PRECISION)
    query = add_dot(r_q, r_high, r_low, q_high, q_low, PRECISION)
    read = add_dot(rv, r_high, r_low, x_high, x_low, PRECISION)
    key = k_k - dot(tl.trans(x_high), tl.trans(x_low), b_high, b_low, PRECISION)
    x_high, x_low = split(read, PRECISION)
    decay = tl.exp2(total)
    if PRECISION == "fp16":
        rest = tl.exp2(0.5 * total)[None, :]
        query *= rest
        q_high, q_low = split(from_state * rest, PRECISION)
    else:
        rest = decay[None, :]
    r_high, r_low = split(query, PRECISION)
    k_high, k_low = split(key * rest, PRECISION)
    b_high, b_low = split(b_k * rest, PRECISION)
    return r_high, r_low, q_high, q_low, k_high, k_low, b_high, b_low, x_high, x_low, decay


@triton.jit
def _beside(left, right):
    """Return left and right [BV, BT] as [BV, 2 BT]; every thread keeps its own numbers."""
    both = tl.permute(tl.join(left, right), [0, 2, 1])
    return tl.reshape(both, [left.shape[0], 2 * left.shape[1]])


@triton.jit
def _advance(
    s, v, q_high, q_low, k_high, k_low, x_high, x_low, decay, PRECISION: tl.constexpr
):  # fmt: skip
    """Return the state [BV, N] after a block and its output [BT, BV].

    q [2 BT, N] is query over removal_q, k is key over removal_k; all terms as `_block_terms`. Two
    products instead of four: what a block takes is their latency.
    """
    if PRECISION == "fp16":
        v_high = tl.trans(v.to(tl.float16))
        v_low = v_high
    else:
        v_high, v_low = split(tl.trans(v.to(tl.float32)), PRECISION)
    s_high, s_low = split(s, PRECISION)
    both = dot(s_high, s_low, tl.trans(q_high), tl.trans(q_low), PRECISION)
    both = tl.reshape(both, [s.shape[0], 2, v.shape[0]])
    y, removed = tl.split(tl.permute(both, [0, 2, 1]))
    r_high, r_low = split(-removed, PRECISION)
    given_high, given_low = _beside(v_high, r_high), _beside(v_low, r_low)
    s = add_dot(s * decay[None, :], given_high, given_low, k_high, k_low, PRECISION)
    y = add_dot(y, v_high, v_low, tl.trans(x_high), tl.trans(x_low), PRECISION)
    return s, tl.trans(y)


@triton.jit
def _one_token(
    s, p_r, p_w, p_k, p_v, p_kk, p_a, p_y, at, BV: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Advance the state [BV, N] by the token at `at`, the offset of its head."""
    o_n = tl.arange(0, N)
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    s, y = wkv7_step(
        s,
        tl.load(p_r + at + o_n).to(tl.float32),
        tl.exp(tl.load(p_w + at + o_n).to(tl.float32)),
        tl.load(p_k + at + o_n).to(tl.float32),
        tl.load(p_v + at + o_v).to(tl.float32),
        tl.load(p_kk + at + o_n).to(tl.float32),
        tl.load(p_a + at + o_n).to(tl.float32),
    )
    tl.store(p_y + at + o_v, y.to(p_y.dtype.element_ty))
    return s


@triton.jit(do_not_specialize=["n"])
def wkv7_terms_kernel(
    p_r,
    p_w,
    p_k,
    p_kk,
    p_a,
    p_slots,
    p_cu_seqlens,
    p_terms,
    p_decay,
    n,
    H: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T // BT + n, H): one block of tokens a program, its terms [blocks, H, SIZE].

    The programs without a block do nothing.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now: the next kernel reads its states before it waits for this one.
        tl.extra.cuda.gdc_launch_dependents()
    i_b = tl.program_id(0)
    i_h = tl.program_id(1)
    slot, begin, end = find_block(p_slots, p_cu_seqlens, i_b, n, BT, BN)
    if (slot >= 0) & (end - begin > 1):
        m_t = begin + tl.arange(0, BT) < end
        at = (begin.to(tl.int64) * H + i_h) * N
        r = load_block(p_r, at, m_t, H * N, N, BT)
        w = load_block(p_w, at, m_t, H * N, N, BT)
        k = load_block(p_k, at, m_t, H * N, N, BT)
        kk = load_block(p_kk, at, m_t, H * N, N, BT)
        a = load_block(p_a, at, m_t, H * N, N, BT)
        rh, rl, qh, ql, kh, kl, bh, bl, xh, xl, d = _block_terms(r, w, k, kk, a, BT, PRECISION)
        at = i_b.to(tl.int64) * H + i_h
        # Query over removal_q, key over removal_k, read: `_advance` takes them two at a time.
        PART: tl.constexpr = BT * N
        PAIR: tl.constexpr = 2 * PART if PRECISION == "fp16" else 4 * PART
        p = p_terms + at * SIZE
        store_term(p, rh, rl, 2 * PART, N, PRECISION)
        store_term(p + PART, qh, ql, 2 * PART, N, PRECISION)
        store_term(p + PAIR, kh, kl, 2 * PART, N, PRECISION)
        store_term(p + PAIR + PART, bh, bl, 2 * PART, N, PRECISION)
        store_term(p + 2 * PAIR, xh, xl, BT * BT, BT, PRECISION)
        tl.store(p_decay + at * N + tl.arange(0, N), d)


@triton.jit
def wkv7_scan_kernel(
    p_r,
    p_w,
    p_k,
    p_v,
    p_kk,
    p_a,
    p_y,
    p_pool,
    p_slots,
    p_cu_seqlens,
    p_terms,
    p_decay,
    H: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (N / BV, H, n). Applies the blocks that `wkv7_terms_kernel` prepared."""
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
    p_s = p_pool + (slot * H + i_h) * N * N + o_v[:, None] * N + o_n[None, :]
    s = tl.load(p_s, mask=live, other=0.0).to(tl.float32)
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
            qh, ql, p = load_term(p, 2 * BT, N, PRECISION)
            kh, kl, p = load_term(p, 2 * BT, N, PRECISION)
            xh, xl, p = load_term(p, BT, BT, PRECISION)
            d = tl.load(p_decay + (at_b + i * H) * N + o_n)
            v = tl.load(p_v + at_i + o_y, mask=m_t[:, None], other=0.0)
            s, y = _advance(s, v, qh, ql, kh, kl, xh, xl, d, PRECISION)
            tl.store(p_y + at_i + o_y, y.to(p_y.dtype.element_ty), mask=m_t[:, None])
        if length % BT == 1:
            at += (length - 1).to(tl.int64) * (H * N)
            s = _one_token(s, p_r, p_w, p_k, p_v, p_kk, p_a, p_y, at, BV, N)
        tl.store(p_s, s.to(p_pool.dtype.element_ty))


def wkv7_prefill(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    form: Form | None = None,
) -> Tensor:
    """Read several sequences into RWKV-7 states, 16 tokens at a time.

    What a sequence gives depends on its own tokens and on the form, which by default follows from
    the number of sequences and r's dtype, never on what the other sequences are. Reading it in
    parts that begin at multiples of `BLOCK_LEN` gives the same bits in the same form.

    Args:
        r: receptance, packed [T, H, N], any float dtype, contiguous, as all vectors.
        w: LOG decay, in [-0.6065306597, 0].
        k: key.
        v: value.
        kk: removal key, of unit norm a head.
        a: in-context learning rate.
        pool: states [S, H, V, K] fp32 or fp16, *modified*; read and written once a sequence.
        slots: int64 [n], one a sequence, no slot twice; -1 is a padding sequence: neither its
            state nor its y is written.
        cu_seqlens: n + 1 offsets into T. A host sequence goes from 0 to T and strictly grows. A
            tensor, int32 or int64 on the pool's device, is not read by the host: it begins with 0,
            never falls and may end before T; the y of tokens behind its end is not written.
        out_dtype: of y.
        form: how to cut the call; by default what `choose_form` says.

    Returns:
        y [T, H, N] in `out_dtype`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    named = [("r", r), ("w", w), ("k", k), ("v", v), ("kk", kk), ("a", a)]
    offsets = check_prefill_args(named, pool, slots, cu_seqlens)
    tokens, heads, size = r.shape
    num_seqs = slots.shape[0]
    y = r.new_empty(r.shape, dtype=out_dtype)
    expect_dtype("y", y, FLOATS)
    if form is None:
        form = choose_form(num_seqs * heads, size, r.dtype)
    if not tokens or not num_seqs:
        return y
    if form is None:
        wkv7.launch_by_token([x for _, x in named], y, pool, slots, offsets)
        return y
    grid = (size // form.block_v, heads, num_seqs)
    pdl = dependent_launch(pool.device)
    shape = {"H": heads, "N": size, "BT": BLOCK_LEN, "PRECISION": form.precision}
    cut = {"BV": form.block_v, "STAGES": form.num_stages, "num_warps": form.num_warps}
    num_blocks = tokens // BLOCK_LEN + num_seqs
    length = terms_size(size, form.precision)
    terms = r.new_empty((num_blocks, heads, length), dtype=SCRATCH[form.precision])
    decay = r.new_empty((num_blocks, heads, size), dtype=torch.float32)
    wkv7_terms_kernel[(num_blocks, heads)](
        r, w, k, kk, a, slots, offsets, terms, decay, num_seqs,
        BN=next_power_of_2(num_seqs), SIZE=length, num_warps=form.terms_warps, **shape, **pdl,
    )  # fmt: skip
    wkv7_scan_kernel[grid](
        r, w, k, v, kk, a, y, pool, slots, offsets, terms, decay,
        SIZE=length, **shape, **cut, **pdl,
    )  # fmt: skip
    return y


def terms_size(size: int, precision: Precision) -> int:
    """Return how many numbers `wkv7_terms_kernel` keeps of a block of a head of `size`."""
    parts = 1 if precision == "fp16" else 2
    return parts * BLOCK_LEN * (4 * size + BLOCK_LEN)


def choose_form(num_states: int, size: int, dtype: torch.dtype) -> Form | None:
    """Return how to read `num_states` = sequences x heads, or None: token by token.

    Args:
        num_states: sequences x heads.
        size: N.
        dtype: of r. Products are as precise as it is, or more; those of fp16 want a state and
            128 |r|, 128 |k| below 65504.
    """
    if size > MAX_SIZE:
        return None
    if dtype == torch.float32:
        return Form("fp32", 16, 2, 3) if num_states <= FEW_STATES else None
    if dtype == torch.float16:
        return Form("fp16", size, 4, 3)
    return Form("bf16x3", size, 4, 2)
