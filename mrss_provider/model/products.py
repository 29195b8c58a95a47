"""Products of the fused passes: our kernels for few rows, the library for many."""

from __future__ import annotations

from typing import cast

import torch
from mrss_kernels import rows_linear as linear_ops
from torch import Tensor

from mrss_provider.model.linear import Linear, PlainLinear


def weight_of(linear: Linear) -> Tensor:
    """Return the weight of a plain linear."""
    return cast(PlainLinear, linear).weight


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return the parts [P, B, R] of x [1, B, K] @ weight^T, to be added up by the reader."""
    if x.shape[1] <= linear_ops.MAX_ROWS:
        return linear_ops.rows_linear(x, weight)
    return torch.mm(x[0], weight.t())[None]


def head_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Return the logits [M, V] fp32 of hidden states [M, C] under a head [V, C]."""
    x = hidden.to(head.dtype).contiguous()
    if x.shape[0] > linear_ops.MAX_ROWS:
        return torch.mm(x, head.t(), out_dtype=torch.float32)
    return linear_ops.rows_linear(x[None], head, one_part=True)[0]
