"""The ragged ops in plain torch, same signatures: the oracles of their kernels.

Arithmetic is in fp32, or in fp64 where an input is; results are rounded to no other dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mrss_kernels.reference_fused import add_norm, lora_up


def ragged_index(cu_seqlens: Tensor, slots: Tensor, num_tokens: int) -> Tensor:
    """Say of each token where it stands; see `mrss_kernels.ragged_index.ragged_index`."""
    index = torch.full((3, num_tokens), -1, dtype=torch.int32, device=slots.device)
    bounds = cu_seqlens.tolist()
    for i, slot in enumerate(slots.tolist()):
        start, end = bounds[i : i + 2]
        if start < end:
            index[0, start] = i
            index[1, end - 1] = slot
            index[2, start:end] = slot
    return index


def ragged_tail(cu_seqlens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Pick each sequence's last two tokens; see `mrss_kernels.ragged_index.ragged_tail`."""
    rows, index = [], []
    bounds = cu_seqlens.tolist()
    for i, slot in enumerate(slots.tolist()):
        start, end = bounds[i : i + 2]
        last, lone = max(end - 1, 0), end - start < 2
        slot = slot if end > start else -1
        rows += [last if lone else last - 1, last]
        index += [[i, -1, slot], [i if lone else -1, slot, slot]]
    columns = torch.tensor(index, dtype=torch.int32, device=slots.device)
    return torch.tensor(rows, device=slots.device), columns.T


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
    tokens: Tensor | None = None,
    norm0: tuple[Tensor, Tensor] | None = None,
    gate: Tensor | None = None,
    scale: float = 1.0,
    first_scale: float = 1.0,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add, normalise and mix; see `mrss_kernels.ragged_norm.ragged_norm_mix`."""
    compute = _compute_dtype(x)
    total = (x if tokens is None else x[tokens]).to(compute)
    if norm0 is not None:
        total = add_norm(total, None, *norm0)
    total = _add(total, parts, gate, scale)
    normed = add_norm(total, None, weight, bias)
    if h is not None:
        h.copy_(normed)
    last = index[1].long()
    previous = previous_tokens(normed, before, index)
    shift[last[last >= 0]] = normed[last >= 0].to(shift.dtype)
    mixed = normed + (previous - normed) * mix.to(compute)[:, None]
    mixed[0] *= first_scale
    return total, mixed


def previous_tokens(h: Tensor, before: Tensor, index: Tensor) -> Tensor:
    """Return for each token of h [T, C] the one before it, at a start a row of `before` [n, C]."""
    first = index[0].long()
    previous = torch.cat((h[:1], h[:-1]))
    previous[first >= 0] = before[first[first >= 0]].to(h.dtype)
    return previous


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
    """Normalise last tokens; see `mrss_kernels.ragged_norm.ragged_norm_last`."""
    total = _add(x.to(_compute_dtype(x)), parts, gate, scale)
    return add_norm(total, None, weight, bias)[(cu_seqlens[1:] - 1).clamp_min(0)]


def lora_down7(mixed: Tensor, down: Tensor, ranks: Sequence[int]) -> Tensor:
    """Multiply and activate first halves; see `mrss_kernels.lora_down7.lora_down7`."""
    compute = _compute_dtype(mixed)
    w, a, g, v = torch.split(down.to(compute), list(ranks))
    x = mixed.to(compute)
    return torch.cat(((x[3] @ w.mT).tanh(), x[4] @ a.mT, (x[5] @ g.mT).sigmoid(), x[2] @ v.mT), -1)


def time_inputs7(
    projected: Tensor,
    up: Tensor,
    vectors: Tensor,
    ranks: Sequence[int],
    v_first: Tensor | None,
    head_size: int,
    *,
    low: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the fields of `TimeInputs`; see `mrss_kernels.time_inputs7.time_inputs7`.

    Nothing is modified: v is a tensor of its own.
    """
    compute = _compute_dtype(projected)
    channels = up.shape[0]
    projected = projected.to(compute)
    if low is None:
        total = projected.sum(0)
        r, k, v = total[:, : 3 * channels].chunk(3, -1)
        low_w, low_a, low_g, low_v = torch.split(total[:, 3 * channels :], list(ranks), -1)
    else:
        r, k, v = projected
        low_w, low_a, low_g, low_v = torch.split(low.to(compute), list(ranks), -1)
        # What follows activates them, as the other form needs.
        low_w, low_g = low_w.atanh(), low_g.logit()
    w, a, _, gate = lora_up(
        (low_w, low_a, low_g, low_v), up.to(compute), vectors.to(compute), ranks
    )
    k_k, k_a, r_k = vectors.to(compute)[3:6]
    if v_first is not None:
        v = v + (v_first.to(compute) - v) * gate
    heads = (r.shape[0], channels // head_size, head_size)
    kk = F.normalize((k * k_k).view(heads), dim=-1).view(k.shape)
    k = k * (1 + (a - 1) * k_a)
    return r, w, k, v, kk, a, (r * k * r_k).view(heads).sum(-1)


def time_output7(
    y: Tensor,
    v: Tensor,
    bonus: Tensor,
    low: Tensor,
    up: Tensor,
    vectors: Tensor,
    ranks: Sequence[int],
    index: Tensor,
    time_offset: Tensor | None = None,
    *,
    activated: bool = True,
) -> Tensor:
    """Compute the output projection's input; see `mrss_kernels.time_output7.time_output7`.

    v and bonus stand for the `TimeInputs` that they are fields of.
    """
    compute = _compute_dtype(y)
    slot = index[2].long()
    y, v, bonus = (x.to(compute) for x in (y, v, bonus))
    gate = torch.split(low.to(compute).sum(0), list(ranks), -1)[2]
    g = (gate if activated else gate.sigmoid()) @ torch.split(up, list(ranks), -1)[2].to(compute).mT
    if time_offset is not None:
        y = y * (1 + time_offset[slot].to(compute))
    heads = bonus.shape[1]
    _, _, _, _, _, _, weight, bias = vectors.to(compute)
    y = F.group_norm(y, heads, weight, bias, 64e-5)
    y = y + (bonus[..., None] * v.view(*bonus.shape, -1)).view(y.shape)
    return y * g * (slot >= 0)[:, None]


def _add(total: Tensor, parts: Tensor | None, gate: Tensor | None, scale: float) -> Tensor:
    if parts is None:
        return total
    delta = parts.to(total.dtype).sum(0) / scale
    return total + (delta if gate is None else delta * gate.to(total.dtype).sigmoid())


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
