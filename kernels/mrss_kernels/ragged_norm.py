# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Residual, layer norm and token shift over packed sequences, whose bounds only the device knows.

The ragged twin of `add_norm_mix` and `norm_mix6`: T tokens of n sequences, each with a state by
slot. A launch depends on shapes alone, so it can be captured. A token's predecessor is normalised
again where another program owns it; at a sequence's start it comes from a copy of the shift states
that was taken before the step, because some other program overwrites the state itself.
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
from mrss_kernels._launch import dependent_launch, next_power_of_2
from mrss_kernels.lora_down7 import sigmoid
from mrss_kernels.ragged_index import expect_bounds

LN_EPS = 1e-5


@triton.jit
def _statistics(x, mask, eps, C: tl.constexpr):
    """Return mean and 1 / standard deviation of the C elements of x that the mask keeps."""
    mean = tl.sum(x, 0) / C
    centred = tl.where(mask, x - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)


@triton.jit
def _raw_row(
    p_x, p_tokens, p_parts, p_gate, i_t, o, m, T, C: tl.constexpr, PARTS: tl.constexpr,
    UNSCALE: tl.constexpr,
):  # fmt: skip
    """Return x + sigmoid(gate) UNSCALE parts of token i_t at the columns o, in fp32."""
    i_x = i_t
    if p_tokens is not None:
        i_x = tl.load(p_tokens + i_t).to(tl.int64)
    x = tl.load(p_x + i_x * C + o, mask=m, other=0.0).to(tl.float32)
    if p_gate is None and UNSCALE == 1:
        for i in tl.static_range(PARTS):
            x += tl.load(p_parts + (i * T + i_t) * C + o, mask=m, other=0.0).to(tl.float32)
    else:
        delta = tl.load(p_parts + i_t * C + o, mask=m, other=0.0).to(tl.float32)
        for i in tl.static_range(1, PARTS):
            delta += tl.load(p_parts + (i * T + i_t) * C + o, mask=m, other=0.0).to(tl.float32)
        delta *= UNSCALE
        if p_gate is not None:
            delta *= sigmoid(tl.load(p_gate + i_t * C + o, mask=m, other=0.0).to(tl.float32))
        x += delta
    return x


