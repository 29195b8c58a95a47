# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""RWKV-7's time mixing between its two products: LoRAs, gates, recurrence, group norm, output gate.

One program holds a head of a row: its 64 channels of every vector and its state [V, K]. Up to eight
rows the second halves of the four LoRAs are computed in the same launch, because reading those
small weights a few times from the L2 costs less than one more: here, or by a program of several
rows (`time_mix7_few`). More rows take `lora_up`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import (
    FLOATS,
    expect_contiguous,
    expect_device,
    expect_dtype,
    expect_head_size,
    expect_rows_of_slots,
    expect_shape,
)
from mrss_kernels._launch import dependent_launch, next_power_of_2
from mrss_kernels.caching import KEEP
from mrss_kernels.linear_cuts import NUM_MULTIPROCESSORS
from mrss_kernels.lora_up7 import load_up, lora_up, rank_sizes, sum_parts
from mrss_kernels.time_mix7_few import time_mix7_few_kernel

RANK_STEP = 64
"""LoRA ranks are padded with zeros to a multiple of this when weights are packed."""

VECTORS = ("w0", "a0", "v0", "k_k", "k_a", "r_k", "ln_x_weight", "ln_x_bias")
"""Rows of the packed `vectors [8, C]`, fp32."""

MAX_FUSED_ROWS = 8
"""Rows up to which the LoRAs' second halves are computed in the same launch."""

MAX_SINGLE_ROWS = 4
"""Rows up to which a program of one row may do so."""

SLIM_REGISTERS, MAX_SLIM_RANKS = 192, 640
"""A program of two rows does with so many registers a thread, which leave room for the next
product's, up to this sum of ranks, each rounded up to a power of two; with more it would spill."""

GROUP_NORM_EPS = 64e-5


@triton.jit
def _lora_row(
    p_z, up, stride, RANK: tl.constexpr, BR: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr
):
    """Return up [N, BR] @ act(z [BR]) in fp32."""
    o_d = tl.arange(0, BR)
    z = sum_parts(p_z + o_d, o_d < RANK, stride, PARTS)
    if ACT == 1:
        z = 2 * tl.sigmoid(2 * z) - 1
    if ACT == 2:
        z = tl.sigmoid(z)
    return tl.sum(up.to(tl.float32) * z[None, :], 1)


