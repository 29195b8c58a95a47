# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""A quantised weight written out in 16 bits, for products of many rows by the library.

It goes to a room that all weights of a model share and that stays in the L2: a product of many rows
reads it from there. Kernels in a stream take turns, so the room is free again after the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels.quantized import PAIR_SIZE, QuantizedWeight, check_quantized, dequantize
from mrss_kernels.unpack_codes import both_scales, unpack, widen


@triton.jit
def dequantize8_kernel(
    p_codes,
    p_scales,
    p_out,
    R,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (R / BN, K / BK). codes and out [R, K], scales [R]."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < R
    o = o_n[:, None] * K + tl.program_id(1) * BK + tl.arange(0, BK)[None, :]
    w = tl.load(p_codes + o, mask=m_n[:, None], other=0.0)
    w = widen(w, tl.float32, ASM) * tl.load(p_scales + o_n, mask=m_n, other=0.0)[:, None]
    tl.store(p_out + o, w.to(p_out.dtype.element_ty), mask=m_n[:, None])


@triton.jit
def dequantize4_kernel(
    p_codes,
    p_scales,
    p_out,
    R,
    stride,
    K: tl.constexpr,
    BN: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (R / BN, K / 128). codes [R, K / 2], scales [K / 128, stride] of 32 bits, out [R, K]."""
    i_p = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < R
    o_byte = tl.arange(0, 64)[None, :]
    codes = tl.load(p_codes + o_n[:, None] * (K // 2) + i_p * 64 + o_byte, mask=m_n[:, None])
    scales = tl.load(p_scales + i_p * stride + o_n, mask=m_n, other=0)
    low, high = unpack(codes, tl.float32, ASM)
    first, second = both_scales(scales)
    p_low = p_out + o_n[:, None] * K + i_p * 128 + o_byte
    tl.store(p_low, (low * first[:, None]).to(p_out.dtype.element_ty), mask=m_n[:, None])
    tl.store(p_low + 64, (high * second[:, None]).to(p_out.dtype.element_ty), mask=m_n[:, None])


def into_scratch(weight: QuantizedWeight) -> Tensor:
    """Write what a weight's codes and scales stand for into its scratch, which is *modified*.

    Args:
        weight: [R, K] of at most as many elements as the scratch has.

    Returns:
        The weight [R, K] in the scratch's dtype, a view that holds until the next call.

    Raises:
        ValueError: a weight that no kernel can take, or that does not fit.
    """
    size_r, size_k = weight.shape
    if size_r * size_k > weight.scratch.numel():
        raise ValueError(
            f"a weight of {size_r} x {size_k} does not fit in a scratch of "
            f"{weight.scratch.numel()} elements"
        )
    out = weight.scratch[: size_r * size_k].view(size_r, size_k)
    if weight.device.type != "cuda":
        return out.copy_(dequantize(weight, weight.dtype))
    write_dequantized(weight, out)
    return out


def write_dequantized(weight: QuantizedWeight, out: Tensor) -> None:
    """Launch the kernel that writes a weight [R, K] to `out`, contiguous, which is *modified*."""
    check_quantized("weight", weight)
    size_r, size_k = weight.shape
    is_cuda = weight.device.type == "cuda"
    if weight.format == "int4":
        scales = weight.scales.view(torch.int32)
        dequantize4_kernel[(-(-size_r // 64), size_k // PAIR_SIZE)](
            weight.codes, scales, out, size_r, scales.stride(0), K=size_k, BN=64, ASM=4 * is_cuda
        )
        return
    block_k = min(size_k & -size_k, 512)
    dequantize8_kernel[(-(-size_r // 16), size_k // block_k)](
        weight.codes,
        weight.scales,
        out,
        size_r,
        K=size_k,
        BN=16,
        BK=block_k,
        ASM=4 * (is_cuda and weight.format == "int8"),
    )
