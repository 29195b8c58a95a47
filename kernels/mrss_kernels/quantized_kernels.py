# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Kernels of products of few rows with weights in 8 or 4 bits; their host is `quantized_linear`.

Codes come as they lie, and become numbers in registers. `few`: the warps of a program share its
outputs and divide K: each reads its own columns, so that no code is converted twice, four of which
lie in a register of a tensor core's operand. `wide`: for more rows, 64 outputs a program. Scales
are applied to sums, those of 4 bits a group of 64 weights at a time, so that the factors of a
product are small numbers, exact in every dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.caching import KEEP
from mrss_kernels.rows_linear import wait_for_inputs
from mrss_kernels.unpack_codes import both_scales, unpack, widen


@triton.jit
def gemv4_kernel(
    p_x,
    p_w,
    p_scales,
    p_groups,
    p_y,
    R,
    stride,
    K: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUPED: tl.constexpr,
    RELU2: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (R / BN, SPLITS). x [M, K], w [R, K / 2], scales [K / 128, stride] of 32 bits.

    A block is BP pairs of groups. Sixteen bytes of a pair are one thread's: it adds their products
    up by itself before it applies the scale.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_n = tl.program_id(0)
    i_s = tl.program_id(1)
    PAIRS: tl.constexpr = K // 128 // SPLITS
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < R
    o_p = i_s * PAIRS + tl.arange(0, BP)
    o_byte = tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :]
    p_tile = p_w + o_n[:, None, None, None] * (K // 2)
    p_tile += o_p[:, None, None] * 64 + o_byte[None, :, :]
    p_pairs = p_scales + o_p.to(tl.int64)[None, :] * stride + o_n[:, None]
    w = tl.load(p_tile, mask=m_n[:, None, None, None], other=0)
    scales = tl.load(p_pairs, mask=m_n[:, None], other=0)
    if GROUPED:
        p_x += tl.load(p_groups + i_n * BN // 64) * K
    p_x += o_p[:, None, None] * 128 + o_byte[None, :, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BN, BP, 4], tl.float32)
    for p in tl.static_range(0, PAIRS, BP):
        if p > 0:
            w = tl.load(p_tile + p * 64, mask=m_n[:, None, None, None], other=0)
            scales = tl.load(p_pairs + p * stride, mask=m_n[:, None], other=0)
        first, second = both_scales(scales)
        low, high = unpack(w, tl.float32, ASM)
        x = tl.load(p_x + p * 128).to(tl.float32)
        acc += tl.sum(low * x[None, :, :, :], 3) * first[:, :, None]
        x = tl.load(p_x + p * 128 + 64).to(tl.float32)
        acc += tl.sum(high * x[None, :, :, :], 3) * second[:, :, None]
    y = tl.sum(tl.sum(acc, 2), 1)
    if RELU2:
        y = tl.maximum(y, 0.0)
        y = y * y
    y = y.to(p_y.dtype.element_ty)
    tl.store(p_y + i_s * R + o_n, y, mask=m_n, eviction_policy=KEEP)


@triton.jit
def few8_kernel(
    p_x,
    p_w,
    p_scales,
    p_groups,
    p_y,
    B,
    R,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WARPS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPED: tl.constexpr,
    RELU2: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (R / BN, SPLITS, B / BM). x [M, B, K], w [R, K] codes of 8 bits, scales [R].

    Each warp has BK of a block's BK WARPS columns, and sums of its own.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_n = tl.program_id(0)
    i_s = tl.program_id(1)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    m_n = o_n < R
    m_m = (o_m < B)[None, :, None]
    o_k = tl.arange(0, WARPS)[:, None, None] * BK + tl.arange(0, BK)[None, None, :]
    o_k += i_s * (K // SPLITS)
    p_tile = p_w + o_n[None, :, None] * K + o_k
    if GROUPED:
        p_x += tl.load(p_groups + i_n * BN // 64).to(tl.int64) * B * K
    p_rows = p_x + o_m[None, :, None] * K + o_k
    acc = tl.zeros([WARPS, BN, BM], tl.float32)
    for k in tl.range(0, K // SPLITS, BK * WARPS, num_stages=STAGES):
        w = tl.load(p_tile + k, mask=m_n[None, :, None], other=0.0)
        # The first copy of weights is under way by then, and x is not asked for before.
        at = tl.multiple_of(k + wait_for_inputs(k), 16) if PDL else k
        x = tl.load(p_rows + at, mask=m_m, other=0.0)
        x = tl.permute(x, 0, 2, 1)
        acc = tl.dot(widen(w, x.dtype, ASM), x, acc, input_precision="ieee")
    y = tl.sum(acc, 0) * tl.load(p_scales + o_n, mask=m_n, other=0.0)[:, None]
    if RELU2:
        y = tl.maximum(y, 0.0)
        y = y * y
    p_out = p_y + (i_s * B + o_m).to(tl.int64)[None, :] * R + o_n[:, None]
    y = y.to(p_y.dtype.element_ty)
    tl.store(p_out, y, mask=m_n[:, None] & (o_m < B)[None, :], eviction_policy=KEEP)


@triton.jit
def few4_kernel(
    p_x,
    p_w,
    p_scales,
    p_groups,
    p_y,
    B,
    R,
    stride,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WARPS: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPED: tl.constexpr,
    RELU2: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (R / BN, SPLITS, B / BM). x [M, B, K], w [R, K / 2], scales [K / 128, stride].

    Each warp has PAIRS pairs of groups of a block, and sums of its own.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_n = tl.program_id(0)
    i_s = tl.program_id(1)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    m_n = o_n < R
    m_m = (o_m < B)[None, :, None]
    o_p = i_s * (K // 128 // SPLITS) + tl.arange(0, WARPS) * PAIRS
    o_byte = tl.arange(0, 64)[None, None, :]
    p_tile = p_w + o_n[None, :, None] * (K // 2) + o_p[:, None, None] * 64 + o_byte
    p_pairs = p_scales + o_p.to(tl.int64)[:, None] * stride + o_n[None, :]
    if GROUPED:
        p_x += tl.load(p_groups + i_n * BN // 64).to(tl.int64) * B * K
    p_rows = p_x + o_m[None, :, None] * K + o_p[:, None, None] * 128 + o_byte
    acc = tl.zeros([WARPS, BN, BM], tl.float32)
    for k in tl.range(0, K // SPLITS, 128 * WARPS * PAIRS, num_stages=STAGES):
        # The first copy of weights is under way by then, and x is not asked for before.
        at = tl.multiple_of(k + wait_for_inputs(k), 16) if PDL else k
        for i in tl.static_range(PAIRS):
            w = tl.load(p_tile + k // 2 + i * 64, mask=m_n[None, :, None], other=0)
            scales = tl.load(p_pairs + i * stride, mask=m_n[None, :], other=0)
            x_low = tl.load(p_rows + at + i * 128, mask=m_m, other=0.0)
            x_high = tl.load(p_rows + at + i * 128 + 64, mask=m_m, other=0.0)
            low, high = unpack(w, p_x.dtype.element_ty, ASM)
            first, second = both_scales(scales)
            y = tl.dot(low, tl.permute(x_low, 0, 2, 1), input_precision="ieee")
            acc += y * first[:, :, None]
            y = tl.dot(high, tl.permute(x_high, 0, 2, 1), input_precision="ieee")
            acc += y * second[:, :, None]
        p_pairs += WARPS * PAIRS * stride
    y = tl.sum(acc, 0)
    if RELU2:
        y = tl.maximum(y, 0.0)
        y = y * y
    p_out = p_y + (i_s * B + o_m).to(tl.int64)[None, :] * R + o_n[:, None]
    y = y.to(p_y.dtype.element_ty)
    tl.store(p_out, y, mask=m_n[:, None] & (o_m < B)[None, :], eviction_policy=KEEP)


@triton.jit
def wide8_kernel(
    p_x,
    p_w,
    p_scales,
    p_groups,
    p_y,
    B,
    R,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPED: tl.constexpr,
    RELU2: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (R / BN, SPLITS, B / BM). x [M, B, K], w [R, K] codes of 8 bits, scales [R]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_n = tl.program_id(0)
    i_s = tl.program_id(1)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    m_n = o_n < R
    m_m = (o_m < B)[:, None]
    o_k = i_s * (K // SPLITS) + tl.arange(0, BK)
    p_tile = p_w + o_n[:, None] * K + o_k[None, :]
    if GROUPED:
        p_x += tl.load(p_groups + i_n * BN // 64).to(tl.int64) * B * K
    p_rows = p_x + o_m[:, None] * K + o_k[None, :]
    acc = tl.zeros([BN, BM], tl.float32)
    for k in tl.range(0, K // SPLITS, BK, num_stages=STAGES):
        w = tl.load(p_tile + k, mask=m_n[:, None], other=0.0)
        # The first copy of weights is under way by then, and x is not asked for before.
        at = tl.multiple_of(k + wait_for_inputs(k), 16) if PDL else k
        x = tl.load(p_rows + at, mask=m_m, other=0.0)
        acc = tl.dot(widen(w, x.dtype, ASM), tl.trans(x), acc, input_precision="ieee")
    y = acc * tl.load(p_scales + o_n, mask=m_n, other=0.0)[:, None]
    if RELU2:
        y = tl.maximum(y, 0.0)
        y = y * y
    p_out = p_y + (i_s * B + o_m).to(tl.int64)[None, :] * R + o_n[:, None]
    y = y.to(p_y.dtype.element_ty)
    tl.store(p_out, y, mask=m_n[:, None] & (o_m < B)[None, :], eviction_policy=KEEP)


@triton.jit
def wide4_kernel(
    p_x,
    p_w,
    p_scales,
    p_groups,
    p_y,
    B,
    R,
    stride,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPED: tl.constexpr,
    RELU2: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (R / BN, SPLITS, B / BM). x [M, B, K], w [R, K / 2], scales [K / 128, stride]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_n = tl.program_id(0)
    i_s = tl.program_id(1)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    m_n = o_n < R
    m_m = (o_m < B)[:, None]
    i_p = i_s * (K // 128 // SPLITS)
    o_byte = tl.arange(0, 64)[None, :]
    p_tile = p_w + o_n[:, None] * (K // 2) + i_p * 64 + o_byte
    p_pairs = p_scales + i_p.to(tl.int64) * stride + o_n
    if GROUPED:
        p_x += tl.load(p_groups + i_n * BN // 64).to(tl.int64) * B * K
    p_rows = p_x + o_m[:, None] * K + i_p * 128 + o_byte
    acc = tl.zeros([BN, BM], tl.float32)
    for k in tl.range(0, K // SPLITS, 128 * PAIRS, num_stages=STAGES):
        # The first copy of weights is under way by then, and x is not asked for before.
        at = tl.multiple_of(k + wait_for_inputs(k), 16) if PDL else k
        for i in tl.static_range(PAIRS):
            w = tl.load(p_tile + k // 2 + i * 64, mask=m_n[:, None], other=0)
            scales = tl.load(p_pairs + i * stride, mask=m_n, other=0)
            x_low = tl.load(p_rows + at + i * 128, mask=m_m, other=0.0)
            x_high = tl.load(p_rows + at + i * 128 + 64, mask=m_m, other=0.0)
            low, high = unpack(w, p_x.dtype.element_ty, ASM)
            first, second = both_scales(scales)
            acc += tl.dot(low, tl.trans(x_low), input_precision="ieee") * first[:, None]
            acc += tl.dot(high, tl.trans(x_high), input_precision="ieee") * second[:, None]
        p_pairs += PAIRS * stride
    if RELU2:
        acc = tl.maximum(acc, 0.0)
        acc = acc * acc
    p_out = p_y + (i_s * B + o_m).to(tl.int64)[None, :] * R + o_n[:, None]
    acc = acc.to(p_y.dtype.element_ty)
    tl.store(p_out, acc, mask=m_n[:, None] & (o_m < B)[None, :], eviction_policy=KEEP)
