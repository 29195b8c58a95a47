"""RWKV-6's fused decode ops in plain torch, same signatures: the oracles of their kernels.

Arithmetic is in fp32, or in fp64 where an input is; results are rounded to no other dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mrss_kernels import reference

_Norm = tuple[Tensor, Tensor]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the codes of the time mixing; see `mrss_kernels.norm_mix6.add_norm_codes`, one part."""
    compute = _compute_dtype(x)
    total = (x if tokens is None else x[tokens]).to(compute)
    if norm0 is not None:
        total = _layer_norm(total, norm0)
    total = _add(total, parts, gate, scale)
    h = _layer_norm(total, norm)
    previous, _ = _previous(shift, slots, h)
    return total, h, ((h + (previous - h) * mix.to(compute)) @ down.to(compute).mT)[None]


def add_norm_mix(
    x: Tensor,
    parts: Tensor | None,
    norm: _Norm,
    shift: Tensor,
    slots: Tensor,
    mix: Tensor,
    *,
    scale: float = 1.0,
    key_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Make the ffn's inputs; see `mrss_kernels.norm_mix6.add_norm_mix`."""
    total = _add(x.to(_compute_dtype(x)), parts, None, scale)
    h = _layer_norm(total, norm)
    previous, live = _previous(shift, slots, h)
    shift[slots[live]] = h[live].to(shift.dtype)
    out = h + (previous - h) * mix.to(h.dtype)[:, None]
    out[0] *= key_scale
    return total, out


def add_norm(
    x: Tensor, parts: Tensor | None, gate: Tensor | None, norm: _Norm, *, scale: float = 1.0
) -> Tensor:
    """Add and normalise; see `mrss_kernels.norm_mix6.add_norm`."""
    return _layer_norm(_add(x.to(_compute_dtype(x)), parts, gate, scale), norm)


def mix_inputs(
    h: Tensor, codes: Tensor, up: Tensor, mix: Tensor, shift: Tensor, slots: Tensor
) -> Tensor:
    """Mix the five inputs; see `mrss_kernels.time_mix6.mix_inputs`."""
    compute = _compute_dtype(h)
    z = codes.to(compute).sum(0).tanh().view(h.shape[0], *up.shape[::2]).transpose(0, 1)
    moved = z @ up.to(compute).mT
    previous, _ = _previous(shift, slots, h.to(compute))
    return h + (previous - h) * (mix.to(compute)[:, None] + moved)


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
    """Advance one layer's recurrence; see `mrss_kernels.time_mix6.time_mix6`."""
    compute = _compute_dtype(projected)
    _, heads, size, _ = pool.shape
    channels = heads * size
    if low is None:
        low = projected[..., 4 * channels :]
        projected = torch.stack(projected[..., : 4 * channels].to(compute).sum(0).chunk(4, -1))
    k, v, r, g = projected.to(compute)
    z = low.to(compute).sum(0)[:, : up.shape[1]].tanh()
    decay, bonus, gn_weight, gn_bias = vectors.to(compute)
    w = -torch.exp(decay + z @ up.to(compute).mT)
    r, w, k, v = (x.view(-1, heads, size) for x in (r, w, k, v))
    u = bonus.view(heads, size)
    y = reference.wkv6_decode(r, w, k, v, u, pool, slots).to(compute).reshape(-1, channels)
    live = slots >= 0
    shift[slots[live]] = h[live].to(shift.dtype)
    if time_offset is not None:
        y[live] = y[live] * (1 + time_offset[slots[live]].to(compute))
    y = F.group_norm(y, heads, gn_weight, gn_bias, 64e-5)
    return y * F.silu(g) * (out_scale * live[:, None])


def key_receptance(x: Tensor, weight: Tensor, ffn_size: int) -> tuple[Tensor, Tensor]:
    """Multiply by the ffn's first weights; see `mrss_kernels.ffn6.key_receptance`."""
    compute = _compute_dtype(x)
    weight = weight.to(compute)
    key, receptance = weight[:ffn_size], weight[ffn_size:]
    for_key, for_receptance = x.to(compute)
    return (for_key @ key.mT).relu().square(), for_receptance @ receptance.mT


def _add(total: Tensor, parts: Tensor | None, gate: Tensor | None, scale: float) -> Tensor:
    if parts is None:
        return total
    delta = parts.to(total.dtype).sum(0) / scale
    return total + (delta if gate is None else delta * gate.to(total.dtype).sigmoid())


def _layer_norm(x: Tensor, norm: _Norm) -> Tensor:
    weight, bias = (part.to(x.dtype) for part in norm)
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def _previous(shift: Tensor, slots: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's last token [B, C], 0 for padding, and which rows are none."""
    live = slots >= 0
    previous = torch.zeros_like(h)
    previous[live] = shift[slots[live]].to(h.dtype)
    return previous, live


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
