# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""What stands before and after RWKV-7's recurrence in a layer, with its gradient.

For frozen weights: only activations have gradients. All tokens are alike here, so how sequences are
packed does not matter. Oracle: the same in plain torch under autograd, `mrss_provider.tune.rwkv7`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    expect_shape,
)
from mrss_kernels._launch import next_power_of_2

LOG_DECAY_SCALE = -0.606530659712633
"""-exp(-0.5): the log decay is this times a sigmoid."""

GROUP_NORM_EPS = 64e-5
MIN_NORM = 1e-12

CONSTANTS = {"SCALE": LOG_DECAY_SCALE, "LEAST": MIN_NORM}

BLOCK_T = 4
"""Tokens a program: the vectors of the layer are read once for them."""

TILE = 1024
"""Channels a program, in whole heads."""


class GateVectors(NamedTuple):
    """Vectors [C] of a layer; `v0` is None in the first one, where the value is its own."""

    w0: Tensor
    a0: Tensor
    v0: Tensor | None
    k_k: Tensor
    k_a: Tensor


@triton.jit
def _tile(H, N: tl.constexpr, BH: tl.constexpr):
    """Return the channels [BH, N] of this program's heads, and which exist."""
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    return heads[:, None] * N + tl.arange(0, N)[None, :], (heads < H)[:, None]


@triton.jit
def _load(p, o, m):
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store(p, o, m, x):
    tl.store(p + o, x.to(p.dtype.element_ty), mask=m)


@triton.jit
def _removal(k, k_k, LEAST: tl.constexpr):
    """Return the removal key of unit norm a head, and 1 / its norm before that."""
    raw = k * k_k
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(raw * raw, 1)), LEAST)
    return raw * inverse[:, None], inverse


