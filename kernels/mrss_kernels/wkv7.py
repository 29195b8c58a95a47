# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""RWKV-7's recurrence in Triton: one token a row, or whole sequences, in place in the pool.

A program owns `BV` value rows of one head's state [V, K]: rows are independent, so programs share
nothing. Layouts and the derivation: kernels/README.md. Oracle: `mrss_kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import check_prefill_args, check_recurrent_args


@triton.jit
def wkv7_step(s, r, decay, k, v, kk, a):
    """Advance one state tile [BV, K]; vectors are fp32, `v` is [BV] and the others are [K]."""
    removed = tl.sum(s * kk[None, :], 1)
    s = s * decay[None, :] - removed[:, None] * (kk * a)[None, :] + v[:, None] * k[None, :]
    return s, tl.sum(s * r[None, :], 1)


@triton.jit
def wkv7_decode_kernel(
    p_r,
    p_w,
    p_k,
    p_v,
    p_kk,
    p_a,
    p_y,
    p_pool,
    p_slots,
    H: tl.constexpr,
    N: tl.constexpr,
    BV: tl.constexpr,
):
    """Grid (B, H, N / BV). Vectors [B, H, N], pool [S, H, V, K], y [B, H, N] fp32."""
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    o_k = tl.arange(0, N)
    o_v = tl.program_id(2) * BV + tl.arange(0, BV)
    base = (i_b * H + i_h) * N
    slot = tl.load(p_slots + i_b).to(tl.int64)
    if slot < 0:
        tl.store(p_y + base + o_v, tl.zeros([BV], tl.float32))
    else:
        p_s = p_pool + (slot * H + i_h) * N * N + o_v[:, None] * N + o_k[None, :]
        s = tl.load(p_s).to(tl.float32)
        s, y = wkv7_step(
            s,
            tl.load(p_r + base + o_k).to(tl.float32),
            tl.exp(tl.load(p_w + base + o_k).to(tl.float32)),
            tl.load(p_k + base + o_k).to(tl.float32),
            tl.load(p_v + base + o_v).to(tl.float32),
            tl.load(p_kk + base + o_k).to(tl.float32),
            tl.load(p_a + base + o_k).to(tl.float32),
        )
        tl.store(p_s, s.to(p_pool.dtype.element_ty))
        tl.store(p_y + base + o_v, y)


@triton.jit
def wkv7_prefill_kernel(
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
    H: tl.constexpr,
    N: tl.constexpr,
    BV: tl.constexpr,
):
    """Grid (N / BV, H, n). The state stays in registers; token t + 1 is loaded during token t."""
    i_h = tl.program_id(1)
    i_n = tl.program_id(2)
    o_k = tl.arange(0, N)
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    slot = tl.load(p_slots + i_n).to(tl.int64)
    start = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    end = tl.load(p_cu_seqlens + i_n + 1).to(tl.int64)
    if (slot >= 0) & (end > start):
        p_s = p_pool + (slot * H + i_h) * N * N + o_v[:, None] * N + o_k[None, :]
        s = tl.load(p_s).to(tl.float32)
        at = (start * H + i_h) * N
        r = tl.load(p_r + at + o_k)
        w = tl.load(p_w + at + o_k)
        k = tl.load(p_k + at + o_k)
        v = tl.load(p_v + at + o_v)
        kk = tl.load(p_kk + at + o_k)
        a = tl.load(p_a + at + o_k)
        for t in range(start, end):
            # The last token loads itself again: a read that is in bounds and never used.
            ahead = (tl.minimum(t + 1, end - 1) * H + i_h) * N
            next_r = tl.load(p_r + ahead + o_k)
            next_w = tl.load(p_w + ahead + o_k)
            next_k = tl.load(p_k + ahead + o_k)
            next_v = tl.load(p_v + ahead + o_v)
            next_kk = tl.load(p_kk + ahead + o_k)
            next_a = tl.load(p_a + ahead + o_k)
            s, y = wkv7_step(
                s,
                r.to(tl.float32),
                tl.exp(w.to(tl.float32)),
                k.to(tl.float32),
                v.to(tl.float32),
                kk.to(tl.float32),
                a.to(tl.float32),
            )
            tl.store(p_y + (t * H + i_h) * N + o_v, y.to(p_y.dtype.element_ty))
            r, w, k, v, kk, a = next_r, next_w, next_k, next_v, next_kk, next_a
        tl.store(p_s, s.to(p_pool.dtype.element_ty))


def wkv7_decode(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, pool: Tensor, slots: Tensor
) -> Tensor:
    """Advance RWKV-7 rows by one token; see `mrss_kernels.reference.wkv7_decode`.

    Args:
        r: receptance [B, H, N], any float dtype, contiguous, as all vectors.
        w: LOG decay.
        k: key.
        v: value.
        kk: removal key, of unit norm a head.
        a: in-context learning rate.
        pool: states [S, H, V, K] fp32 or fp16, *modified*; arithmetic is in fp32.
        slots: int64 [B], no slot twice; -1 is a padding row: nothing is written, its y is 0.

    Returns:
        y [B, H, N] fp32.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    named = [("r", r), ("w", w), ("k", k), ("v", v), ("kk", kk), ("a", a)]
    check_recurrent_args(named, pool, slots)
    rows, heads, size = r.shape
    y = r.new_empty(r.shape, dtype=torch.float32)
    block_v, num_warps = decode_blocks(rows * heads, size)
    if rows:
        wkv7_decode_kernel[(rows, heads, size // block_v)](
            r, w, k, v, kk, a, y, pool, slots,
            H=heads, N=size, BV=block_v, num_warps=num_warps,
        )  # fmt: skip
    return y


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
) -> Tensor:
    """Read several sequences into RWKV-7 states, token by token inside one kernel.

    Exact for any decay and head size; `mrss_kernels.wkv7_chunk` is faster. Arguments as there.

    Returns:
        y [T, H, N] fp32.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    named = [("r", r), ("w", w), ("k", k), ("v", v), ("kk", kk), ("a", a)]
    offsets = check_prefill_args(named, pool, slots, cu_seqlens)
    y = r.new_empty(r.shape, dtype=torch.float32)
    if y.numel() and slots.numel():
        launch_by_token([x for _, x in named], y, pool, slots, offsets)
    return y


def launch_by_token(
    vectors: Sequence[Tensor], y: Tensor, pool: Tensor, slots: Tensor, offsets: Tensor
) -> None:
    """Launch the loop over tokens on checked arguments; `y` [T, H, N] is *written*."""
    _, heads, size = y.shape
    block_v = min(size, 16)
    wkv7_prefill_kernel[(size // block_v, heads, slots.shape[0])](
        *vectors, y, pool, slots, offsets, H=heads, N=size, BV=block_v, num_warps=1
    )


def decode_blocks(num_states: int, size: int) -> tuple[int, int]:
    """Return (BV, num_warps) for a decode step over `num_states` states of head size `size`.

    Few states: small tiles, so that all multiprocessors take part. Many: whole states a program.
    """
    if num_states < 256:
        return min(size, 16), 1
    return min(size, 32), 2
