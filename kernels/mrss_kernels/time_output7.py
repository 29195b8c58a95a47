# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""What follows RWKV-7's recurrence over packed tokens: group norm, bonus and output gate.

A program takes a block of tokens of one head and multiplies the second half of the output gate's
LoRA itself (`ragged_lora7`). Twin: `mrss_kernels.reference_ragged`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import (
    FLOATS,
    expect_device,
    expect_dtype,
    expect_head_size,
    expect_shape,
)
from mrss_kernels._launch import dependent_launch
from mrss_kernels.lora_down7 import expect_dense, expect_ranks
from mrss_kernels.ragged_lora7 import TimeCut, choose_cut, lora_up_tile
from mrss_kernels.time_inputs7 import TimeInputs
from mrss_kernels.time_mix7 import GROUP_NORM_EPS, RANK_STEP, VECTORS


@triton.jit
def time_output7_kernel(
    p_y,
    p_v,
    p_bonus,
    p_low,
    p_up,
    p_vectors,
    p_index,
    p_offset,
    p_out,
    T,
    eps,
    H: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    FIRST: tl.constexpr,
    RG: tl.constexpr,
    SUM: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATED: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (H, T / BM). The output gate's LoRA has RG columns of SUM, from FIRST on.

    ACTIVATED: its first half has had its sigmoid.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    C: tl.constexpr = H * N
    i_h = tl.program_id(0)
    i_m = tl.program_id(1).to(tl.int64) * BM
    at = i_m * C + i_h * N
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, N)
    o = o_m[:, None] * C + o_n[None, :]
    m_row = o_m < T - i_m
    # Rows as in `time_mix7.VECTORS`.
    p_vectors += i_h * N + o_n
    gn_w = tl.load(p_vectors + 6 * C)[None, :]
    gn_b = tl.load(p_vectors + 7 * C)[None, :]
    p_up += i_h * N * SUM + FIRST
    SIGMOID: tl.constexpr = 0 if ACTIVATED else 2
    if PDL:
        tl.extra.cuda.gdc_wait()
    m_m = m_row[:, None]
    # Nothing waits for the slots: what padding tokens give is dropped at the end.
    slot = tl.load(p_index + 2 * T + i_m + o_m, mask=m_row, other=-1)
    y = tl.load(p_y + at + o, mask=m_m, other=0.0)
    bonus = tl.load(p_bonus + i_m * H + i_h + o_m * H, mask=m_row, other=0.0)
    v = tl.load(p_v + at + o, mask=m_m, other=0.0)
    p_low += i_m * R + FIRST
    g = lora_up_tile(
        p_low, p_up, o_m, m_m, o_n, T * R, R, BM, N, SUM, RG, BR, PARTS, SIGMOID, STAGES
    )
    y = y.to(tl.float32)
    live = (slot >= 0)[:, None]
    if p_offset is not None:
        p_offset += i_h * N + slot.to(tl.int64)[:, None] * C + o_n[None, :]
        y *= 1 + tl.load(p_offset, mask=live, other=0.0).to(tl.float32)
    y -= (tl.sum(y, 1) / N)[:, None]
    y = y * (1.0 / tl.sqrt(tl.sum(y * y, 1) / N + eps))[:, None] * gn_w + gn_b
    y = (y + bonus[:, None] * v.to(tl.float32)) * g
    y = tl.where(live, y, 0.0).to(p_out.dtype.element_ty)
    tl.store(p_out + at + o, y, mask=m_m)


def time_output7(
    y: Tensor,
    inputs: TimeInputs,
    low: Tensor,
    up: Tensor,
    vectors: Tensor,
    ranks: Sequence[int],
    index: Tensor,
    time_offset: Tensor | None = None,
    *,
    activated: bool = True,
    cut: TimeCut | None = None,
) -> Tensor:
    """Compute the output projection's input from what the recurrence returned.

    `out = (GN((1 + offset) y) + bonus v) (low_g @ up_g^T)`.

    Args:
        y: of the recurrence [T, C], any float dtype.
        inputs: of `time_inputs7`; v and bonus are read.
        low: first halves of the LoRAs [P, T, sum(ranks)], parts to be added up; it may be a slice
            of the last dimension.
        up: second halves of the LoRAs [C, sum(ranks)].
        vectors: [8, C] fp32, rows as `mrss_kernels.time_mix7.VECTORS`.
        ranks: of the LoRAs of w, a, g, v.
        index: int32 [3, T] of `ragged_index`; tokens of padding sequences give zeros.
        time_offset: the layer's output offsets by slot [S or more, C], or None.
        activated: whether `low` has had its sigmoid.
        cut: how to cut it; None takes what suits T.

    Returns:
        [T, C] in the dtype of `up`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    _check_time_output(y, inputs, low, up, vectors, ranks, index, time_offset)
    num_tokens, channels = y.shape
    heads = inputs.bonus.shape[1]
    out = up.new_empty((num_tokens, channels))
    if num_tokens:
        cut = cut or choose_cut(num_tokens)
        time_output7_kernel[(heads, -(-num_tokens // cut.block_m))](
            y,
            inputs.v,
            inputs.bonus,
            low,
            up,
            vectors,
            index,
            time_offset,
            out,
            num_tokens,
            GROUP_NORM_EPS,
            H=heads,
            N=channels // heads,
            R=low.stride(1),
            FIRST=ranks[0] + ranks[1],
            RG=ranks[2],
            SUM=sum(ranks),
            BR=RANK_STEP,
            BM=cut.block_m,
            PARTS=low.shape[0],
            ACTIVATED=activated,
            STAGES=cut.num_stages,
            num_warps=cut.num_warps,
            **dependent_launch(up.device),
        )
    return out


def _check_time_output(
    y: Tensor,
    inputs: TimeInputs,
    low: Tensor,
    up: Tensor,
    vectors: Tensor,
    ranks: Sequence[int],
    index: Tensor,
    time_offset: Tensor | None,
) -> None:
    num_tokens, channels = y.shape
    heads = inputs.bonus.shape[1]
    expect_ranks(ranks)
    expect_head_size(channels // heads)
    parts, total = low.shape[0], sum(ranks)
    expect_shape("low", low, (parts, num_tokens, total))
    expect_shape("v", inputs.v, (num_tokens, channels))
    expect_shape("bonus", inputs.bonus, (num_tokens, heads))
    expect_shape("up", up, (channels, total))
    expect_shape("vectors", vectors, (len(VECTORS), channels))
    expect_dtype("vectors", vectors, (torch.float32,))
    expect_shape("index", index, (3, num_tokens))
    expect_dtype("index", index, (torch.int32,))
    named = [("y", y), ("v", inputs.v), ("bonus", inputs.bonus), ("up", up), ("vectors", vectors)]
    if time_offset is not None:
        expect_shape("time_offset", time_offset, (time_offset.shape[0], channels))
        named.append(("time_offset", time_offset))
    for name, tensor in [*named, ("low", low)]:
        expect_dtype(name, tensor, FLOATS)
    expect_dense([*named, ("index", index)])
    expect_device("low", low, y.device)
    part, row, one = low.stride()
    if num_tokens and (one != 1 or (parts > 1 and part != num_tokens * row)):
        raise ValueError(
            f"low must be dense or a slice of a dense tensor's last dimension, got strides "
            f"{[part, row, one]} for shape {list(low.shape)}"
        )
