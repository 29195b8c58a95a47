# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""What stands around RWKV-6's recurrence over packed tokens: its decay before, its gate after.

A program takes a block of tokens of one head. Twins: `mrss_kernels.reference_ragged6`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import FLOATS, expect_dtype, expect_head_size, expect_shape
from mrss_kernels._launch import dependent_launch, next_power_of_2
from mrss_kernels.lora_down7 import expect_dense, sigmoid
from mrss_kernels.ragged_inputs6 import MixCut, choose_cut, expect_index, low_half
from mrss_kernels.time_mix6 import VECTORS

HEAD_NORM_EPS = 64e-5


class TimeInputs6(NamedTuple):
    """What the recurrence and the output read; all [T, C], in the weights' dtype but for w.

    Attributes:
        k: key.
        v: value.
        r: receptance.
        gate: of the output, before its SiLU.
        w: log decay, fp32.
    """

    k: Tensor
    v: Tensor
    r: Tensor
    gate: Tensor
    w: Tensor


@triton.jit
def time_inputs6_kernel(
    p_in,
    p_low,
    p_up,
    p_vectors,
    p_out,
    p_w,
    T,
    H: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    BW: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    STACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (H, T / BM). R is the distance from one row of the decay's first half to the next.

    STACKED: k, v, r and the gate stay where they are. Else they are the first 4C columns of rows of
    R, in parts, and are added up into out [4, T, C].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    C: tl.constexpr = H * N
    i_h = tl.program_id(0)
    i_m = tl.program_id(1).to(tl.int64) * BM
    o_m = tl.arange(0, BM)
    o_n = i_h * N + tl.arange(0, N)
    o_d = tl.arange(0, BW)
    m_d = o_d < W
    m_m = o_m < T - i_m
    o = o_m[:, None] * C + o_n[None, :]
    decay = tl.load(p_vectors + o_n)[None, :]
    up = tl.load(p_up + o_n[:, None] * W + o_d[None, :], mask=m_d[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    z = low_half(p_low + i_m * R, o_m, m_m, o_d, m_d, T * R, R, PARTS)
    decay += tl.dot(z.to(up.dtype), tl.trans(up), input_precision="ieee")
    tl.store(p_w + i_m * C + o, -tl.exp(decay), mask=m_m[:, None])
    if not STACKED:
        plane = i_m * 0 + T
        p_row = p_in + i_m * R + o_m[:, None] * R + o_n[None, :]
        for j in tl.static_range(4):
            x = tl.load(p_row + j * C, mask=m_m[:, None], other=0.0).to(tl.float32)
            for i in tl.static_range(1, PARTS):
                p_part = p_row + j * C + i * (T * R)
                x += tl.load(p_part, mask=m_m[:, None], other=0.0).to(tl.float32)
            p = p_out + (i_m + j * plane) * C + o
            tl.store(p, x.to(p_out.dtype.element_ty), mask=m_m[:, None])


@triton.jit
def time_output6_kernel(
    p_y,
    p_gate,
    p_vectors,
    p_index,
    p_offset,
    p_out,
    T,
    eps,
    out_scale,
    H: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (H, T / BM)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    C: tl.constexpr = H * N
    i_m = tl.program_id(1).to(tl.int64) * BM
    o_m = tl.arange(0, BM)
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    m_row = o_m < T - i_m
    m_m = m_row[:, None]
    o = o_m[:, None] * C + o_n[None, :]
    gn_w = tl.load(p_vectors + 2 * C + o_n)[None, :]
    gn_b = tl.load(p_vectors + 3 * C + o_n)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    # Nothing waits for the slots: what padding tokens give is dropped at the end.
    slot = tl.load(p_index + 2 * T + i_m + o_m, mask=m_row, other=-1)
    y = tl.load(p_y + i_m * C + o, mask=m_m, other=0.0).to(tl.float32)
    g = tl.load(p_gate + i_m * C + o, mask=m_m, other=0.0).to(tl.float32)
    live = (slot >= 0)[:, None]
    if p_offset is not None:
        p_offset += slot.to(tl.int64)[:, None] * C + o_n[None, :]
        y *= 1 + tl.load(p_offset, mask=live, other=0.0).to(tl.float32)
    y -= (tl.sum(y, 1) / N)[:, None]
    y = y * (1.0 / tl.sqrt(tl.sum(y * y, 1) / N + eps))[:, None] * gn_w + gn_b
    y *= g * sigmoid(g) * out_scale
    y = tl.where(live, y, 0.0).to(p_out.dtype.element_ty)
    tl.store(p_out + i_m * C + o, y, mask=m_m)


def time_inputs6(
    projected: Tensor,
    up: Tensor,
    vectors: Tensor,
    head_size: int,
    *,
    low: Tensor | None = None,
    cut: MixCut | None = None,
) -> TimeInputs6:
    """Compute what the recurrence reads from k, v, r, the gate and the decay's first half.

    `w = -exp(time_decay + up @ tanh(low))`.

    Args:
        projected: parts [P, T, 4C + R] to be added up: k, v, r, the gate and the first half of the
            decay's LoRA before its tanh, of which the first W columns count; or, with `low`, k, v,
            r and the gate [4, T, C].
        up: second half of that LoRA [C, W], fp16, bf16 or fp32; W at most R.
        vectors: [4, C] fp32, rows as `mrss_kernels.time_mix6.VECTORS`.
        head_size: N.
        low: the LoRA's first half [T, R] before its tanh.
        cut: how to cut it; None takes what suits T.

    Returns:
        `TimeInputs6` in the dtype of `up`; all but w are `projected`'s own with `low`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    num_tokens, channels, rank = _check_time_inputs(projected, up, vectors, head_size, low)
    w = up.new_empty((num_tokens, channels), dtype=torch.float32)
    planes = projected if low is not None else up.new_empty((4, num_tokens, channels))
    if num_tokens:
        block_m, num_warps = cut or choose_cut(num_tokens)
        first = projected[..., 4 * channels :] if low is None else low
        time_inputs6_kernel[(channels // head_size, -(-num_tokens // block_m))](
            projected, first, up, vectors, planes, w, num_tokens,
            H=channels // head_size, N=head_size, R=first.stride(-2), W=rank,
            BW=next_power_of_2(max(rank, 16)), BM=block_m,
            PARTS=1 if low is not None else projected.shape[0], STACKED=low is not None,
            num_warps=num_warps, **dependent_launch(w.device),
        )  # fmt: skip
    k, v, r, gate = planes
    return TimeInputs6(k, v, r, gate, w)


def time_output6(
    y: Tensor,
    gate: Tensor,
    vectors: Tensor,
    head_size: int,
    index: Tensor,
    time_offset: Tensor | None = None,
    *,
    y_scale: float = 1.0,
    out_scale: float = 1.0,
    cut: MixCut | None = None,
) -> Tensor:
    """Compute the output projection's input from what the recurrence returned.

    `out = GN((1 + offset) y / y_scale) * SiLU(gate) * out_scale`, a group a head.

    Args:
        y: of the recurrence, times `y_scale` [T, C], any float dtype.
        gate: [T, C] fp16, bf16 or fp32.
        vectors: [4, C] fp32, rows as `mrss_kernels.time_mix6.VECTORS`.
        head_size: N.
        index: int32 [3, T] of `ragged_index`; tokens of padding sequences give zeros.
        time_offset: the layer's output offsets by slot [S or more, C], or None.
        y_scale: see `y`.
        out_scale: the result is multiplied by it.
        cut: how to cut it; None takes what suits T.

    Returns:
        [T, C] in the dtype of `gate`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    num_tokens, channels = y.shape
    expect_head_size(head_size)
    expect_shape("gate", gate, (num_tokens, channels))
    expect_index(index, num_tokens)
    _check_vectors(vectors, channels)
    named = [("y", y), ("gate", gate)]
    if time_offset is not None:
        expect_shape("time_offset", time_offset, (time_offset.shape[0], channels))
        named.append(("time_offset", time_offset))
    for name, tensor in named:
        expect_dtype(name, tensor, FLOATS)
    expect_dense([*named, ("vectors", vectors), ("index", index)])
    out = gate.new_empty((num_tokens, channels))
    if num_tokens:
        block_m, num_warps = cut or choose_cut(num_tokens)
        time_output6_kernel[(channels // head_size, -(-num_tokens // block_m))](
            y, gate, vectors, index, time_offset, out, num_tokens,
            # The norm takes the scale away again, but for what keeps it from dividing by 0.
            HEAD_NORM_EPS * y_scale**2, out_scale,
            H=channels // head_size, N=head_size, BM=block_m, num_warps=num_warps,
            **dependent_launch(out.device),
        )  # fmt: skip
    return out


def _check_time_inputs(
    projected: Tensor, up: Tensor, vectors: Tensor, head_size: int, low: Tensor | None
) -> tuple[int, int, int]:
    """Return T, C and W."""
    if projected.dim() != 3:
        raise ValueError(f"projected must have 3 dimensions, got {list(projected.shape)}")
    parts, num_tokens, width = projected.shape
    channels, rank = up.shape
    expect_head_size(head_size)
    if channels % head_size:
        raise ValueError(f"C must be a multiple of the head size {head_size}, got {channels}")
    named = [("up", up), ("projected", projected)]
    if low is None:
        padded = max(width - 4 * channels, rank)
        expect_shape("projected", projected, (parts, num_tokens, 4 * channels + padded))
    else:
        expect_shape("projected", projected, (4, num_tokens, channels))
        expect_shape("low", low, (num_tokens, max(low.shape[-1], rank)))
        expect_dtype("projected", projected, (up.dtype,))
        named.append(("low", low))
    _check_vectors(vectors, channels)
    for name, tensor in named:
        expect_dtype(name, tensor, FLOATS)
    expect_dense([*named, ("vectors", vectors)])
    return num_tokens, channels, rank


def _check_vectors(vectors: Tensor, channels: int) -> None:
    expect_shape("vectors", vectors, (len(VECTORS), channels))
    expect_dtype("vectors", vectors, (torch.float32,))
