# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""RWKV-6's recurrence in Triton: one token a row, or whole sequences, in place in the pool.

A program owns `BV` value columns of one head's state [K, V]: columns are independent, so programs
share nothing. y reads the state of before the token. Oracle: `mrss_kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import (
    FLOATS,
    check_prefill_args,
    check_recurrent_args,
    expect_contiguous,
    expect_device,
    expect_dtype,
    expect_shape,
)
from mrss_kernels.wkv7 import decode_blocks


@triton.jit
def wkv6_step(s, r, decay, k, v, u):
    """Advance one state tile [K, BV]; vectors are fp32, `v` is [BV] and the others are [K]."""
    kv = k[:, None] * v[None, :]
    y = tl.sum(r[:, None] * (s + u[:, None] * kv), 0)
    return s * decay[:, None] + kv, y


@triton.jit
def wkv6_decode_kernel(
    p_r,
    p_w,
    p_k,
    p_v,
    p_u,
    p_y,
    p_pool,
    p_slots,
    H: tl.constexpr,
    N: tl.constexpr,
    BV: tl.constexpr,
):
    """Grid (B, H, N / BV). Vectors [B, H, N], pool [S, H, K, V], y [B, H, N] fp32."""
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    o_k = tl.arange(0, N)
    o_v = tl.program_id(2) * BV + tl.arange(0, BV)
    base = (i_b * H + i_h) * N
    slot = tl.load(p_slots + i_b).to(tl.int64)
    if slot < 0:
        tl.store(p_y + base + o_v, tl.zeros([BV], tl.float32))
    else:
        p_s = p_pool + (slot * H + i_h) * N * N + o_k[:, None] * N + o_v[None, :]
        s = tl.load(p_s).to(tl.float32)
        s, y = wkv6_step(
            s,
            tl.load(p_r + base + o_k).to(tl.float32),
            tl.exp(tl.load(p_w + base + o_k).to(tl.float32)),
            tl.load(p_k + base + o_k).to(tl.float32),
            tl.load(p_v + base + o_v).to(tl.float32),
            tl.load(p_u + i_h * N + o_k).to(tl.float32),
        )
        tl.store(p_s, s.to(p_pool.dtype.element_ty))
        tl.store(p_y + base + o_v, y)


@triton.jit
def wkv6_prefill_kernel(
    p_r,
    p_w,
    p_k,
    p_v,
    p_u,
    p_y,
    p_pool,
    p_slots,
    p_cu_seqlens,
    y_scale,
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
        p_s = p_pool + (slot * H + i_h) * N * N + o_k[:, None] * N + o_v[None, :]
        s = tl.load(p_s).to(tl.float32)
        u = tl.load(p_u + i_h * N + o_k).to(tl.float32)
        at = (start * H + i_h) * N
        r = tl.load(p_r + at + o_k)
        w = tl.load(p_w + at + o_k)
        k = tl.load(p_k + at + o_k)
        v = tl.load(p_v + at + o_v)
        for t in range(start, end):
            # The last token loads itself again: a read that is in bounds and never used.
            ahead = (tl.minimum(t + 1, end - 1) * H + i_h) * N
            next_r = tl.load(p_r + ahead + o_k)
            next_w = tl.load(p_w + ahead + o_k)
            next_k = tl.load(p_k + ahead + o_k)
            next_v = tl.load(p_v + ahead + o_v)
            s, y = wkv6_step(
                s,
                r.to(tl.float32),
                tl.exp(w.to(tl.float32)),
                k.to(tl.float32),
                v.to(tl.float32),
                u,
            )
            y *= y_scale
            tl.store(p_y + (t * H + i_h) * N + o_v, y.to(p_y.dtype.element_ty))
            r, w, k, v = next_r, next_w, next_k, next_v
        tl.store(p_s, s.to(p_pool.dtype.element_ty))


def wkv6_decode(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, pool: Tensor, slots: Tensor
) -> Tensor:
    """Advance RWKV-6 rows by one token; see `mrss_kernels.reference.wkv6_decode`.

    Args:
        r: receptance [B, H, N], any float dtype, contiguous, as all vectors.
        w: LOG decay; may be as low as -inf.
        k: key.
        v: value.
        u: bonus of the current token [H, N].
        pool: states [S, H, K, V] fp32 or fp16, *modified*; arithmetic is in fp32.
        slots: int64 [B], no slot twice; -1 is a padding row: nothing is written, its y is 0.

    Returns:
        y [B, H, N] fp32.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    check_recurrent_args([("r", r), ("w", w), ("k", k), ("v", v)], pool, slots)
    rows, heads, size = r.shape
    check_bonus(u, heads, size, pool.device)
    y = r.new_empty(r.shape, dtype=torch.float32)
    block_v, num_warps = decode_blocks(rows * heads, size)
    if rows:
        wkv6_decode_kernel[(rows, heads, size // block_v)](
            r, w, k, v, u, y, pool, slots, H=heads, N=size, BV=block_v, num_warps=num_warps
        )  # fmt: skip
    return y


def wkv6_prefill(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
) -> Tensor:
    """Read several sequences into RWKV-6 states, token by token inside one kernel.

    As exact as fp32 for any head size; `mrss_kernels.wkv6_chunk` is faster. Arguments as there.

    Returns:
        y [T, H, N] fp32.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    named = [("r", r), ("w", w), ("k", k), ("v", v)]
    offsets = check_prefill_args(named, pool, slots, cu_seqlens)
    _, heads, size = r.shape
    check_bonus(u, heads, size, pool.device)
    y = r.new_empty(r.shape, dtype=torch.float32)
    if y.numel() and slots.numel():
        launch_by_token([r, w, k, v, u], y, pool, slots, offsets)
    return y


def launch_by_token(
    vectors: Sequence[Tensor],
    y: Tensor,
    pool: Tensor,
    slots: Tensor,
    offsets: Tensor,
    y_scale: float = 1.0,
) -> None:
    """Launch the loop over tokens on checked arguments; `y` [T, H, N] is *written*."""
    _, heads, size = y.shape
    block_v = min(size, 16)
    wkv6_prefill_kernel[(size // block_v, heads, slots.shape[0])](
        *vectors, y, pool, slots, offsets, y_scale, H=heads, N=size, BV=block_v, num_warps=1
    )


def check_bonus(u: Tensor, heads: int, size: int, device: torch.device) -> None:
    """Raise `ValueError` unless `u` can be the bonus of these heads."""
    expect_shape("u", u, (heads, size))
    expect_dtype("u", u, FLOATS)
    expect_contiguous("u", u)
    expect_device("u", u, device)
