"""RWKV-6's ragged ops in plain torch, same signatures: the oracles of their kernels.

Arithmetic is in fp32, or in fp64 where an input is; results are rounded to no other dtype. What
both versions share is in `reference_ragged`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mrss_kernels.reference_ragged import previous_tokens


def ragged_inputs6(
    h: Tensor, codes: Tensor, up: Tensor, mix: Tensor, before: Tensor, index: Tensor
) -> Tensor:
    """Mix the five inputs; see `mrss_kernels.ragged_inputs6.ragged_inputs6`."""
    compute = _compute_dtype(h)
    z = codes.to(compute).sum(0).tanh().view(h.shape[0], *up.shape[::2]).transpose(0, 1)
    moved = z @ up.to(compute).mT
    return h + (previous_tokens(h, before, index) - h) * (mix.to(compute)[:, None] + moved)


def time_inputs6(
    projected: Tensor, up: Tensor, vectors: Tensor, head_size: int, *, low: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return the fields of `TimeInputs6`; see `mrss_kernels.ragged_mix6.time_inputs6`."""
    compute = _compute_dtype(projected)
    channels, rank = up.shape
    if low is None:
        total = projected.to(compute).sum(0)
        low = total[:, 4 * channels :]
        projected = torch.stack(total[:, : 4 * channels].chunk(4, -1))
    z = low.to(compute)[:, :rank].tanh()
    w = -torch.exp(vectors.to(compute)[0] + z @ up.to(compute).mT)
    return (*projected.to(compute), w)


def time_output6(
    y: Tensor,
    gate: Tensor,
    vectors: Tensor,
    head_size: int,
    index: Tensor,
    time_offset: Tensor | None = None,
    *,
    y_scale: float = 1.0,
    out_scale: float = 1.0,
) -> Tensor:
    """Compute the output projection's input; see `mrss_kernels.ragged_mix6.time_output6`."""
    compute = _compute_dtype(y)
    slot = index[2].long()
    y = y.to(compute) / y_scale
    if time_offset is not None:
        y = y * (1 + time_offset[slot].to(compute))
    _, _, weight, bias = vectors.to(compute)
    y = F.group_norm(y, y.shape[1] // head_size, weight, bias, 64e-5)
    return y * F.silu(gate.to(compute)) * (out_scale * (slot >= 0)[:, None])


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
