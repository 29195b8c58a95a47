# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""The first products of RWKV-6's ffn in one launch: key, squared where positive, and receptance.

One weight holds both, the key's rows first; each program is wholly one or the other. Cut and
pipelined as the products of `rows_linear`.
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
from mrss_kernels._launch import dependent_launch, shared_bytes
from mrss_kernels.caching import KEEP, STREAM
from mrss_kernels.linear_cuts import LinearConfig, choose_config, rows_a_program
from mrss_kernels.rows_linear import GROUP_LEN, check_config, wait_for_inputs


@triton.jit
def key_receptance_gemv_kernel(
    p_x,
    p_w,
    p_key,
    p_gate,
    F,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (R / BN). x [2, K], w [R, K], key [F], gate [R - F]; the first block comes early."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_first = tl.program_id(0) * BN
    o_n = i_first.to(tl.int64) + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    p_tile = p_w + o_n[:, None] * K + o_k[None, :]
    w = tl.load(p_tile, eviction_policy=STREAM)
    p_x += (i_first >= F).to(tl.int32) * K
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = w.to(tl.float32) * tl.load(p_x + o_k).to(tl.float32)[None, :]
    for k in tl.static_range(BK, K, BK):
        w = tl.load(p_tile + k, eviction_policy=STREAM)
        acc += w.to(tl.float32) * tl.load(p_x + k + o_k).to(tl.float32)[None, :]
    y = tl.sum(acc, 1)
    if i_first >= F:
        tl.store(p_gate + o_n - F, y, eviction_policy=KEEP)
    else:
        y = tl.maximum(y, 0.0)
        tl.store(p_key + o_n, (y * y).to(p_key.dtype.element_ty), eviction_policy=KEEP)


@triton.jit
def key_receptance_kernel(
    p_x,
    p_w,
    p_key,
    p_gate,
    B,
    F,
    R,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (R / BN, B / BM). x [2, B, K], w [R, K], key [B, F], gate [B, R - F]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_first = tl.program_id(0) * BN
    o_n = i_first.to(tl.int64) + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    m_m = o_m < B
    p_tile = p_w + o_n[:, None] * K + o_k[None, :]
    p_x += (i_first >= F).to(tl.int64) * B * K
    p_rows = p_x + o_m[:, None] * K + o_k[None, :]
    acc = tl.zeros([BN, BM], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        w = tl.load(p_tile + k)
        at = tl.multiple_of(k + wait_for_inputs(k), 16) if PDL else k
        x = tl.load(p_rows + at, mask=m_m[:, None], other=0.0)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    if i_first >= F:
        at = o_m.to(tl.int64)[None, :] * (R - F) + (o_n - F)[:, None]
        tl.store(p_gate + at, acc, mask=m_m[None, :], eviction_policy=KEEP)
    else:
        acc = tl.maximum(acc, 0.0)
        at = o_m.to(tl.int64)[None, :] * F + o_n[:, None]
        key = (acc * acc).to(p_key.dtype.element_ty)
        tl.store(p_key + at, key, mask=m_m[None, :], eviction_policy=KEEP)


def key_receptance(
    x: Tensor, weight: Tensor, ffn_size: int, *, config: LinearConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Multiply few rows by the ffn's key and receptance.

    The weight is read before the kernel launched just before is done: that one must not write it.

    Args:
        x: inputs of key and receptance [2, B, K] fp16, bf16 or fp32, contiguous; K a multiple of
            64.
        weight: key's rows, then receptance's [F + C, K], dtype of `x`, contiguous.
        ffn_size: F, a multiple of 64 as C is.
        config: how to cut the product, in one part; None takes `choose_config`.

    Returns:
        `max(key, 0)^2` [B, F] in the dtype of `x`, and the receptance before its sigmoid [B, C]
        fp32.

    Raises:
        ValueError: a shape, dtype, stride, device or option that the kernel cannot take.
    """
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(
            f"x must be [2, B, K] and weight [R, K], got {list(x.shape)} and {list(weight.shape)}"
        )
    _, rows, size_k = x.shape
    size_r = weight.shape[0]
    expect_shape("x", x, (2, rows, size_k))
    expect_shape("weight", weight, (size_r, size_k))
    expect_dtype("x", x, FLOATS)
    expect_dtype("weight", weight, (x.dtype,))
    for name, tensor in (("x", x), ("weight", weight)):
        expect_contiguous(name, tensor)
        expect_device(name, tensor, x.device)
    for name, size in (("K", size_k), ("F", ffn_size), ("C", size_r - ffn_size)):
        if size % GROUP_LEN or size <= 0:
            raise ValueError(f"{name} must be a positive multiple of {GROUP_LEN}, got {size}")
    if config is None:
        chosen = choose_config(
            rows,
            size_r,
            size_k,
            splittable=False,
            shared_bytes=shared_bytes(x.device) if x.element_size() == 2 else 0,
        )
        config = chosen._replace(num_pieces=1)
    check_config(config, rows, size_k, grouped=True, activation="relu2")
    key = x.new_empty((rows, ffn_size))
    gate = x.new_empty((rows, size_r - ffn_size), dtype=torch.float32)
    flags = {"K": size_k, "BN": config.block_n, "BK": config.block_k}
    flags |= {"num_warps": config.num_warps} | dependent_launch(x.device)
    programs = size_r // config.block_n
    if rows == 1 and config.num_stages == 1:
        key_receptance_gemv_kernel[(programs,)](x, weight, key, gate, ffn_size, **flags)
    elif rows:
        block_m = rows_a_program(rows, config)
        flags |= {"BM": block_m, "STAGES": config.num_stages, "num_stages": config.num_stages}
        key_receptance_kernel[(programs, -(-rows // block_m))](
            x, weight, key, gate, rows, ffn_size, size_r, **flags
        )
    return key, gate
