"""The fused decode ops in plain torch, same signatures: the oracles of their kernels.

Arithmetic is in fp32, or in fp64 where an input is; results are rounded to no other dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mrss_kernels import reference

LOG_DECAY_SCALE = 0.6065306597126334


def rows_linear(
    x: Tensor, weight: Tensor, groups: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """Multiply few rows by one weight; see `mrss_kernels.rows_linear.rows_linear`, one part."""
    compute = _compute_dtype(x)
    y = torch.einsum("mbk,rk->mbr", x.to(compute), weight.to(compute))
    if groups is None:
        y = y[:1]
    else:
        index = groups.long().repeat_interleave(weight.shape[0] // groups.shape[0])
        y = y.gather(0, index.expand(1, x.shape[1], -1))
    return y.relu().square() if activation == "relu2" else y


def add_norm_mix(
    x: Tensor,
    parts: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    slots: Tensor,
    mix: Tensor,
    *,
    tokens: Tensor | None = None,
    norm0: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Add, normalise and mix; see `mrss_kernels.add_norm_mix.add_norm_mix`."""
    compute = _compute_dtype(x)
    total = (x if tokens is None else x[tokens]).to(compute)
    if norm0 is not None:
        weight0, bias0 = (part.to(compute) for part in norm0)
        total = F.layer_norm(total, total.shape[-1:], weight0, bias0, 1e-5)
    if parts is not None:
        total = total + parts.to(compute).sum(0)
    h = F.layer_norm(total, total.shape[-1:], weight.to(compute), bias.to(compute), 1e-5)
    live = slots >= 0
    previous = torch.zeros_like(h)
    previous[live] = shift[slots[live]].to(compute)
    shift[slots[live]] = h[live].to(shift.dtype)
    return total, h + (previous - h) * mix.to(compute)[:, None]


def add_norm(x: Tensor, parts: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """Add and normalise; see `mrss_kernels.add_norm_mix.add_norm`."""
    compute = _compute_dtype(x)
    total = x.to(compute) if parts is None else x.to(compute) + parts.to(compute).sum(0)
    return F.layer_norm(total, total.shape[-1:], weight.to(compute), bias.to(compute), 1e-5)


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
) -> Tensor:
    """Advance one layer's recurrence; see `mrss_kernels.time_mix7.time_mix7`."""
    compute = _compute_dtype(projected)
    _, heads, size, _ = pool.shape
    channels = heads * size
    if low is None:
        low = projected[..., 3 * channels :]
        projected = torch.stack(projected[..., : 3 * channels].to(compute).sum(0).chunk(3, -1))
    r, k, v = projected.to(compute)
    lows = torch.split(low.to(compute).sum(0), list(ranks), -1)
    w, a, g, gate = lora_up(lows, up.to(compute), vectors.to(compute), ranks)
    _, _, _, k_k, k_a, r_k, gn_weight, gn_bias = vectors.to(compute)
    if ranks[3]:
        v = v + (v_first.to(compute) - v) * gate
    else:
        v_first.copy_(v)
    per_head = (r.shape[0], heads, size)
    kk = F.normalize((k * k_k).view(per_head), dim=-1)
    k = k * (1 + (a - 1) * k_a)
    r, w, k, v, a = (x.view(per_head) for x in (r, w, k, v, a))
    y = reference.wkv7_decode(r, w, k, v, kk, a, pool, slots).to(compute).reshape(-1, channels)
    if time_offset is not None:
        live = slots >= 0
        y[live] = y[live] * (1 + time_offset[slots[live]].to(compute))
    y = F.group_norm(y, heads, gn_weight, gn_bias, 64e-5)
    bonus = (r * k * r_k.view(heads, size)).sum(-1, keepdim=True) * v
    gated: Tensor = (y + bonus.reshape(-1, channels)) * g * (slots >= 0)[:, None]
    return gated


def lora_up(
    lows: Sequence[Tensor], up: Tensor, vectors: Tensor, ranks: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log decay, a, g and the v gate [B, C] each from the first halves of the LoRAs."""
    up_w, up_a, up_g, up_v = torch.split(up, list(ranks), -1)
    low_w, low_a, low_g, low_v = lows
    w = -LOG_DECAY_SCALE * torch.sigmoid(vectors[0] + low_w.tanh() @ up_w.mT)
    a = torch.sigmoid(vectors[1] + low_a @ up_a.mT)
    return w, a, low_g.sigmoid() @ up_g.mT, torch.sigmoid(vectors[2] + low_v @ up_v.mT)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
