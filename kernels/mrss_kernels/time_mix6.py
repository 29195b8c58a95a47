# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""RWKV-6's time mixing around its large product: the five inputs, and all that follows.

`mix_inputs` moves each input to the token before by what its codes say. `time_mix6` has a head of a
row a program, with its state [K, V]: decay LoRA, recurrence, group norm, output gate.
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
    expect_head_size,
    expect_rows_of_slots,
    expect_shape,
)
from mrss_kernels._launch import dependent_launch, next_power_of_2
from mrss_kernels.caching import KEEP
from mrss_kernels.linear_cuts import choose_config
from mrss_kernels.lora_up7 import sum_parts
from mrss_kernels.rows_linear import GROUP_LEN, MAX_ROWS, rows_linear

NUM_INPUTS = 5
"""The inputs of decay, key, value, receptance and gate, in the order of the codes."""

VECTORS = ("time_decay", "time_faaaa", "ln_x_weight", "ln_x_bias")
"""Rows of the packed `vectors [4, C]`, fp32."""

MAX_SINGLE_ROWS = 4
"""Rows up to which `mix_inputs` has a row a program, on the ordinary cores."""

MAX_CODE_PARTS = 256
"""Parts times rows of the codes' product at most: a reader of many rows reads them over and over.
"""


@triton.jit
def mix_inputs_kernel(
    p_h,
    p_codes,
    p_up,
    p_mix,
    p_shift,
    p_slots,
    p_out,
    B,
    C: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (C / BN, 5, B / BM). One row goes over the ordinary cores, several over the others."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    i_x = tl.program_id(1)
    o_m = tl.program_id(2).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = o_m < B
    up = tl.load(
        p_up + (i_x * C + o_n)[:, None] * D + o_d[None, :], mask=(o_d < D)[None, :], other=0.0
    )
    mix = tl.load(p_mix + i_x * C + o_n)
    slots = tl.load(p_slots + o_m, mask=m_m, other=-1).to(tl.int64)
    # Written by the step before and read by this one until `time_mix6`: no need to wait.
    previous = tl.load(
        p_shift + slots[None, :] * C + o_n[:, None],
        mask=(slots >= 0)[None, :] & (o_n < C)[:, None],
        other=0.0,
    ).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    p_z = p_codes + o_m[:, None] * (5 * D) + i_x * D + o_d[None, :]
    z = sum_parts(p_z, m_m[:, None] & (o_d < D)[None, :], B * (5 * D), PARTS)
    z = 2 * tl.sigmoid(2 * z) - 1
    if BM == 1:
        moved = tl.sum(up.to(tl.float32) * z, 1)[:, None]
    else:
        moved = tl.dot(up, tl.trans(z.to(up.dtype)), input_precision="ieee")
    m_o = m_m[None, :] & (o_n < C)[:, None]
    p_tile = p_h + o_m[None, :] * C + o_n[:, None]
    h = tl.load(p_tile, mask=m_o, other=0.0, eviction_policy=KEEP)
    out = h + (previous - h) * (mix[:, None] + moved)
    p_o = p_out + (i_x * B + o_m)[None, :] * C + o_n[:, None]
    tl.store(p_o, out.to(p_out.dtype.element_ty), mask=m_o, eviction_policy=KEEP)


@triton.jit
def time_mix6_kernel(
    p_in,
    p_low,
    p_up,
    p_vectors,
    p_h,
    p_shift,
    p_pool,
    p_slots,
    p_offset,
    p_out,
    B,
    eps,
    out_scale,
    H: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    BW: tl.constexpr,
    PARTS: tl.constexpr,
    STACKED: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (H, B). R is the distance from one row of the decay's first half to the next.

    STACKED: k, v, r, g are [4, B, C] and not the first 4C columns of rows of R.
    """
    i_h = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    C: tl.constexpr = H * N
    o_n = tl.arange(0, N)
    o_d = tl.arange(0, BW)
    o_c = i_h * N + o_n
    # All of this is older than the kernel in front of us, so it is read before waiting for it.
    slot = tl.load(p_slots + i_b).to(tl.int64)
    live = o_n * 0 + slot >= 0
    p_s = p_pool + (slot * H + i_h) * N * N + o_n[:, None] * N + o_n[None, :]
    state = tl.load(p_s, mask=live[:, None], other=0.0)
    # Transposed, or it and the state would take one layout, which the state's store cannot have.
    up = tl.load(p_up + o_d[:, None] + o_c[None, :] * W, mask=(o_d < W)[:, None], other=0.0)
    decay = tl.load(p_vectors + o_c)
    bonus = tl.load(p_vectors + C + o_c)
    gn_w = tl.load(p_vectors + 2 * C + o_c)
    gn_b = tl.load(p_vectors + 3 * C + o_c)
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now, so that the next layer's kernel of this kind may read the state early as well.
        tl.extra.cuda.gdc_launch_dependents()
    at = i_b * C + o_c
    if STACKED:
        k = tl.load(p_in + at).to(tl.float32)
        v = tl.load(p_in + B * C + at).to(tl.float32)
        r = tl.load(p_in + 2 * B * C + at).to(tl.float32)
        g = tl.load(p_in + 3 * B * C + at).to(tl.float32)
    else:
        p_row = p_in + i_b * R + o_c
        k = sum_parts(p_row, o_c < C, B * R, PARTS)
        v = sum_parts(p_row + C, o_c < C, B * R, PARTS)
        r = sum_parts(p_row + 2 * C, o_c < C, B * R, PARTS)
        g = sum_parts(p_row + 3 * C, o_c < C, B * R, PARTS)
    z = sum_parts(p_low + i_b * R + o_d, o_d < W, B * R, PARTS)
    z = 2 * tl.sigmoid(2 * z) - 1
    h = tl.load(p_h + at)
    decay = tl.exp(-tl.exp(decay + tl.sum(up.to(tl.float32) * z[:, None], 0)))
    s = state.to(tl.float32)
    # r (S + u k v^T) without the matrix in brackets: y reads the old state.
    y = tl.sum(s * r[:, None], 0) + tl.sum(r * bonus * k, 0) * v
    s = s * decay[:, None] + k[:, None] * v[None, :]
    tl.store(p_s, s.to(p_pool.dtype.element_ty), mask=live[:, None])
    tl.store(p_shift + slot * C + o_c, h.to(p_shift.dtype.element_ty), mask=live)
    if OFFSET:
        y *= 1 + tl.load(p_offset + slot * C + o_c, mask=live, other=0.0).to(tl.float32)
    y -= tl.sum(y, 0) / N
    y = y / tl.sqrt(tl.sum(y * y, 0) / N + eps) * gn_w + gn_b
    y *= g * tl.sigmoid(g) * out_scale
    y = tl.where(live, y, 0.0).to(p_out.dtype.element_ty)
    tl.store(p_out + at, y, eviction_policy=KEEP)


def multiply_codes(x: Tensor, down: Tensor) -> Tensor:
    """Return the parts [P, B, R] of x [1, B, C] @ down^T, few enough for whoever reads many rows.

    Args:
        x: the codes' mixed input, in the dtype of `down`.
        down: the codes' weight [R, C].

    Raises:
        ValueError: a shape, dtype, stride or device that the kernels cannot take.
    """
    _, rows, channels = x.shape
    if rows > MAX_ROWS:
        return torch.mm(x[0], down.t())[None]
    config = choose_config(rows, down.shape[0], channels, splittable=True)
    while config.num_splits > 1 and config.num_splits * rows > MAX_CODE_PARTS:
        config = config._replace(num_splits=config.num_splits // 2)
    return rows_linear(x, down, config=config)


def mix_inputs(
    h: Tensor, codes: Tensor, up: Tensor, mix: Tensor, shift: Tensor, slots: Tensor
) -> Tensor:
    """Mix a layer's five inputs with the token before, each by its own learned amount.

    `out[m] = h + (last - h) * (mix[m] + up[m] @ tanh(codes[m]))`.

    Args:
        h: the normalised rows [B, C] fp32; C a multiple of 64.
        codes: [P, B, 5 D], parts to be added up, five codes of rank D before their tanh.
        up: second halves of the mixing's LoRAs [5, C, D], fp16, bf16 or fp32.
        mix: [5, C] fp32.
        shift: the layer's normalised last tokens [S, C].
        slots: int64 [B]; -1 is a padding row, whose last token counts as 0.

    Returns:
        The mixed inputs [5, B, C] in the dtype of `up`, in the order of the codes.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    rows, channels = h.shape
    rank = up.shape[-1]
    expect_shape("up", up, (NUM_INPUTS, channels, rank))
    expect_shape("codes", codes, (codes.shape[0], rows, NUM_INPUTS * rank))
    expect_shape("mix", mix, (NUM_INPUTS, channels))
    expect_shape("shift", shift, (shift.shape[0], channels))
    for name, tensor, dtypes in (
        ("h", h, (torch.float32,)),
        ("mix", mix, (torch.float32,)),
        ("codes", codes, FLOATS),
        ("up", up, FLOATS),
        ("shift", shift, FLOATS),
    ):
        expect_dtype(name, tensor, dtypes)
        expect_contiguous(name, tensor)
        expect_device(name, tensor, h.device)
    if channels % GROUP_LEN:
        raise ValueError(f"C must be a multiple of {GROUP_LEN}, got {channels}")
    expect_rows_of_slots(slots, rows, h.device)
    out = up.new_empty((NUM_INPUTS, rows, channels))
    if not rows:
        return out
    block_m = 1 if rows <= MAX_SINGLE_ROWS else 16 if rows <= 16 else 32
    mix_inputs_kernel[(channels // 64, NUM_INPUTS, -(-rows // block_m))](
        h,
        codes,
        up,
        mix,
        shift,
        slots,
        out,
        rows,
        C=channels,
        D=rank,
        # A dot needs 16 at least.
        BD=next_power_of_2(max(rank, 16)),
        PARTS=codes.shape[0],
        BM=block_m,
        BN=64,
        num_warps=4,
        **dependent_launch(out.device),
    )
    return out


def time_mix6(
    projected: Tensor,
    up: Tensor,
    vectors: Tensor,
    h: Tensor,
    shift: Tensor,
    pool: Tensor,
    slots: Tensor,
    time_offset: Tensor | None = None,
    *,
    low: Tensor | None = None,
    out_scale: float = 1.0,
) -> Tensor:
    """Advance one layer's recurrence by one token a row, from its projections to Wo's input.

    Args:
        projected: [P, B, 4C + R], parts to be added up: k, v, r, g and the first half of the
            decay's LoRA before its tanh, of which the first W columns count.
        up: second half of that LoRA [C, W], fp16, bf16 or fp32; W at most R.
        vectors: [4, C] fp32, rows as `VECTORS`; the decay of a token is exp(-exp(time_decay + ..)).
        h: the normalised rows [B, C] fp32, which become the slots' last tokens.
        shift: the layer's normalised last tokens [S or more, C], *modified*.
        pool: the layer's states [S, H, K, V] fp32 or fp16, *modified*.
        slots: int64 [B], no slot twice; -1 is a padding row, which gives zeros.
        time_offset: the layer's output offsets by slot [S or more, C], or None.
        low: the first half of the LoRA [P, B, R]; then `projected` is k, v, r, g stacked
            [4, B, C], in one part.
        out_scale: the result is multiplied by it.

    Returns:
        Wo's input [B, C] in the dtype of `up`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    _check_time_mix(projected, low, up, vectors, h, shift, pool, slots, time_offset)
    _, heads, size, _ = pool.shape
    stacked = low is not None
    if low is None:
        low = projected[..., 4 * heads * size :]
    parts, rows, _ = low.shape
    out = up.new_empty((rows, heads * size))
    if not rows:
        return out
    rank = up.shape[1]
    # Few rows: latency counts. Many: programs, as long as a thread can hold its part of the state.
    num_warps = max(8 if rows <= 4 else 4 if rows < 32 else 2, size * size // 2048)
    time_mix6_kernel[(heads, rows)](
        projected,
        low,
        up,
        vectors,
        h,
        shift,
        pool,
        slots,
        time_offset,
        out,
        rows,
        64e-5,
        out_scale,
        H=heads,
        N=size,
        R=low.stride(1),
        W=rank,
        BW=next_power_of_2(rank),
        PARTS=parts,
        STACKED=stacked,
        OFFSET=time_offset is not None,
        num_warps=num_warps,
        **dependent_launch(out.device),
    )
    return out


def _check_time_mix(
    projected: Tensor,
    low: Tensor | None,
    up: Tensor,
    vectors: Tensor,
    h: Tensor,
    shift: Tensor,
    pool: Tensor,
    slots: Tensor,
    time_offset: Tensor | None,
) -> None:
    num_slots, heads, size, _ = pool.shape
    channels, rank = heads * size, up.shape[-1]
    if projected.dim() != 3:
        raise ValueError(f"projected must have 3 dimensions, got {list(projected.shape)}")
    parts, rows, width = projected.shape
    expect_head_size(size)
    named = [("projected", projected), ("up", up), ("shift", shift)]
    if low is None:
        padded = width - 4 * channels
        expect_shape("projected", projected, (parts, rows, 4 * channels + max(padded, rank)))
    else:
        expect_shape("projected", projected, (4, rows, channels))
        expect_shape("low", low, (low.shape[0], rows, max(low.shape[-1], rank)))
        named.append(("low", low))
    expect_shape("up", up, (channels, rank))
    expect_shape("vectors", vectors, (len(VECTORS), channels))
    expect_shape("h", h, (rows, channels))
    expect_shape("shift", shift, (max(num_slots, shift.shape[0]), channels))
    expect_shape("pool", pool, (num_slots, heads, size, size))
    expect_rows_of_slots(slots, rows, pool.device)
    if time_offset is not None:
        expect_shape("time_offset", time_offset, (max(num_slots, time_offset.shape[0]), channels))
        named.append(("time_offset", time_offset))
    for name, tensor in named:
        expect_dtype(name, tensor, FLOATS)
    expect_dtype("vectors", vectors, (torch.float32,))
    expect_dtype("h", h, (torch.float32,))
    expect_dtype("pool", pool, (torch.float32, torch.float16))
    for name, tensor in (*named, ("vectors", vectors), ("h", h), ("pool", pool)):
        expect_contiguous(name, tensor)
        expect_device(name, tensor, pool.device)
