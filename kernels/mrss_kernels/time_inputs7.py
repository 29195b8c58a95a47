# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""What RWKV-7's recurrence over packed tokens reads: decay, learning rate, keys and values.

A program takes a block of tokens of one head and multiplies the second halves of the LoRAs of w, a
and v itself (`ragged_lora7`). Twin: `mrss_kernels.reference_ragged`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import FLOATS, expect_dtype, expect_head_size, expect_shape
from mrss_kernels._launch import dependent_launch
from mrss_kernels.lora_down7 import expect_dense, expect_ranks, rank_names, sigmoid
from mrss_kernels.lora_up7 import sum_parts
from mrss_kernels.ragged_lora7 import TimeCut, choose_cut, lora_up_tile
from mrss_kernels.time_mix7 import RANK_STEP, VECTORS


class TimeInputs(NamedTuple):
    """What the recurrence and the output read; all [T, C], but for `bonus`.

    Attributes:
        r: receptance, in the weights' dtype, as all but w and bonus.
        w: log decay, fp32.
        k: key, moved towards its in-context learning rate.
        v: value, mixed with layer 0's.
        kk: removal key, of unit norm a head.
        a: in-context learning rate.
        bonus: sum over a head of r k r_k, [T, H] fp32.
    """

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    kk: Tensor
    a: Tensor
    bonus: Tensor


@triton.jit
def time_inputs7_kernel(
    p_in,
    p_low,
    p_up,
    p_vectors,
    p_first,
    p_r,
    p_w,
    p_k,
    p_v,
    p_kk,
    p_a,
    p_bonus,
    T,
    H: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    RW: tl.constexpr,
    RA: tl.constexpr,
    RG: tl.constexpr,
    RV: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    STACKED: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (H, T / BM). RW to RV are the LoRAs' ranks; rows of their first halves are R apart.

    STACKED: r, k, v are [3, T, C] and v is written in place; r is left where it is. Else they are
    the first 3C columns of rows of R, in parts, and the first halves are not activated yet.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    C: tl.constexpr = H * N
    SUM: tl.constexpr = RW + RA + RG + RV
    i_h = tl.program_id(0)
    # Pointers move to the program's first element, so that offsets fit in 32 bits.
    i_m = tl.program_id(1).to(tl.int64) * BM
    at = i_m * C + i_h * N
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, N)
    o = o_m[:, None] * C + o_n[None, :]
    m_row = o_m < T - i_m
    m_m = m_row[:, None]
    # Rows as in `time_mix7.VECTORS`.
    p_vectors += i_h * N + o_n
    w0 = tl.load(p_vectors)[None, :]
    a0 = tl.load(p_vectors + C)[None, :]
    k_k = tl.load(p_vectors + 3 * C)[None, :]
    k_a = tl.load(p_vectors + 4 * C)[None, :]
    r_k = tl.load(p_vectors + 5 * C)[None, :]
    p_up += i_h * N * SUM
    TANH: tl.constexpr = 0 if STACKED else 1
    if PDL:
        tl.extra.cuda.gdc_wait()
    p_low += i_m * R
    stride = T * R
    # All that comes from the memory is asked for at once: a program waits for it only once, while
    # it multiplies the first LoRA, whose halves are in the L2.
    if STACKED:
        plane = (i_m * 0 + T) * C
        p_value = p_in + 2 * plane + at + o
        r = tl.load(p_in + at + o, mask=m_m, other=0.0)
        k = tl.load(p_in + plane + at + o, mask=m_m, other=0.0)
    else:
        p_row = p_in + i_m * R + i_h * N + o_m[:, None] * R + o_n[None, :]
        p_value = p_row + 2 * C
        r = sum_parts(p_row, m_m, stride, PARTS).to(p_r.dtype.element_ty)
        k = sum_parts(p_row + C, m_m, stride, PARTS)
        tl.store(p_r + at + o, r, mask=m_m)
    if not STACKED:
        v = sum_parts(p_value, m_m, stride, PARTS)
    elif RV > 0:
        v = tl.load(p_value, mask=m_m, other=0.0)
    if RV > 0:
        first = tl.load(p_first + at + o, mask=m_m, other=0.0)
    z = lora_up_tile(p_low, p_up, o_m, m_m, o_n, stride, R, BM, N, SUM, RW, BR, PARTS, TANH, STAGES)
    tl.store(p_w + at + o, -0.6065306597126334 * sigmoid(w0 + z), mask=m_m)
    p_low += RW
    p_up += RW
    z = lora_up_tile(p_low, p_up, o_m, m_m, o_n, stride, R, BM, N, SUM, RA, BR, PARTS, 0, STAGES)
    a = sigmoid(a0 + z)
    tl.store(p_a + at + o, a.to(p_a.dtype.element_ty), mask=m_m)
    k = k.to(tl.float32)
    kk = k * k_k
    kk *= (1.0 / tl.maximum(tl.sqrt(tl.sum(kk * kk, 1)), 1e-12))[:, None]
    tl.store(p_kk + at + o, kk.to(p_kk.dtype.element_ty), mask=m_m)
    k = k * (1 + (a - 1) * k_a)
    tl.store(p_k + at + o, k.to(p_k.dtype.element_ty), mask=m_m)
    bonus = tl.sum(r.to(tl.float32) * k * r_k, 1)
    tl.store(p_bonus + i_m * H + i_h + o_m * H, bonus, mask=m_row)
    if RV > 0:
        v0 = tl.load(p_vectors + 2 * C)[None, :]
        p_low += RA + RG
        p_up += RA + RG
        z = lora_up_tile(
            p_low, p_up, o_m, m_m, o_n, stride, R, BM, N, SUM, RV, BR, PARTS, 0, STAGES
        )
        v = v.to(tl.float32)
        v += (first.to(tl.float32) - v) * sigmoid(v0 + z)
    if RV > 0 or not STACKED:
        tl.store(p_v + at + o, v.to(p_v.dtype.element_ty), mask=m_m)


