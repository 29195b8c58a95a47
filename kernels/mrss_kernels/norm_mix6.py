# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""RWKV-6's norms: add the last product to the residual, normalise, mix with the token before.

One kernel for the three places. Before the time mixing it makes the codes that say how far each of
five inputs moves; before the ffn its two inputs, and it keeps the new shift state; at the end it
only normalises. With one row it multiplies the codes' weight itself, which saves a launch.
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
    expect_rows_of_slots,
    expect_shape,
)
from mrss_kernels._launch import dependent_launch, next_power_of_2
from mrss_kernels.add_norm_mix import LN_EPS, row_statistics
from mrss_kernels.caching import KEEP
from mrss_kernels.linear_cuts import NUM_MULTIPROCESSORS
from mrss_kernels.time_mix6 import multiply_codes

MAX_FUSED_ROWS = 1
"""Rows up to which the norm computes the codes itself: every program reads the whole row, which
the L2 has to deliver as often as there are programs."""

_Norm = tuple[Tensor, Tensor]


@triton.jit
def norm_mix6_kernel(
    p_x,
    p_tokens,
    p_weight0,
    p_bias0,
    p_parts,
    p_gate,
    p_weight,
    p_bias,
    p_shift,
    p_slots,
    p_mix,
    p_down,
    p_sum,
    p_h,
    p_out,
    B,
    R,
    eps,
    unscale,
    key_scale,
    C: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    MIXES: tl.constexpr,
    DOWN: tl.constexpr,
    EMBED: tl.constexpr,
    NORM0: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (C / BS, B), with DOWN (R / BN, B). A program has its whole row and writes BS of it.

    MIXES 0 normalises; 1 is the time mixing's, which keeps h and leaves the shift state alone; 2 is
    the ffn's, which writes it.
    """
    # A step's first and last kernel open the door late, as those of RWKV-7 do.
    LATE: tl.constexpr = EMBED or MIXES == 0
    if PDL and not LATE:
        tl.extra.cuda.gdc_launch_dependents()
    i_s = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    m_s = m_c & (o_c // BS == i_s)
    m_h = m_c if DOWN else m_s
    weight = tl.load(p_weight + o_c, mask=m_h, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + o_c, mask=m_h, other=0.0).to(tl.float32)
    if MIXES > 0:
        mix = tl.load(p_mix + o_c, mask=m_h, other=0.0)
    if MIXES > 1:
        mix_r = tl.load(p_mix + C + o_c, mask=m_h, other=0.0)
    if DOWN:
        o_n = i_s * BN + tl.arange(0, BN)
        m_w = (o_n < R)[:, None] & m_c[None, :]
        down = tl.load(p_down + o_n[:, None] * C + o_c[None, :], mask=m_w, other=0.0)
    if MIXES > 0 and not EMBED:
        # The step before wrote it, and that is complete, unless this is a step's first kernel.
        slot = tl.load(p_slots + i_b).to(tl.int64)
        m_prev = m_h & (o_c * 0 + slot >= 0)
        previous = tl.load(p_shift + slot * C + o_c, mask=m_prev, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL and LATE:
        tl.extra.cuda.gdc_launch_dependents()
    if MIXES > 0 and EMBED:
        slot = tl.load(p_slots + i_b).to(tl.int64)
        m_prev = m_h & (o_c * 0 + slot >= 0)
        previous = tl.load(p_shift + slot * C + o_c, mask=m_prev, other=0.0).to(tl.float32)
    i_x = i_b
    if EMBED:
        i_x = tl.load(p_tokens + i_b).to(tl.int64)
    x = tl.load(p_x + i_x * C + o_c, mask=m_c, other=0.0, eviction_policy=KEEP).to(tl.float32)
    if NORM0:
        mean, scale = row_statistics(x, m_c, eps, C)
        x = (x - mean) * scale * tl.load(p_weight0 + o_c, mask=m_c, other=0.0).to(tl.float32)
        x += tl.load(p_bias0 + o_c, mask=m_c, other=0.0).to(tl.float32)
    if PARTS > 0:
        p_part = p_parts + i_b * C + o_c
        delta = tl.load(p_part, mask=m_c, other=0.0, eviction_policy=KEEP).to(tl.float32)
        for i in tl.static_range(1, PARTS):
            p = p_part + i * B * C
            delta += tl.load(p, mask=m_c, other=0.0, eviction_policy=KEEP).to(tl.float32)
        delta *= unscale
        if GATED:
            gate = tl.load(p_gate + i_b * C + o_c, mask=m_c, other=0.0, eviction_policy=KEEP)
            delta *= tl.sigmoid(gate.to(tl.float32))
        x += delta
    mean, scale = row_statistics(x, m_c, eps, C)
    h = (x - mean) * scale * weight + bias
    at = i_b * C + o_c
    if MIXES == 0:
        tl.store(p_out + at, h.to(p_out.dtype.element_ty), mask=m_s)
    else:
        tl.store(p_sum + at, x, mask=m_s, eviction_policy=KEEP)
        mixed = h + (previous - h) * mix
        if MIXES == 2:
            p_prev = p_shift + slot * C + o_c
            tl.store(p_prev, h.to(p_shift.dtype.element_ty), mask=m_s & m_prev)
            mixed *= key_scale
            second = h + (previous - h) * mix_r
            second = second.to(p_out.dtype.element_ty)
            tl.store(p_out + B * C + at, second, mask=m_s, eviction_policy=KEEP)
        else:
            tl.store(p_h + at, h, mask=m_s, eviction_policy=KEEP)
        if DOWN:
            code = tl.sum(down.to(tl.float32) * mixed[None, :], 1)
            tl.store(p_out + i_b * R + o_n, code.to(p_out.dtype.element_ty), mask=o_n < R)
        else:
            mixed = mixed.to(p_out.dtype.element_ty)
            tl.store(p_out + at, mixed, mask=m_s, eviction_policy=KEEP)


def add_norm_codes(
    x: Tensor,
    parts: Tensor | None,
    gate: Tensor | None,
    norm: _Norm,
    shift: Tensor,
    slots: Tensor,
    mix: Tensor,
    down: Tensor,
    *,
    scale: float = 1.0,
    tokens: Tensor | None = None,
    norm0: _Norm | None = None,
    fuse_rows: int = MAX_FUSED_ROWS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what stands before RWKV-6's time mixing, up to the codes of its five inputs.

    `x += sigmoid(gate) * sum(parts) / scale; h = LN(x); codes = down @ (h + (last - h) * mix)`. The
    shift state is only read: `time_mix6` replaces it by h.

    Args:
        x: residual stream [B, C], any float dtype; with `tokens` the embedding table [V, C].
        parts: what the last product left [P, B, C], added up in order; None adds nothing.
        gate: that product's gate before its sigmoid [B, C], or None.
        norm: weight and bias [C] of the layer norm, eps 1e-5.
        shift: the layer's normalised last tokens [S, C].
        slots: int64 [B]; -1 is a padding row, whose last token counts as 0.
        mix: how far the codes' input moves to the token before [C] fp32.
        down: the codes' weight [R, C], fp16, bf16 or fp32; C a multiple of 64.
        scale: what the last product's input was multiplied by.
        tokens: int64 [B], ids to look up in `x`, each in [0, V).
        norm0: weight and bias [C] of a layer norm that looked-up rows pass first.
        fuse_rows: up to so many rows the codes are computed in the same launch.

    Returns:
        The new residual stream [B, C] fp32, h [B, C] fp32, and the codes before their tanh
        [P, B, R], to be added up.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernels cannot take.
    """
    rows, channels = _check_norm(x, parts, gate, norm, tokens, norm0)
    _check_shift(shift, slots, rows, channels)
    expect_shape("mix", mix, (channels,))
    expect_shape("down", down, (down.shape[0], channels))
    expect_dtype("mix", mix, (torch.float32,))
    expect_dtype("down", down, FLOATS)
    for name, tensor in (("mix", mix), ("down", down)):
        expect_contiguous(name, tensor)
        expect_device(name, tensor, x.device)
    size_r = down.shape[0]
    total = x.new_empty((rows, channels), dtype=torch.float32)
    h = x.new_empty((rows, channels), dtype=torch.float32)
    fused = rows <= fuse_rows
    shape = (1, rows, size_r) if fused else (1, rows, channels)
    out = down.new_empty(shape, dtype=torch.float32 if fused else down.dtype)
    _launch(
        x, parts, gate, norm, (shift, slots, mix), out,
        total=total, h=h, down=down if fused else None, scale=scale, tokens=tokens, norm0=norm0,
    )  # fmt: skip
    return total, h, out if fused else multiply_codes(out, down)


def add_norm_mix(
    x: Tensor,
    parts: Tensor | None,
    norm: _Norm,
    shift: Tensor,
    slots: Tensor,
    mix: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    key_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Do what stands before RWKV-6's ffn: add, normalise, and make the inputs of key and gate.

    Args:
        x: residual stream [B, C], any float dtype.
        parts: what the last product left [P, B, C], added up in order; None adds nothing.
        norm: weight and bias [C] of the layer norm, eps 1e-5.
        shift: the layer's normalised last tokens [S, C], *modified*.
        slots: int64 [B]; -1 is a padding row, whose last token counts as 0 and is not kept.
        mix: how far each input moves to the token before [2, C] fp32.
        dtype: of the inputs.
        scale: what the last product's input was multiplied by.
        key_scale: the first input is multiplied by it.

    Returns:
        The new residual stream [B, C] fp32, and the inputs [2, B, C].

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    rows, channels = _check_norm(x, parts, None, norm, None, None)
    _check_shift(shift, slots, rows, channels)
    expect_shape("mix", mix, (2, channels))
    expect_dtype("mix", mix, (torch.float32,))
    expect_contiguous("mix", mix)
    expect_device("mix", mix, x.device)
    total = x.new_empty((rows, channels), dtype=torch.float32)
    out = x.new_empty((2, rows, channels), dtype=dtype)
    _launch(
        x, parts, None, norm, (shift, slots, mix), out,
        total=total, scale=scale, key_scale=key_scale,
    )  # fmt: skip
    return total, out


def add_norm(
    x: Tensor,
    parts: Tensor | None,
    gate: Tensor | None,
    norm: _Norm,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `LN(x + sigmoid(gate) * sum(parts) / scale)`; arguments as `add_norm_codes`.

    Returns:
        The normalised rows [B, C] in `dtype`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    _check_norm(x, parts, gate, norm, None, None)
    out = norm[0].new_empty(x.shape, dtype=dtype)
    _launch(x, parts, gate, norm, None, out[None], scale=scale)
    return out


def _launch(
    x: Tensor,
    parts: Tensor | None,
    gate: Tensor | None,
    norm: _Norm,
    shifted: Sequence[Tensor] | None,
    out: Tensor,
    *,
    total: Tensor | None = None,
    h: Tensor | None = None,
    down: Tensor | None = None,
    scale: float = 1.0,
    key_scale: float = 1.0,
    tokens: Tensor | None = None,
    norm0: _Norm | None = None,
) -> None:
    """Launch the kernel; `shifted` is shift, slots and mix."""
    rows, channels = out.shape[1], norm[0].shape[0]
    if not rows:
        return
    block = next_power_of_2(channels)
    block_n, size_r = 1, 0
    if down is None:
        # A slice a program while programs are few: multiprocessors stand idle otherwise.
        slice_len = min(block, 256 if rows <= 16 else 512 if rows <= 64 else 1024)
        programs = -(-channels // slice_len)
    else:
        size_r = down.shape[0]
        block_n = next_power_of_2(-(-size_r // NUM_MULTIPROCESSORS))
        programs = -(-size_r // block_n)
        slice_len = next_power_of_2(-(-channels // programs))
    wide = block >= 4096 or (block >= 2048 and down is None and rows <= 16)
    norm_mix6_kernel[(programs, rows)](
        x,
        tokens,
        *(norm0 or (None, None)),
        parts,
        gate,
        *norm,
        *(shifted or (None, None, None)),
        down,
        total,
        h,
        out,
        rows,
        size_r,
        LN_EPS,
        1.0 / scale,
        key_scale,
        C=channels,
        BC=block,
        BS=slice_len,
        BN=block_n,
        PARTS=0 if parts is None else parts.shape[0],
        MIXES=0 if shifted is None else 2 if h is None else 1,
        DOWN=down is not None,
        EMBED=tokens is not None,
        NORM0=norm0 is not None,
        GATED=gate is not None,
        num_warps=16 if wide else 8 if block >= 1024 else 4,
        **dependent_launch(out.device),
    )


def _check_norm(
    x: Tensor,
    parts: Tensor | None,
    gate: Tensor | None,
    norm: _Norm,
    tokens: Tensor | None,
    norm0: _Norm | None,
) -> tuple[int, int]:
    """Return B and C."""
    channels = norm[0].shape[0]
    rows = x.shape[0] if tokens is None else tokens.shape[0]
    expect_shape("x", x, (x.shape[0], channels))
    named = [("x", x)]
    for names, pair in ((("weight", "bias"), norm), (("weight0", "bias0"), norm0)):
        for name, vector in zip(names, pair or (), strict=False):
            expect_shape(name, vector, (channels,))
            named.append((name, vector))
    if gate is not None:
        if parts is None:
            raise ValueError("gate must be None where parts are None, got a tensor")
        expect_shape("gate", gate, (rows, channels))
        named.append(("gate", gate))
    if parts is not None:
        expect_shape("parts", parts, (parts.shape[0], rows, channels))
        named.append(("parts", parts))
    for name, tensor in named:
        expect_dtype(name, tensor, FLOATS)
        expect_contiguous(name, tensor)
        expect_device(name, tensor, x.device)
    if tokens is not None:
        expect_dtype("tokens", tokens, (torch.int64,))
        expect_contiguous("tokens", tokens)
        expect_device("tokens", tokens, x.device)
    return rows, channels


def _check_shift(shift: Tensor, slots: Tensor, rows: int, channels: int) -> None:
    expect_shape("shift", shift, (shift.shape[0], channels))
    expect_dtype("shift", shift, FLOATS)
    expect_contiguous("shift", shift)
    expect_rows_of_slots(slots, rows, shift.device)
