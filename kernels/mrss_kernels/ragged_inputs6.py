# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""RWKV-6's five mixed inputs over packed tokens, from the codes that say how far each moves.

The ragged twin of `time_mix6.mix_inputs`. Twin: `mrss_kernels.reference_ragged6`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import FLOATS, expect_dtype, expect_shape
from mrss_kernels._launch import dependent_launch, next_power_of_2
from mrss_kernels.lora_down7 import expect_dense, sigmoid
from mrss_kernels.rows_linear import GROUP_LEN
from mrss_kernels.time_mix6 import NUM_INPUTS


class MixCut(NamedTuple):
    """How kernels over packed tokens are cut: tokens a program, and warps."""

    block_m: int
    num_warps: int


@triton.jit
def low_half(p, o_m, m_m, o_d, m_d, stride, R, PARTS: tl.constexpr):
    """Add up the parts of a LoRA's first half [BM, BD], in order, and take their tanh."""
    p += o_m[:, None] * R + o_d[None, :]
    mask = m_m[:, None] & m_d[None, :]
    z = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, PARTS):
        z += tl.load(p + i * stride, mask=mask, other=0.0).to(tl.float32)
    return 2 * sigmoid(2 * z) - 1


@triton.jit
def ragged_inputs6_kernel(
    p_h,
    p_codes,
    p_up,
    p_mix,
    p_before,
    p_index,
    p_out,
    T,
    C: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PARTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (C / BN, T / BM). A program makes all five inputs, so that h is read once."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    # Pointers move to the program's first token, so that offsets fit in 32 bits.
    i_m = tl.program_id(1).to(tl.int64) * BM
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_m = o_m < T - i_m
    o = o_m[:, None] * C + o_n[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    first = tl.load(p_index + i_m + o_m, mask=m_m, other=0)
    begins = first >= 0
    h = tl.load(p_h + i_m * C + o, mask=m_m[:, None], other=0.0)
    # One of the two is masked away and reads as 0.
    m_before = (m_m & begins)[:, None]
    m_last = (m_m & (begins == 0))[:, None]
    p_b = p_before + first.to(tl.int64)[:, None] * C + o_n[None, :]
    delta = tl.load(p_b, mask=m_before, other=0.0).to(tl.float32)
    delta += tl.load(p_h + (i_m - 1) * C + o, mask=m_last, other=0.0)
    delta -= h
    p_codes += i_m * (INPUTS * D)
    plane = i_m * 0 + T
    for i in tl.static_range(INPUTS):
        p_tile = p_up + (i * C + o_n)[:, None] * D + o_d[None, :]
        up = tl.load(p_tile, mask=m_d[None, :], other=0.0)
        stride = T * (INPUTS * D)
        z = low_half(p_codes + i * D, o_m, m_m, o_d, m_d, stride, INPUTS * D, PARTS)
        moved = tl.dot(z.to(up.dtype), tl.trans(up), input_precision="ieee")
        moved += tl.load(p_mix + i * C + o_n)[None, :]
        out = (h + delta * moved).to(p_out.dtype.element_ty)
        tl.store(p_out + (i_m + i * plane) * C + o, out, mask=m_m[:, None])


def ragged_inputs6(
    h: Tensor,
    codes: Tensor,
    up: Tensor,
    mix: Tensor,
    before: Tensor,
    index: Tensor,
    *,
    cut: MixCut | None = None,
) -> Tensor:
    """Mix a layer's five inputs with the token before, each by its own learned amount.

    `out[m] = h + (h of the token before - h) * (mix[m] + up[m] @ tanh(codes[m]))`.

    Args:
        h: the normalised tokens [T, C] fp32; C a multiple of 64.
        codes: [P, T, 5 D], parts to be added up, five codes of rank D before their tanh.
        up: second halves of the mixing's LoRAs [5, C, D], fp16, bf16 or fp32.
        mix: [5, C] fp32.
        before: what stands before each sequence's first token [n, C].
        index: int32 [3, T] of `ragged_index`.
        cut: how to cut it; None takes what suits T.

    Returns:
        The mixed inputs [5, T, C] in the dtype of `up`, in the order of the codes.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    num_tokens, channels = h.shape
    rank = up.shape[-1]
    expect_shape("up", up, (NUM_INPUTS, channels, rank))
    expect_shape("codes", codes, (codes.shape[0], num_tokens, NUM_INPUTS * rank))
    expect_shape("mix", mix, (NUM_INPUTS, channels))
    expect_shape("before", before, (before.shape[0], channels))
    expect_index(index, num_tokens)
    for name, tensor, dtypes in (
        ("h", h, (torch.float32,)),
        ("mix", mix, (torch.float32,)),
        ("codes", codes, FLOATS),
        ("up", up, FLOATS),
        ("before", before, FLOATS),
    ):
        expect_dtype(name, tensor, dtypes)
    named = [("h", h), ("codes", codes), ("up", up), ("mix", mix), ("before", before)]
    expect_dense([*named, ("index", index)])
    if channels % GROUP_LEN:
        raise ValueError(f"C must be a multiple of {GROUP_LEN}, got {channels}")
    out = up.new_empty((NUM_INPUTS, num_tokens, channels))
    if num_tokens:
        block_m, num_warps = cut or choose_cut(num_tokens)
        ragged_inputs6_kernel[(channels // 64, -(-num_tokens // block_m))](
            h, codes, up, mix, before, index, out, num_tokens,
            # A dot needs 16 at least.
            C=channels, D=rank, BD=next_power_of_2(max(rank, 16)), PARTS=codes.shape[0],
            INPUTS=NUM_INPUTS, BM=block_m, BN=64, num_warps=num_warps,
            **dependent_launch(out.device),
        )  # fmt: skip
    return out


def choose_cut(num_tokens: int) -> MixCut:
    """Return what suits T tokens."""
    # Few tokens a program for latency, more so that the LoRAs' halves are read less often.
    return MixCut(16, 4) if num_tokens <= 128 else MixCut(64, 4)


def expect_index(index: Tensor, num_tokens: int) -> None:
    """Raise `ValueError` unless this can be the index of T tokens."""
    expect_shape("index", index, (3, num_tokens))
    expect_dtype("index", index, (torch.int32,))
