# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Residual, layer norm and token shift over packed sequences, with their gradient.

For frozen weights: gradients go to the residual stream alone, and only it is kept for them.
Oracle: the same in plain torch under autograd, `mrss_provider.tune.rwkv7`.
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
    expect_shape,
)
from mrss_kernels._launch import next_power_of_2

LN_EPS = 1e-5

MAX_MIXES = 6

BLOCK_T = 4
"""Tokens a program: each but its first (backwards: its last) has its neighbour at hand."""


@triton.jit
def _load_row(p, i_t, o, m, C: tl.constexpr):
    return tl.load(p + i_t * C + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _raw_row(p_x, p_delta, i_t, o, m, C: tl.constexpr):
    x = _load_row(p_x, i_t, o, m, C)
    if p_delta is not None:
        x += _load_row(p_delta, i_t, o, m, C)
    return x


@triton.jit
def _normalise(x, m, eps, C: tl.constexpr):
    """Return (x - mean) / deviation, and 1 / deviation."""
    centred = tl.where(m, x - tl.sum(x, 0) / C, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    return centred * scale, scale


@triton.jit(do_not_specialize=["T"])
def train_norm_mix_kernel(
    p_x,
    p_delta,
    p_weight,
    p_bias,
    p_shift,
    p_first,
    p_mix,
    p_sum,
    p_out,
    T,
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    MIXES: tl.constexpr,
):
    """Grid (T / BT). `p_first[t]` is the sequence that begins at token t, else -1."""
    begin = tl.program_id(0).to(tl.int64) * BT
    o = tl.arange(0, BC)
    m = o < C
    weight = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + o, mask=m, other=0.0).to(tl.float32)
    x = _raw_row(p_x, p_delta, tl.maximum(begin - 1, 0), o, m, C)
    normal, _ = _normalise(x, m, eps, C)
    before = normal * weight + bias
    for i in range(BT):
        i_t = begin + i
        if i_t < T:
            x = _raw_row(p_x, p_delta, i_t, o, m, C)
            if p_delta is not None:
                tl.store(p_sum + i_t * C + o, x, mask=m)
            normal, _ = _normalise(x, m, eps, C)
            h = normal * weight + bias
            first = tl.load(p_first + i_t).to(tl.int64)
            if first >= 0:
                before = _load_row(p_shift, first, o, m, C)
            moved = before - h
            for j in tl.static_range(MIXES):
                out = h + moved * _load_row(p_mix, j, o, m, C)
                p_j = p_out + (j * T + i_t) * C + o
                tl.store(p_j, out.to(p_out.dtype.element_ty), mask=m)
            before = h


@triton.jit
def _split_grads(
    i_t, p_0, p_1, p_2, p_3, p_4, p_5, p_mix, o, m, C: tl.constexpr, BC: tl.constexpr,
    MIXES: tl.constexpr,
):  # fmt: skip
    """Return what the mixed inputs of token i_t owe to its own norm and to the one before it."""
    own = tl.zeros([BC], tl.float32)
    before = tl.zeros([BC], tl.float32)
    for j in tl.static_range(MIXES):
        if j == 0:
            grad = _load_row(p_0, i_t, o, m, C)
        elif j == 1:
            grad = _load_row(p_1, i_t, o, m, C)
        elif j == 2:
            grad = _load_row(p_2, i_t, o, m, C)
        elif j == 3:
            grad = _load_row(p_3, i_t, o, m, C)
        elif j == 4:
            grad = _load_row(p_4, i_t, o, m, C)
        else:
            grad = _load_row(p_5, i_t, o, m, C)
        moved = grad * _load_row(p_mix, j, o, m, C)
        own += grad - moved
        before += moved
    return own, before


@triton.jit(do_not_specialize=["T"])
def train_norm_mix_grad_kernel(
    p_x,
    p_weight,
    p_first,
    p_mix,
    p_above,
    p_0,
    p_1,
    p_2,
    p_3,
    p_4,
    p_5,
    p_dx,
    p_ddelta,
    T,
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    MIXES: tl.constexpr,
):
    """Grid (T / BT). `p_above` is the gradient that reaches the residual stream from above."""
    begin = tl.program_id(0).to(tl.int64) * BT
    o = tl.arange(0, BC)
    m = o < C
    weight = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32)
    end = begin + BT
    after = tl.zeros([BC], tl.float32)
    if tl.load(p_first + end, mask=end < T, other=0) < 0:
        _, after = _split_grads(end, p_0, p_1, p_2, p_3, p_4, p_5, p_mix, o, m, C, BC, MIXES)
    for i in range(BT):
        i_t = end - 1 - i
        if i_t < T:
            own, before = _split_grads(i_t, p_0, p_1, p_2, p_3, p_4, p_5, p_mix, o, m, C, BC, MIXES)
            grad = (own + after) * weight
            normal, scale = _normalise(_load_row(p_x, i_t, o, m, C), m, eps, C)
            through = grad - tl.sum(grad, 0) / C - normal * (tl.sum(grad * normal, 0) / C)
            dx = _load_row(p_above, i_t, o, m, C) + scale * through
            tl.store(p_dx + i_t * C + o, dx, mask=m)
            if p_ddelta is not None:
                ddelta = dx.to(p_ddelta.dtype.element_ty)
                tl.store(p_ddelta + i_t * C + o, ddelta, mask=m)
            after = before
            if tl.load(p_first + i_t) >= 0:
                after = tl.zeros([BC], tl.float32)