@triton.jit(do_not_specialize=["T"])
def train_gates7_kernel(
    p_w_low, p_a_low, p_v_low, p_k, p_v, p_first_v, p_w0, p_a0, p_v0, p_k_k, p_k_a,
    p_w, p_key, p_value, p_removal, p_added, T, H,
    N: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, SCALE: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """Grid (T / BT, H / BH)."""
    c, m = _tile(H, N, BH)
    w0, a0 = _load(p_w0, c, m), _load(p_a0, c, m)
    k_k, k_a = _load(p_k_k, c, m), _load(p_k_a, c, m)
    if p_v0 is not None:
        v0 = _load(p_v0, c, m)
    begin = tl.program_id(0).to(tl.int64) * BT
    for i in range(BT):
        i_t = begin + i
        if i_t < T:
            o = i_t * H * N + c
            k = _load(p_k, o, m)
            a = tl.sigmoid(a0 + _load(p_a_low, o, m))
            _store(p_w, o, m, SCALE * tl.sigmoid(w0 + _load(p_w_low, o, m)))
            _store(p_key, o, m, k * (1.0 + (a - 1.0) * k_a))
            removal, _ = _removal(k, k_k, LEAST)
            _store(p_removal, o, m, -removal)
            _store(p_added, o, m, removal * a)
            if p_v0 is not None:
                v = _load(p_v, o, m)
                share = tl.sigmoid(v0 + _load(p_v_low, o, m))
                _store(p_value, o, m, v + (_load(p_first_v, o, m) - v) * share)


@triton.jit(do_not_specialize=["T"])
def train_gates7_grad_kernel(
    p_w_low, p_a_low, p_v_low, p_k, p_v, p_first_v, p_w0, p_a0, p_v0, p_k_k, p_k_a,
    p_gw, p_gkey, p_gvalue, p_gremoval, p_gadded,
    p_dw_low, p_da_low, p_dv_low, p_dk, p_dv, p_dfirst_v, T, H,
    N: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, SCALE: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """Grid (T / BT, H / BH)."""
    c, m = _tile(H, N, BH)
    w0, a0 = _load(p_w0, c, m), _load(p_a0, c, m)
    k_k, k_a = _load(p_k_k, c, m), _load(p_k_a, c, m)
    if p_v0 is not None:
        v0 = _load(p_v0, c, m)
    begin = tl.program_id(0).to(tl.int64) * BT
    for i in range(BT):
        i_t = begin + i
        if i_t < T:
            o = i_t * H * N + c
            decay = tl.sigmoid(w0 + _load(p_w_low, o, m))
            dw = SCALE * _load(p_gw, o, m)
            _store(p_dw_low, o, m, dw * decay * (1.0 - decay))
            k = _load(p_k, o, m)
            a = tl.sigmoid(a0 + _load(p_a_low, o, m))
            removal, inverse = _removal(k, k_k, LEAST)
            gkey, gadded = _load(p_gkey, o, m), _load(p_gadded, o, m)
            da = gkey * k * k_a + gadded * removal
            _store(p_da_low, o, m, da * a * (1.0 - a))
            toward = gadded * a - _load(p_gremoval, o, m)
            along = tl.sum(toward * removal, 1)
            # Below the least norm the key is divided by a constant.
            along = tl.where(inverse * LEAST < 1.0, along, 0.0)
            dk = inverse[:, None] * (toward - removal * along[:, None]) * k_k
            _store(p_dk, o, m, dk + gkey * (1.0 + (a - 1.0) * k_a))
            if p_v0 is not None:
                gvalue = _load(p_gvalue, o, m)
                share = tl.sigmoid(v0 + _load(p_v_low, o, m))
                apart = _load(p_first_v, o, m) - _load(p_v, o, m)
                _store(p_dv, o, m, gvalue * (1.0 - share))
                _store(p_dfirst_v, o, m, gvalue * share)
                _store(p_dv_low, o, m, gvalue * apart * share * (1.0 - share))


@triton.jit
def _head_norm(y, eps, N: tl.constexpr):
    """Return (y - mean) / deviation of each head, and 1 / deviation."""
    centred = y - (tl.sum(y, 1) / N)[:, None]
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / N + eps)
    return centred * scale[:, None], scale[:, None]


@triton.jit(do_not_specialize=["T"])
def train_output7_kernel(
    p_y, p_r, p_k, p_v, p_g, p_weight, p_bias, p_r_k, p_out, T, H, eps,
    N: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Grid (T / BT, H / BH)."""
    c, m = _tile(H, N, BH)
    weight, bias, r_k = _load(p_weight, c, m), _load(p_bias, c, m), _load(p_r_k, c, m)
    begin = tl.program_id(0).to(tl.int64) * BT
    for i in range(BT):
        i_t = begin + i
        if i_t < T:
            o = i_t * H * N + c
            normal, _ = _head_norm(_load(p_y, o, m), eps, N)
            bonus = tl.sum(_load(p_r, o, m) * _load(p_k, o, m) * r_k, 1)[:, None]
            out = normal * weight + bias + bonus * _load(p_v, o, m)
            _store(p_out, o, m, out * _load(p_g, o, m))


@triton.jit(do_not_specialize=["T"])
def train_output7_grad_kernel(
    p_y, p_r, p_k, p_v, p_g, p_weight, p_bias, p_r_k, p_grad,
    p_dy, p_dr, p_dk, p_dv, p_dg, T, H, eps,
    N: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Grid (T / BT, H / BH)."""
    c, m = _tile(H, N, BH)
    weight, bias, r_k = _load(p_weight, c, m), _load(p_bias, c, m), _load(p_r_k, c, m)
    begin = tl.program_id(0).to(tl.int64) * BT
    for i in range(BT):
        i_t = begin + i
        if i_t < T:
            o = i_t * H * N + c
            r, k, v = _load(p_r, o, m), _load(p_k, o, m), _load(p_v, o, m)
            normal, scale = _head_norm(_load(p_y, o, m), eps, N)
            bonus = tl.sum(r * k * r_k, 1)[:, None]
            grad = _load(p_grad, o, m)
            _store(p_dg, o, m, grad * (normal * weight + bias + bonus * v))
            grad = grad * _load(p_g, o, m)
            _store(p_dv, o, m, grad * bonus)
            dbonus = tl.sum(grad * v, 1)[:, None] * r_k
            _store(p_dr, o, m, dbonus * k)
            _store(p_dk, o, m, dbonus * r)
            through = grad * weight
            mean = (tl.sum(through, 1) / N)[:, None]
            along = (tl.sum(through * normal, 1) / N)[:, None]
            _store(p_dy, o, m, scale * (through - mean - normal * along))


def gates7(rows: Sequence[Tensor | None], vectors: GateVectors) -> tuple[Tensor, ...]:
    """Compute what the recurrence reads.

    With `a = sigmoid(a0 + a_low)`: the log decay `-exp(-0.5) sigmoid(w0 + w_low)`, the key
    `k (1 + (a - 1) k_a)`, the value `v + (first_v - v) sigmoid(v0 + v_low)`, and for the removal
    key `kk = k k_k / |k k_k|` of each head `-kk` and `kk a`.

    Args:
        rows: w_low, a_low, v_low, k, v, first_v [T, H, N]: the LoRAs without their biases, the
            products, the first layer's value; v_low and first_v are None in that layer.
        vectors: of the layer.

    Returns:
        The log decay fp32, the key, the value (v itself in the first layer), -kk and kk a, all
        [T, H, N] and but for the decay in k's dtype.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    key = rows[3]
    assert key is not None
    _check_rows(rows, vectors, key)
    decay = torch.empty_like(key, dtype=torch.float32)
    is_first = vectors.v0 is None
    outs = [torch.empty_like(key) for _ in range(3 if is_first else 4)]
    new_key, removal, added = outs[:3]
    value = rows[4] if is_first else outs[3]
    assert value is not None
    grid, sizes = _launch(key)
    if key.shape[0]:
        train_gates7_kernel[grid](
            *rows,
            *vectors,
            decay,
            new_key,
            value,
            removal,
            added,
            *key.shape[:2],
            **sizes,
            **CONSTANTS,
        )
    return decay, new_key, value, removal, added


def gates7_grad(
    rows: Sequence[Tensor | None], vectors: GateVectors, grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the six `rows` of `gates7`, given those of its five results.

    In the first layer v's is that of the value, and v_low's and first_v's are None.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    key = rows[3]
    assert key is not None
    _check_rows([*rows, *grads], vectors, key)
    dw_low, da_low, dk = (torch.empty_like(key) for _ in range(3))
    dv_low, dv, dfirst = None, grads[2], None
    if vectors.v0 is not None:
        dv_low, dv, dfirst = (torch.empty_like(key) for _ in range(3))
    grid, sizes = _launch(key)
    if key.shape[0]:
        train_gates7_grad_kernel[grid](
            *rows,
            *vectors,
            *grads,
            dw_low,
            da_low,
            dv_low,
            dk,
            dv,
            dfirst,
            *key.shape[:2],
            **sizes,
            **CONSTANTS,
        )
    return dw_low, da_low, dv_low, dk, dv, dfirst


def output7(rows: Sequence[Tensor], weight: Tensor, bias: Tensor, r_k: Tensor) -> Tensor:
    """Return `(head_norm(y) weight + bias + sum(r k r_k) v) g`, [T, H, N] in g's dtype.

    Args:
        rows: y, r, k, v, g [T, H, N].
        weight: of the group norm [C].
        bias: of the group norm [C].
        r_k: of the bonus, C numbers.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    _check_rows(rows, (weight, bias, r_k), rows[4])
    out = torch.empty_like(rows[4])
    grid, sizes = _launch(out)
    if out.shape[0]:
        train_output7_kernel[grid](
            *rows, weight, bias, r_k, out, *out.shape[:2], GROUP_NORM_EPS, **sizes
        )
    return out


def output7_grad(
    rows: Sequence[Tensor], weight: Tensor, bias: Tensor, r_k: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of the five `rows` of `output7`, given that of its result.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    _check_rows([*rows, grad], (weight, bias, r_k), grad)
    found = tuple(torch.empty_like(row) for row in rows)
    grid, sizes = _launch(grad)
    if grad.shape[0]:
        train_output7_grad_kernel[grid](
            *rows, weight, bias, r_k, grad, *found, *grad.shape[:2], GROUP_NORM_EPS, **sizes
        )
    return found


def _launch(rows: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    num_tokens, num_heads, size = rows.shape
    block = min(next_power_of_2(num_heads), max(1, TILE // size))
    return (-(-num_tokens // BLOCK_T), -(-num_heads // block)), {
        "N": size, "BH": block, "BT": BLOCK_T, "num_warps": 4,
    }  # fmt: skip


def _check_rows(
    rows: Sequence[Tensor | None], vectors: Sequence[Tensor | None], like: Tensor
) -> None:
    expect_head_size(like.shape[-1])
    for row in rows:
        if row is not None:
            expect_shape("rows", row, like.shape)
            expect_dtype("rows", row, FLOATS)
            expect_contiguous("rows", row)
            expect_device("rows", row, like.device)
    channels = like.shape[1] * like.shape[2]
    for vector in vectors:
        if vector is not None:
            expect_shape("vectors", vector.flatten(), (channels,))
            expect_contiguous("vectors", vector)
            expect_device("vectors", vector, like.device)
