# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Add the last product to the residual stream, normalise it, and mix it with the token before.

What stands between two products of a layer, in one launch: `x += delta; h = LN(x);
d = shift - h; shift = h; out[m] = h + d * mix[m]`. Every program computes the statistics of its
whole row and writes one slice of it, so a single row still uses several multiprocessors.
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
    expect_rows_of_slots,
    expect_shape,
)
from mrss_kernels._launch import dependent_launch, next_power_of_2
from mrss_kernels.caching import KEEP

LN_EPS = 1e-5


@triton.jit
def _sum_both(a, b):
    """Return the sums of two vectors, in one exchange between warps."""
    return tl.split(tl.sum(tl.join(a, b), 0))


@triton.jit
def row_statistics(x, mask, eps, C: tl.constexpr):
    """Return mean and 1 / standard deviation of the C elements of x, which is 0 outside the mask.

    The variance is the mean square less the square of the mean. Where the mean is above the
    deviation, that difference would lose bits: then what is left of x without its mean is added up.
    """
    total, squares = _sum_both(x, x * x)
    mean = total / C
    variance = squares / C - mean * mean
    if mean * mean > variance:
        centred = tl.where(mask, x - mean, 0.0)
        total, squares = _sum_both(centred, centred * centred)
        mean += total / C
        variance = squares / C
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def _last_token(p_slots, p_shift, i_b, o_s, m_s, C: tl.constexpr):
    """Return which of a row's last normalised token are kept, where they are, and what they are."""
    slot = tl.load(p_slots + i_b).to(tl.int64)
    m_shift = m_s & (o_s * 0 + slot >= 0)
    p_prev = p_shift + slot * C + o_s
    return m_shift, p_prev, tl.load(p_prev, mask=m_shift, other=0.0).to(tl.float32)