def norm_mix(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    first: Tensor,
    mix: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add `delta` to the residual stream, normalise, and mix each token with the one before it.

    `total = x + delta; h = LN(total); d = (h of the token before) - h`; a mixed input is
    `h + d * mix`. Before a sequence's first token stands its row of `shift`.

    Args:
        x: residual stream [T, C] fp32.
        delta: the update [T, C], or None.
        weight: of the layer norm [C].
        bias: of the layer norm [C].
        shift: the norm before each sequence [n, C].
        first: int32 [T], the sequence that begins at a token, else -1.
        mix: how far each mixed input moves to the token before, [M, C], M at most 6.

    Returns:
        The new residual stream [T, C] fp32 (`x` itself without `delta`), and the mixed inputs
        [M, T, C] in the dtype of `mix`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    num_mixes, channels = mix.shape
    num_tokens = x.shape[0]
    _check(x, first, [("weight", weight), ("bias", bias)], mix)
    expect_shape("shift", shift, (shift.shape[0], channels))
    expect_contiguous("shift", shift)
    if delta is not None:
        _check_rows("delta", delta, x)
    total = x if delta is None else torch.empty_like(x)
    out = mix.new_empty((num_mixes, num_tokens, channels))
    if num_tokens:
        block = next_power_of_2(channels)
        train_norm_mix_kernel[(-(-num_tokens // BLOCK_T),)](
            x, delta, weight, bias, shift, first, mix, total, out, num_tokens, LN_EPS,
            C=channels, BC=block, BT=BLOCK_T, MIXES=num_mixes,
            num_warps=8 if block >= 2048 else 4,
        )  # fmt: skip
    return total, out


def norm_mix_grad(
    total: Tensor,
    above: Tensor,
    grads: Sequence[Tensor],
    weight: Tensor,
    first: Tensor,
    mix: Tensor,
    delta_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `x` [T, C] fp32 and of `delta` [T, C] of `norm_mix`.

    They are the same numbers; the second is rounded to `delta_dtype`, and None where that is.

    Args:
        total: the residual stream that `norm_mix` returned.
        above: its gradient [T, C] fp32.
        grads: of the mixed inputs, M times [T, C].
        weight: of the layer norm [C].
        first: as `norm_mix` takes it.
        mix: as `norm_mix` takes it.
        delta_dtype: of the update, or None where there was none.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    num_mixes, channels = mix.shape
    num_tokens = total.shape[0]
    _check(total, first, [("weight", weight)], mix)
    _check_rows("above", above, total)
    expect_dtype("above", above, (torch.float32,))
    if len(grads) != num_mixes:
        raise ValueError(f"there must be {num_mixes} gradients of mixed inputs, got {len(grads)}")
    for grad in grads:
        _check_rows("grads", grad, total)
    dx = torch.empty_like(total)
    ddelta = None if delta_dtype is None else torch.empty_like(total, dtype=delta_dtype)
    if num_tokens:
        block = next_power_of_2(channels)
        train_norm_mix_grad_kernel[(-(-num_tokens // BLOCK_T),)](
            total, weight, first, mix, above, *grads, *[None] * (MAX_MIXES - num_mixes), dx, ddelta,
            num_tokens, LN_EPS, C=channels, BC=block, BT=BLOCK_T, MIXES=num_mixes,
            num_warps=8 if block >= 2048 else 4,
        )  # fmt: skip
    return dx, ddelta


def _check(x: Tensor, first: Tensor, vectors: Sequence[tuple[str, Tensor]], mix: Tensor) -> None:
    num_mixes, channels = mix.shape
    if not 1 <= num_mixes <= MAX_MIXES:
        raise ValueError(f"mix must have 1 to {MAX_MIXES} rows, got {num_mixes}")
    expect_shape("x", x, (x.shape[0], channels))
    expect_dtype("x", x, (torch.float32,))
    expect_shape("first", first, (x.shape[0],))
    expect_dtype("first", first, (torch.int32,))
    for name, vector in vectors:
        expect_shape(name, vector, (channels,))
    for name, tensor in (("x", x), ("first", first), ("mix", mix), *vectors):
        expect_contiguous(name, tensor)
        expect_device(name, tensor, x.device)


def _check_rows(name: str, tensor: Tensor, x: Tensor) -> None:
    expect_shape(name, tensor, x.shape)
    expect_dtype(name, tensor, FLOATS)
    expect_contiguous(name, tensor)
    expect_device(name, tensor, x.device)