@triton.jit
def _norm_row(
    x, xs, o_c, m_c, o_s, m_s, p_weight0, p_bias0, weight, bias, eps,
    C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the residual stream and its norm at the columns o_s, from the row x and its slice xs.

    WHOLE: the slice is the row.
    """
    if p_weight0 is not None:
        mean, scale = _statistics(x, m_c, eps, C)
        x = (x - mean) * scale * tl.load(p_weight0 + o_c, mask=m_c, other=0.0).to(tl.float32)
        x += tl.load(p_bias0 + o_c, mask=m_c, other=0.0).to(tl.float32)
        if not WHOLE:
            xs = (xs - mean) * scale * tl.load(p_weight0 + o_s, mask=m_s, other=0.0).to(tl.float32)
            xs += tl.load(p_bias0 + o_s, mask=m_s, other=0.0).to(tl.float32)
    mean, scale = _statistics(x, m_c, eps, C)
    if WHOLE:
        xs = x
    return xs, (xs - mean) * scale * weight + bias


@triton.jit
def ragged_norm_mix_kernel(
    p_x,
    p_tokens,
    p_weight0,
    p_bias0,
    p_parts,
    p_gate,
    p_weight,
    p_bias,
    p_before,
    p_shift,
    p_index,
    p_mix,
    p_sum,
    p_h,
    p_out,
    T,
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    BT: tl.constexpr,
    PARTS: tl.constexpr,
    MIXES: tl.constexpr,
    UNSCALE: tl.constexpr,
    FIRST_SCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T / BT, C / BS). A program normalises BT tokens in turn and keeps the last one's norm.

    x and the sum are different memory: a neighbour still reads the old x.
    """
    # As the first kernel of a step does in `add_norm_mix`.
    LATE: tl.constexpr = p_tokens is not None
    WHOLE: tl.constexpr = BS == BC
    if PDL and not LATE:
        tl.extra.cuda.gdc_launch_dependents()
    i_first = tl.program_id(0).to(tl.int64) * BT
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    o_s = tl.program_id(1) * BS + tl.arange(0, BS)
    m_s = o_s < C
    weight = tl.load(p_weight + o_s, mask=m_s, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + o_s, mask=m_s, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL and LATE:
        tl.extra.cuda.gdc_launch_dependents()
    x = _raw_row(p_x, p_tokens, p_parts, p_gate, i_first, o_c, m_c, T, C, PARTS, UNSCALE)
    xs = (
        x
        if WHOLE
        else _raw_row(p_x, p_tokens, p_parts, p_gate, i_first, o_s, m_s, T, C, PARTS, UNSCALE)
    )
    seq = tl.load(p_index + i_first)
    # Before it is known whether it is needed: one wait for the memory, not two.
    i_p = tl.maximum(i_first - 1, 0)
    z = _raw_row(p_x, p_tokens, p_parts, p_gate, i_p, o_c, m_c, T, C, PARTS, UNSCALE)
    zs = (
        z
        if WHOLE
        else _raw_row(p_x, p_tokens, p_parts, p_gate, i_p, o_s, m_s, T, C, PARTS, UNSCALE)
    )
    if seq >= 0:
        previous = tl.load(p_before + seq.to(tl.int64) * C + o_s, mask=m_s, other=0.0)
        previous = previous.to(tl.float32)
    else:
        zs, previous = _norm_row(
            z, zs, o_c, m_c, o_s, m_s, p_weight0, p_bias0, weight, bias, eps, C, WHOLE
        )
    for i in range(BT):
        i_t = i_first + i
        if i_t < T:
            # The next token is on its way while this one is normalised; the last one of a program
            # loads itself again.
            i_n = tl.where(i + 1 < BT, tl.minimum(i_t + 1, T - 1), i_t)
            next_seq = tl.load(p_index + i_n)
            slot = tl.load(p_index + T + i_t).to(tl.int64)
            if BT > 1:
                next_x = _raw_row(
                    p_x, p_tokens, p_parts, p_gate, i_n, o_c, m_c, T, C, PARTS, UNSCALE
                )
            xs, h = _norm_row(
                x, xs, o_c, m_c, o_s, m_s, p_weight0, p_bias0, weight, bias, eps, C, WHOLE
            )
            tl.store(p_sum + i_t * C + o_s, xs, mask=m_s)
            if p_h is not None:
                tl.store(p_h + i_t * C + o_s, h, mask=m_s)
            delta = previous - h
            for j in tl.static_range(MIXES):
                mix = tl.load(p_mix + j * C + o_s, mask=m_s, other=0.0).to(tl.float32)
                out = h + delta * mix
                if j == 0 and FIRST_SCALE != 1:
                    out *= FIRST_SCALE
                out = out.to(p_out.dtype.element_ty)
                tl.store(p_out + (j * T + i_t) * C + o_s, out, mask=m_s)
            if slot >= 0:
                tl.store(p_shift + slot * C + o_s, h.to(p_shift.dtype.element_ty), mask=m_s)
            previous = h
            if BT > 1:
                if next_seq >= 0:
                    p_b = p_before + next_seq.to(tl.int64) * C
                    previous = tl.load(p_b + o_s, mask=m_s, other=0.0).to(tl.float32)
                x = next_x
                xs = next_x


@triton.jit
def ragged_norm_last_kernel(
    p_x,
    p_parts,
    p_gate,
    p_weight,
    p_bias,
    p_cu_seqlens,
    p_out,
    T,
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
    PARTS: tl.constexpr,
    UNSCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (n). out [n, C] = norm of x + parts at each sequence's last token."""
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if PDL:
        # The last kernel of a step lets its successor start late, as in `add_norm_mix`.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # An empty sequence has no last token: its row is never read.
    i_t = tl.maximum(tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - 1, 0)
    x = _raw_row(p_x, None, p_parts, p_gate, i_t, o_c, m_c, T, C, PARTS, UNSCALE)
    mean, scale = _statistics(x, m_c, eps, C)
    h = (x - mean) * scale * weight + bias
    tl.store(p_out + i_n * C + o_c, h.to(p_out.dtype.element_ty), mask=m_c)


def ragged_norm_mix(
    x: Tensor,
    parts: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    before: Tensor,
    shift: Tensor,
    index: Tensor,
    mix: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    tokens: Tensor | None = None,
    norm0: tuple[Tensor, Tensor] | None = None,
    gate: Tensor | None = None,
    scale: float = 1.0,
    first_scale: float = 1.0,
    h: Tensor | None = None,
    block_t: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `parts` to the residual stream, normalise, and mix each token with the one before it.

    `total = x + sigmoid(gate) * sum(parts) / scale; h = LN(total); d = (h of the token before) - h;
    mixed[m] = h + mix[m] d`. Before a sequence's first token stands its row of `before`; its last
    token's h goes to its slot of `shift`. Where there is no gate, 1 stands for its sigmoid.

    Args:
        x: residual stream [T, C]; with `tokens` the table of rows [V, C] instead.
        parts: the last product [P, T, C], or None.
        weight: of the layer norm [C].
        bias: of the layer norm [C].
        before: what `shift` held for each sequence before the step, [n, C].
        shift: the layer's shift states [S, C], *modified* at the slots of `index`.
        index: int32 [3, T] of `ragged_index`.
        mix: how far each mixed input moves to the token before, [M, C].
        dtype: of the mixed inputs.
        tokens: int64 [T], ids to look up in `x`, each in [0, V).
        norm0: weight and bias [C] of a layer norm that looked-up rows pass first.
        gate: of the parts, before its sigmoid [T, C], or None.
        scale: what the last product's input was multiplied by.
        first_scale: the first mixed input is multiplied by it.
        h: fp32 [T, C], *written*, or None.
        block_t: tokens a program; None takes what suits T.

    Returns:
        The new residual stream [T, C] fp32, and the mixed inputs [M, T, C].

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    num_mixes, channels = mix.shape
    num_tokens = index.shape[1]
    _check_norm(x, parts, gate, weight, bias, num_tokens)
    expect_shape("index", index, (3, num_tokens))
    expect_dtype("index", index, (torch.int32,))
    expect_shape("before", before, (before.shape[0], channels))
    expect_shape("shift", shift, (shift.shape[0], channels))
    named = [("mix", mix), ("shift", shift), ("before", before)]
    if h is not None:
        expect_shape("h", h, (num_tokens, channels))
        expect_dtype("h", h, (torch.float32,))
        named.append(("h", h))
    if norm0 is not None:
        named += [("norm0 weight", norm0[0]), ("norm0 bias", norm0[1])]
    for name, tensor in named:
        expect_dtype(name, tensor, FLOATS)
        expect_contiguous(name, tensor)
        expect_device(name, tensor, x.device)
    if tokens is not None:
        expect_shape("tokens", tokens, (num_tokens,))
        expect_dtype("tokens", tokens, (torch.int64,))
        expect_device("tokens", tokens, x.device)
    total = x.new_empty((num_tokens, channels), dtype=torch.float32)
    out = mix.new_empty((num_mixes, num_tokens, channels), dtype=dtype)
    if not num_tokens:
        return total, out
    block = next_power_of_2(channels)
    # Many tokens: programs of two, which normalise the token before only once. Few: whole rows, and
    # slices of them while there are fewer rows than multiprocessors.
    block_t = block_t or (2 if num_tokens >= 1024 else 1)
    slice_len = block if block_t > 1 or num_tokens > 64 else min(block, 512)
    ragged_norm_mix_kernel[(-(-num_tokens // block_t), -(-channels // slice_len))](
        x, tokens, *(norm0 or (None, None)), parts, gate, weight, bias, before, shift, index, mix,
        total, h, out, num_tokens, LN_EPS, C=channels, BC=block, BS=slice_len, BT=block_t,
        **_parts_options(parts, scale), MIXES=num_mixes, FIRST_SCALE=first_scale,
        num_warps=8 if block >= 2048 else 4, **dependent_launch(out.device),
    )  # fmt: skip
    return total, out


def ragged_norm_last(
    x: Tensor,
    parts: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    *,
    gate: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Add `parts` [P, T, C] to x [T, C] and normalise each sequence's last token.

    Args:
        x: residual stream [T, C].
        parts: the last product [P, T, C], or None.
        weight: of the layer norm [C].
        bias: of the layer norm [C].
        cu_seqlens: int32 or int64 [n + 1], as `ragged_index` takes it.
        gate: of the parts, before its sigmoid [T, C], or None.
        scale: what the last product's input was multiplied by.

    Returns:
        [n, C] in the dtype of `weight`; undefined for an empty sequence.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    num_tokens, channels = x.shape
    _check_norm(x, parts, gate, weight, bias, num_tokens)
    expect_bounds(cu_seqlens, None)
    num_seqs = cu_seqlens.shape[0] - 1
    out = weight.new_empty((num_seqs, channels))
    if not num_seqs or not num_tokens:
        return out
    block = next_power_of_2(channels)
    ragged_norm_last_kernel[(num_seqs,)](
        x, parts, gate, weight, bias, cu_seqlens, out, num_tokens, LN_EPS, C=channels, BC=block,
        **_parts_options(parts, scale),
        num_warps=8 if block >= 2048 else 4, **dependent_launch(out.device),
    )  # fmt: skip
    return out


def _parts_options(parts: Tensor | None, scale: float) -> dict[str, float]:
    if parts is None:
        return {"PARTS": 0, "UNSCALE": 1.0}
    return {"PARTS": parts.shape[0], "UNSCALE": 1.0 / scale}


def _check_norm(
    x: Tensor,
    parts: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_tokens: int,
) -> None:
    channels = weight.shape[0]
    expect_shape("x", x, (x.shape[0], channels))
    expect_shape("bias", bias, (channels,))
    named = [("x", x), ("weight", weight), ("bias", bias)]
    if gate is not None:
        if parts is None:
            raise ValueError("gate must be None where parts are None, got a tensor")
        expect_shape("gate", gate, (num_tokens, channels))
        named.append(("gate", gate))
    if parts is not None:
        expect_shape("parts", parts, (parts.shape[0], num_tokens, channels))
        named.append(("parts", parts))
    for name, tensor in named:
        expect_dtype(name, tensor, FLOATS)
        expect_contiguous(name, tensor)
        expect_device(name, tensor, x.device)
