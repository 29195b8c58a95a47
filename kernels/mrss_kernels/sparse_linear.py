# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Products of few rows that are mostly zeros: only the weights of what is not zero are read.

After RWKV-7's `max(x, 0)^2` nine elements in ten are zeros (kernels/README.md, measured). A program
takes a part of one row, lists what is not zero in it, and adds up those rows of the transposed
weight. Rows share nothing but the cache, so a row's bits do not depend on its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import (
    FLOATS,
    expect_contiguous,
    expect_device,
    expect_dtype,
    expect_shape,
)
from mrss_kernels._launch import dependent_launch, next_power_of_2
from mrss_kernels.caching import KEEP

MAX_ROWS = 8
"""Rows up to which the product is worth it: each has its own zeros, and the cache is finite."""

MAX_PART = 1024
"""Elements of a row that one program lists."""

BLOCK_N, BLOCK_K = 128, 64
"""Outputs of a program, and rows of the weight that it loads at once."""


@triton.jit
def sparse_linear_kernel(
    p_x,
    p_w,
    p_index,
    p_y,
    B,
    K: tl.constexpr,
    R: tl.constexpr,
    PART: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (R / BN, K / PART, B). x [B, K], w [K, R], index [grid, PART], y [K / PART, B, R]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_n = tl.program_id(0)
    i_p = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < R
    o_p = tl.arange(0, BP)
    own = (i_b * tl.num_programs(1) + i_p) * tl.num_programs(0) + i_n
    p_own = p_index + own * PART
    p_row = p_x + i_b * K + i_p * PART
    p_part = p_w + i_p.to(tl.int64) * PART * R
    if PDL:
        tl.extra.cuda.gdc_wait()
    live = tl.load(p_row + o_p, mask=o_p < PART, other=0.0) != 0
    place = tl.cumsum(live.to(tl.int32), 0) - 1
    count = tl.sum(live.to(tl.int32), 0)
    tl.store(p_own + place, o_p, mask=live)
    # What the program's other threads have listed is read next.
    tl.debug_barrier()
    acc = tl.zeros([BK, BN], tl.float32)
    for first in range(0, count, BK):
        o_k = first + tl.arange(0, BK)
        m_k = o_k < count
        i_k = tl.load(p_own + o_k, mask=m_k, other=0)
        x = tl.load(p_row + i_k, mask=m_k, other=0.0).to(tl.float32)
        p_tile = p_part + i_k.to(tl.int64)[:, None] * R + o_n[None, :]
        w = tl.load(p_tile, mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc += x[:, None] * w.to(tl.float32)
    p_out = p_y + (i_p * B + i_b) * R + o_n
    tl.store(p_out, tl.sum(acc, 0), mask=m_n, eviction_policy=KEEP)


def sparse_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply few rows, mostly zeros, by a transposed weight.

    `y[s, b, j] = sum over part s of K of x[b, :] * weight[:, j]`; zeros of x count as nothing, also
    where the weight is not finite.

    Args:
        x: inputs [B, K] fp16, bf16 or fp32, contiguous; K a multiple of 64.
        weight: [K, R], dtype of `x`, contiguous; R a multiple of 64.

    Returns:
        y [P, B, R] fp32: the parts of each sum, to be added up by the reader.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"x must be [B, K] and weight [K, R], got {list(x.shape)} and {list(weight.shape)}"
        )
    (rows, size_k), size_r = x.shape, weight.shape[1]
    expect_shape("weight", weight, (size_k, size_r))
    expect_dtype("x", x, FLOATS)
    expect_dtype("weight", weight, (x.dtype,))
    for name, tensor in (("x", x), ("weight", weight)):
        expect_contiguous(name, tensor)
        expect_device(name, tensor, x.device)
    if size_k % 64 or size_r % 64:
        raise ValueError(f"K and R must be multiples of 64, got {size_k} and {size_r}")
    part = _part_len(size_k)
    num_parts = size_k // part
    num_blocks = -(-size_r // BLOCK_N)
    index = x.new_empty((rows, num_parts, num_blocks, part), dtype=torch.int32)
    y = x.new_empty((num_parts, rows, size_r), dtype=torch.float32)
    if rows:
        sparse_linear_kernel[(num_blocks, num_parts, rows)](
            x,
            weight,
            index,
            y,
            rows,
            K=size_k,
            R=size_r,
            PART=part,
            BP=next_power_of_2(part),
            BN=BLOCK_N,
            BK=BLOCK_K,
            num_warps=8,
            **dependent_launch(x.device),
        )
    return y


def _part_len(size_k: int) -> int:
    """Return the longest part, a multiple of 64 up to `MAX_PART`, that divides `size_k`."""
    return next(n for n in range(MAX_PART, 0, -64) if size_k % n == 0)