@triton.jit
def add_norm_mix_kernel(
    p_x,
    p_tokens,
    p_weight0,
    p_bias0,
    p_parts,
    p_weight,
    p_bias,
    p_shift,
    p_slots,
    p_mix,
    p_sum,
    p_out,
    B,
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    PARTS: tl.constexpr,
    MIXES: tl.constexpr,
    BX: tl.constexpr,
    EMBED: tl.constexpr,
    NORM0: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (B, C / BS). MIXES == 0 only normalises: out [1, B, C].

    EMBED looks rows up by token, NORM0 normalises them once more, as layer 0 does.
    """
    # A step's first and last kernel let their successors start only when all before them is done:
    # what `time_mix7` reads early is then never older than the step.
    LATE: tl.constexpr = EMBED or MIXES == 0
    if PDL and not LATE:
        tl.extra.cuda.gdc_launch_dependents()
    i_b = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    o_s = tl.program_id(1) * BS + tl.arange(0, BS)
    m_s = o_s < C
    weight = tl.load(p_weight + o_s, mask=m_s, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + o_s, mask=m_s, other=0.0).to(tl.float32)
    if MIXES > 0:
        o_i = tl.arange(0, BX)
        m_i = (o_i < MIXES)[:, None] & m_s[None, :]
        p_tile = p_mix + o_i[:, None] * C + o_s[None, :]
        mix = tl.load(p_tile, mask=m_i, other=0.0).to(tl.float32)
        if not LATE:
            # Written a step ago, which is over: a `time_mix7` stands between.
            m_shift, p_prev, previous = _last_token(p_slots, p_shift, i_b, o_s, m_s, C)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL and LATE:
        tl.extra.cuda.gdc_launch_dependents()
    i_x = i_b
    if EMBED:
        i_x = tl.load(p_tokens + i_b).to(tl.int64)
    x = tl.load(p_x + i_x * C + o_c, mask=m_c, other=0.0, eviction_policy=KEEP).to(tl.float32)
    xs = tl.load(p_x + i_x * C + o_s, mask=m_s, other=0.0, eviction_policy=KEEP).to(tl.float32)
    if NORM0:
        mean, scale = row_statistics(x, m_c, eps, C)
        x = (x - mean) * scale * tl.load(p_weight0 + o_c, mask=m_c, other=0.0).to(tl.float32)
        x += tl.load(p_bias0 + o_c, mask=m_c, other=0.0).to(tl.float32)
        xs = (xs - mean) * scale * tl.load(p_weight0 + o_s, mask=m_s, other=0.0).to(tl.float32)
        xs += tl.load(p_bias0 + o_s, mask=m_s, other=0.0).to(tl.float32)
    for i in tl.static_range(PARTS):
        p_part = p_parts + (i * B + i_b) * C
        x += tl.load(p_part + o_c, mask=m_c, other=0.0, eviction_policy=KEEP).to(tl.float32)
        xs += tl.load(p_part + o_s, mask=m_s, other=0.0, eviction_policy=KEEP).to(tl.float32)
    if MIXES > 0 and LATE:
        m_shift, p_prev, previous = _last_token(p_slots, p_shift, i_b, o_s, m_s, C)
    mean, scale = row_statistics(x, m_c, eps, C)
    h = (xs - mean) * scale * weight + bias
    if MIXES == 0:
        tl.store(p_out + i_b * C + o_s, h.to(p_out.dtype.element_ty), mask=m_s)
    else:
        tl.store(p_sum + i_b * C + o_s, xs, mask=m_s, eviction_policy=KEEP)
        tl.store(p_prev, h.to(p_shift.dtype.element_ty), mask=m_shift)
        out = h[None, :] + (previous - h)[None, :] * mix
        p_rows = p_out + (o_i[:, None] * B + i_b) * C + o_s[None, :]
        out = out.to(p_out.dtype.element_ty)
        tl.store(p_rows, out, mask=m_i, eviction_policy=KEEP)


def add_norm_mix(
    x: Tensor,
    parts: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    slots: Tensor,
    mix: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    tokens: Tensor | None = None,
    norm0: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `parts` to the residual stream, normalise, and mix with the token before.

    Args:
        x: residual stream [B, C], any float dtype; with `tokens` the embedding table [V, C].
        parts: what the last product left [P, B, C], added up in order; None adds nothing.
        weight: of the layer norm [C], eps 1e-5.
        bias: of the layer norm [C].
        shift: the layer's normalised last tokens [S, C], *modified*.
        slots: int64 [B]; -1 is a padding row, whose last token counts as 0 and is not kept.
        mix: how far each output moves to the token before [M, C].
        dtype: of the mixed inputs.
        tokens: int64 [B], ids to look up in `x`, each in [0, V).
        norm0: weight and bias [C] of a layer norm that looked-up rows pass first.

    Returns:
        The new residual stream [B, C] fp32, and the mixed inputs [M, B, C].

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    num_mixes, channels = mix.shape
    rows = x.shape[0] if tokens is None else tokens.shape[0]
    _check_norm(x, parts, weight, bias, tokens)
    expect_shape("mix", mix, (num_mixes, channels))
    expect_shape("shift", shift, (shift.shape[0], channels))
    expect_rows_of_slots(slots, rows, x.device)
    for name, tensor in (("mix", mix), ("shift", shift)):
        expect_dtype(name, tensor, FLOATS)
        expect_contiguous(name, tensor)
        expect_device(name, tensor, x.device)
    total = x.new_empty((rows, channels), dtype=torch.float32)
    out = mix.new_empty((num_mixes, rows, channels), dtype=dtype)
    if norm0 is not None:
        _check_norm(x, None, *norm0, tokens)
    _launch(x, tokens, norm0, parts, weight, bias, shift, slots, mix, total, out)
    return total, out


def add_norm(
    x: Tensor,
    parts: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Add `parts` [P, B, C] to the residual stream [B, C] and normalise it.

    Returns:
        The normalised rows [B, C] in `dtype`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    _check_norm(x, parts, weight, bias, None)
    out = weight.new_empty(x.shape, dtype=dtype)
    _launch(x, None, None, parts, weight, bias, None, None, None, None, out[None])
    return out


def _launch(
    x: Tensor,
    tokens: Tensor | None,
    norm0: tuple[Tensor, Tensor] | None,
    parts: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    slots: Tensor | None,
    mix: Tensor | None,
    total: Tensor | None,
    out: Tensor,
) -> None:
    _, rows, channels = out.shape
    if not rows:
        return
    block = next_power_of_2(channels)
    # A slice a program while programs are few: 132 multiprocessors stand idle otherwise.
    slice_len = min(block, 256 if rows <= 16 else 512 if rows <= 64 else 1024)
    add_norm_mix_kernel[(rows, -(-channels // slice_len))](
        x,
        tokens,
        *(norm0 or (None, None)),
        parts,
        weight,
        bias,
        shift,
        slots,
        mix,
        total,
        out,
        rows,
        LN_EPS,
        C=channels,
        BC=block,
        BS=slice_len,
        PARTS=0 if parts is None else parts.shape[0],
        MIXES=0 if mix is None else mix.shape[0],
        BX=1 if mix is None else next_power_of_2(mix.shape[0]),
        EMBED=tokens is not None,
        NORM0=norm0 is not None,
        num_warps=16 if block >= 2048 and rows <= 16 else 8 if block >= 2048 else 4,
        **dependent_launch(out.device),
    )


def _check_norm(
    x: Tensor, parts: Tensor | None, weight: Tensor, bias: Tensor, tokens: Tensor | None
) -> None:
    channels = weight.shape[0]
    rows = x.shape[0] if tokens is None else tokens.shape[0]
    expect_shape("x", x, (x.shape[0], channels))
    expect_shape("bias", bias, (channels,))
    named = [("x", x), ("weight", weight), ("bias", bias)]
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