def time_inputs7(
    projected: Tensor,
    up: Tensor,
    vectors: Tensor,
    ranks: Sequence[int],
    v_first: Tensor | None,
    head_size: int,
    *,
    low: Tensor | None = None,
    cut: TimeCut | None = None,
) -> TimeInputs:
    """Compute what the recurrence reads from r, k, v and the first halves of the LoRAs.

    Args:
        projected: parts [P, T, 3C + sum(ranks)] to be added up: r, k, v and the first halves of the
            LoRAs of w, a, g, v before their activations; or, with `low`, r, k, v [3, T, C], whose
            v is *modified* to the mixed one.
        up: second halves of the LoRAs [C, sum(ranks)], same order, fp16, bf16 or fp32.
        vectors: [8, C] fp32, rows as `mrss_kernels.time_mix7.VECTORS`.
        ranks: of the LoRAs of w, a, g, v, multiples of 64; v's is 0 in layer 0.
        v_first: layer 0's values [T, C] in the dtype of `up`; None in layer 0.
        head_size: N.
        low: first halves [T, sum(ranks)], activated.
        cut: how to cut it; None takes what suits T.

    Returns:
        `TimeInputs` in the dtype of `up`; r and v are `projected`'s own with `low`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    num_tokens, total = projected.shape[1], sum(ranks)
    channels = up.shape[0]
    _check_time_inputs(projected, up, vectors, ranks, v_first, head_size, low)
    heads = channels // head_size
    w = up.new_empty((num_tokens, channels), dtype=torch.float32)
    bonus = up.new_empty((num_tokens, heads), dtype=torch.float32)
    planes = up.new_empty((3 if low is not None else 5, num_tokens, channels))
    k, kk, a = planes[:3]
    r, v = (projected[0], projected[2]) if low is not None else planes[3:]
    if num_tokens:
        cut = cut or choose_cut(num_tokens)
        time_inputs7_kernel[(heads, -(-num_tokens // cut.block_m))](
            projected,
            projected[..., 3 * channels :] if low is None else low,
            up,
            vectors,
            v_first,
            r,
            w,
            k,
            v,
            kk,
            a,
            bonus,
            num_tokens,
            H=heads,
            N=head_size,
            R=projected.shape[2] if low is None else total,
            **rank_names(ranks),
            BR=RANK_STEP,
            BM=cut.block_m,
            PARTS=projected.shape[0] if low is None else 1,
            STACKED=low is not None,
            STAGES=cut.num_stages,
            num_warps=cut.num_warps,
            **dependent_launch(up.device),
        )
    return TimeInputs(r, w, k, v, kk, a, bonus)


def _check_time_inputs(
    projected: Tensor,
    up: Tensor,
    vectors: Tensor,
    ranks: Sequence[int],
    v_first: Tensor | None,
    head_size: int,
    low: Tensor | None,
) -> None:
    if projected.dim() != 3:
        raise ValueError(f"projected must have 3 dimensions, got {list(projected.shape)}")
    parts, num_tokens, _ = projected.shape
    channels, total = up.shape[0], sum(ranks)
    expect_ranks(ranks)
    expect_head_size(head_size)
    if channels % head_size or channels % RANK_STEP:
        raise ValueError(
            f"C must be a multiple of {RANK_STEP} and of the head size {head_size}, got {channels}"
        )
    named = [("up", up), ("projected", projected), ("vectors", vectors)]
    if low is None:
        expect_shape("projected", projected, (parts, num_tokens, 3 * channels + total))
    else:
        expect_shape("projected", projected, (3, num_tokens, channels))
        expect_shape("low", low, (num_tokens, total))
        expect_dtype("projected", projected, (up.dtype,))
        named.append(("low", low))
    expect_shape("up", up, (channels, total))
    expect_shape("vectors", vectors, (len(VECTORS), channels))
    expect_dtype("vectors", vectors, (torch.float32,))
    if (v_first is None) != (ranks[3] == 0):
        raise ValueError("v_first must be given exactly where v has a LoRA")
    if v_first is not None:
        expect_shape("v_first", v_first, (num_tokens, channels))
        named.append(("v_first", v_first))
    for name, tensor in named:
        expect_dtype(name, tensor, FLOATS)
    expect_dense(named)