@triton.jit
def time_mix7_kernel(
    p_in,
    p_low,
    p_lora,
    p_up,
    p_vectors,
    p_first,
    p_pool,
    p_slots,
    p_offset,
    p_out,
    B,
    eps,
    H: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    RW: tl.constexpr,
    RA: tl.constexpr,
    RG: tl.constexpr,
    RV: tl.constexpr,
    BRW: tl.constexpr,
    BRA: tl.constexpr,
    BRG: tl.constexpr,
    BRV: tl.constexpr,
    PARTS: tl.constexpr,
    STACKED: tl.constexpr,
    FUSED: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (H, B). RV == 0 marks layer 0, which keeps its v for the others instead of mixing.

    STACKED: r, k, v are [3, B, C] and not the first 3C columns of rows of R.
    """
    i_h = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    C: tl.constexpr = H * N
    SUM: tl.constexpr = RW + RA + RG + RV
    o_n = tl.arange(0, N)
    o_c = i_h * N + o_n
    # All of this is older than the kernel in front of us, so it is read before waiting for it.
    slot = tl.load(p_slots + i_b).to(tl.int64)
    live = o_n * 0 + slot >= 0
    p_s = p_pool + (slot * H + i_h) * N * N + o_n[:, None] * N + o_n[None, :]
    state = tl.load(p_s, mask=live[:, None], other=0.0)
    k_k = tl.load(p_vectors + 3 * C + o_c)
    k_a = tl.load(p_vectors + 4 * C + o_c)
    r_k = tl.load(p_vectors + 5 * C + o_c)
    gn_w = tl.load(p_vectors + 6 * C + o_c)
    gn_b = tl.load(p_vectors + 7 * C + o_c)
    if FUSED:
        w0 = tl.load(p_vectors + o_c)
        a0 = tl.load(p_vectors + C + o_c)
        up_w = load_up(p_up, o_c, SUM, RW, BRW)
        up_a = load_up(p_up + RW, o_c, SUM, RA, BRA)
        up_g = load_up(p_up + RW + RA, o_c, SUM, RG, BRG)
        if RV > 0:
            v0 = tl.load(p_vectors + 2 * C + o_c)
            up_v = load_up(p_up + RW + RA + RG, o_c, SUM, RV, BRV)
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now, so that the next layer's kernel of this kind may read the state early as well.
        tl.extra.cuda.gdc_launch_dependents()
    stride = B * R
    at = i_b * C + o_c
    if STACKED:
        r = tl.load(p_in + at).to(tl.float32)
        k = tl.load(p_in + B * C + at).to(tl.float32)
        v = tl.load(p_in + 2 * B * C + at).to(tl.float32)
    else:
        p_row = p_in + i_b * R + o_c
        r = sum_parts(p_row, o_c < C, stride, PARTS)
        k = sum_parts(p_row + C, o_c < C, stride, PARTS)
        v = sum_parts(p_row + 2 * C, o_c < C, stride, PARTS)
    if FUSED:
        p_z = p_low + i_b * R
        w = w0 + _lora_row(p_z, up_w, stride, RW, BRW, PARTS, 1)
        w = -0.6065306597126334 * tl.sigmoid(w)
        a = tl.sigmoid(a0 + _lora_row(p_z + RW, up_a, stride, RA, BRA, PARTS, 0))
        g = _lora_row(p_z + RW + RA, up_g, stride, RG, BRG, PARTS, 2)
    else:
        w = tl.load(p_lora + at)
        a = tl.load(p_lora + B * C + at)
        g = tl.load(p_lora + 2 * B * C + at)
    if RV > 0:
        if FUSED:
            gate = tl.sigmoid(v0 + _lora_row(p_z + RW + RA + RG, up_v, stride, RV, BRV, PARTS, 0))
        else:
            gate = tl.load(p_lora + 3 * B * C + at)
        v += (tl.load(p_first + at, eviction_policy=KEEP) - v) * gate
    else:
        tl.store(p_first + at, v, eviction_policy=KEEP)
    kk = k * k_k
    kk = kk / tl.maximum(tl.sqrt(tl.sum(kk * kk, 0)), 1e-12)
    k = k * (1 + (a - 1) * k_a)
    s = state.to(tl.float32)
    removed = tl.sum(s * kk[None, :], 1)
    s = s * tl.exp(w)[None, :] - removed[:, None] * (kk * a)[None, :] + v[:, None] * k[None, :]
    tl.store(p_s, s.to(p_pool.dtype.element_ty), mask=live[:, None])
    y = tl.sum(s * r[None, :], 1)
    if OFFSET:
        y *= 1 + tl.load(p_offset + slot * C + o_c, mask=live, other=0.0).to(tl.float32)
    y -= tl.sum(y, 0) / N
    y = y / tl.sqrt(tl.sum(y * y, 0) / N + eps) * gn_w + gn_b
    y += tl.sum(r * k * r_k, 0) * v
    y = tl.where(live, y * g, 0.0).to(p_out.dtype.element_ty)
    tl.store(p_out + at, y, eviction_policy=KEEP)


def time_mix7(
    projected: Tensor,
    up: Tensor,
    vectors: Tensor,
    ranks: Sequence[int],
    v_first: Tensor,
    pool: Tensor,
    slots: Tensor,
    time_offset: Tensor | None = None,
    *,
    low: Tensor | None = None,
    fuse_rows: int = MAX_FUSED_ROWS,
) -> Tensor:
    """Advance one layer's recurrence by one token a row, from its projections to Wo's input.

    Args:
        projected: [P, B, 3C + sum(ranks)], parts to be added up: r, k, v and the first halves of
            the LoRAs of w, a, g, v, in this order and before their nonlinearities.
        up: second halves of the LoRAs [C, sum(ranks)], same order, fp16, bf16 or fp32.
        vectors: [8, C] fp32, rows as `VECTORS`; the decay of a token is
            exp(-0.6065 * sigmoid(w0 + ..)).
        ranks: of the LoRAs of w, a, g, v, multiples of 64; v's is 0 in layer 0.
        v_first: layer 0's values [B, C] fp32, *written* by layer 0 and read by the others.
        pool: the layer's states [S, H, V, K] fp32 or fp16, *modified*.
        slots: int64 [B], no slot twice; -1 is a padding row, which gives zeros.
        time_offset: the layer's output offsets by slot [S or more, C], or None.
        low: the first halves of the LoRAs [P, B, sum(ranks)]; then `projected` is r, k, v stacked
            [3, B, C], in one part.
        fuse_rows: up to so many rows the second halves are computed in the same launch; from five
            rows on only with heads of 64 channels and weights of 16 bits.

    Returns:
        Wo's input [B, C] in the dtype of `up`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    _check_time_mix(projected, low, up, vectors, ranks, v_first, pool, slots, time_offset)
    _, heads, size, _ = pool.shape
    stacked = low is not None
    if low is None:
        low = projected[..., 3 * heads * size :]
    parts, rows, _ = low.shape
    out = up.new_empty((rows, heads * size))
    if not rows:
        return out
    flags = {"H": heads, "N": size, "R": low.stride(1), **rank_sizes(ranks), "PARTS": parts}
    flags |= {"STACKED": stacked, "OFFSET": time_offset is not None}
    flags |= dependent_launch(out.device)
    group = few_rows_group(rows, heads) if rows <= fuse_rows else 0
    if group and size == 64 and up.element_size() == 2:
        # Where the next product starts early; the option is CUDA's.
        flags |= register_limit(group, ranks) if flags["PDL"] else {}
        time_mix7_few_kernel[(heads, -(-rows // group))](
            projected,
            low,
            up,
            vectors,
            v_first,
            pool,
            slots,
            time_offset,
            out,
            rows,
            GROUP_NORM_EPS,
            G=group,
            WARPS=8,
            num_warps=8,
            **flags,
        )
        return out
    fused = rows <= min(fuse_rows, MAX_SINGLE_ROWS)
    time_mix7_kernel[(heads, rows)](
        projected,
        low,
        None if fused else lora_up(low, up, vectors, ranks),
        up,
        vectors,
        v_first,
        pool,
        slots,
        time_offset,
        out,
        rows,
        GROUP_NORM_EPS,
        FUSED=fused,
        num_warps=8 if fused else 4 if rows < 32 else 2,
        **flags,
    )
    return out


def few_rows_group(rows: int, heads: int) -> int:
    """Return how many rows a program of `time_mix7_few` holds; 0: a row a program without it.

    As measured: it gains from five rows on, as it saves a launch, and with any rows where four of
    them would be more programs than there are multiprocessors.
    """
    all_at_once = rows <= MAX_SINGLE_ROWS and heads * MAX_SINGLE_ROWS <= NUM_MULTIPROCESSORS
    if rows > MAX_FUSED_ROWS or all_at_once:
        return 0
    return next((group for group in (1, 2) if heads * -(-rows // group) <= NUM_MULTIPROCESSORS), 4)


def register_limit(group: int, ranks: Sequence[int]) -> dict[str, int]:
    """Return the option that limits the registers of `time_mix7_few` where it spills none of them.

    Args:
        group: rows of a program.
        ranks: of the LoRAs, whose weights lie in registers in blocks of powers of two.
    """
    num_columns = sum(next_power_of_2(rank) for rank in ranks if rank)
    return {"maxnreg": SLIM_REGISTERS} if group == 2 and num_columns <= MAX_SLIM_RANKS else {}


def _check_time_mix(
    projected: Tensor,
    low: Tensor | None,
    up: Tensor,
    vectors: Tensor,
    ranks: Sequence[int],
    v_first: Tensor,
    pool: Tensor,
    slots: Tensor,
    time_offset: Tensor | None,
) -> None:
    num_slots, heads, size, _ = pool.shape
    channels, total = heads * size, sum(ranks)
    if projected.dim() != 3:
        raise ValueError(f"projected must have 3 dimensions, got {list(projected.shape)}")
    if len(ranks) != 4 or any(rank % RANK_STEP or rank < 0 for rank in ranks) or not all(ranks[:3]):
        raise ValueError(
            f"ranks must be 4 multiples of {RANK_STEP}, only the last of which may be 0, "
            f"got {list(ranks)}"
        )
    parts, rows, _ = projected.shape
    expect_head_size(size)
    if channels % RANK_STEP:
        raise ValueError(f"C must be a multiple of {RANK_STEP}, got {channels}")
    named = [("projected", projected), ("up", up), ("vectors", vectors)]
    named += [("v_first", v_first), ("pool", pool)]
    if low is None:
        expect_shape("projected", projected, (parts, rows, 3 * channels + total))
    else:
        expect_shape("projected", projected, (3, rows, channels))
        expect_shape("low", low, (low.shape[0], rows, total))
        expect_dtype("low", low, FLOATS)
        named.append(("low", low))
    expect_shape("up", up, (channels, total))
    expect_shape("vectors", vectors, (len(VECTORS), channels))
    expect_shape("v_first", v_first, (rows, channels))
    expect_shape("pool", pool, (num_slots, heads, size, size))
    expect_dtype("projected", projected, FLOATS)
    expect_dtype("up", up, FLOATS)
    expect_dtype("vectors", vectors, (torch.float32,))
    expect_dtype("v_first", v_first, (torch.float32,))
    expect_dtype("pool", pool, (torch.float32, torch.float16))
    expect_rows_of_slots(slots, rows, pool.device)
    if time_offset is not None:
        rows_of_offset = max(num_slots, time_offset.shape[0])
        expect_shape("time_offset", time_offset, (rows_of_offset, channels))
        expect_dtype("time_offset", time_offset, FLOATS)
        named.append(("time_offset", time_offset))
    for name, tensor in named:
        expect_contiguous(name, tensor)
        expect_device(name, tensor, pool.device)
