"""Products of the fused passes: our kernels for few rows, the library for many.

A weight is a tensor in 16 bits or a `QuantizedWeight`. Our kernels read either as it is; for the
library's products a quantised one is written out first, a part at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from mrss_kernels import rows_linear as linear_ops
from mrss_kernels.dequantize import into_scratch
from mrss_kernels.linear_cuts import LinearConfig
from mrss_kernels.quantized import QuantizedWeight, stack_rows
from mrss_kernels.quantized_linear import quantized_linear
from torch import Tensor

from mrss_provider.model.linear import Linear, PlainLinear

Weight = Tensor | QuantizedWeight

MAX_QUANTIZED_ROWS = 128
"""Rows up to which our kernels multiply a quantised weight where the library would one in 16 bits:
writing it out costs more (measured on an H100)."""

# Elements of the FFN's inner activations that are held at a time: 32 MB stay in the L2, which saves
# more than the cut products lose (870 us a layer against 913 whole, 8192 tokens of 1.5B, H100).
_FFN_ELEMENTS = 1 << 24
# Of quantised weights, which are written out once for every chunk.
_QUANTIZED_FFN_ELEMENTS = 1 << 26

# Rows of a tile of the library's products, or a multiple of it.
_TILE_LEN = 256

# Of first halves of LoRAs: whoever reads them for many rows reads them over and over.
_ONE_PART = LinearConfig(32, 64, 1, 4, 4)


def weight_of(linear: Linear) -> Weight:
    """Return the weight of a plain or quantised linear."""
    return cast(PlainLinear, linear).weight


def tensor_of(linear: Linear) -> Tensor:
    """Return the weight of a plain linear."""
    return cast(PlainLinear, linear).weight


def rows_of(weight: Weight, first: int, end: int) -> Weight:
    """Return the outputs of a weight from `first` up to `end`, a view."""
    return weight[first:end] if isinstance(weight, Tensor) else weight.rows(first, end)


def stack(linears: Sequence[Linear]) -> tuple[Weight, list[int]]:
    """Stack linears' weights [*, K], each padded with zeros to a multiple of 64 rows.

    Args:
        linears: plain or quantised ones; their weights are *modified* to views of the stack.

    Returns:
        The stack, and how many of its rows each linear has.
    """
    weights = [weight_of(linear) for linear in linears]
    lengths = [-(-len(each) // linear_ops.GROUP_LEN) * linear_ops.GROUP_LEN for each in weights]
    packed = _stacked(weights, lengths)
    first = 0
    for linear, weight, length in zip(linears, weights, lengths, strict=True):
        view = rows_of(packed, first, first + len(weight))
        cast(PlainLinear, linear).weight = cast(Tensor, view)
        first += length
    return packed, lengths


def few_rows(
    x: Tensor, weight: Weight, groups: Tensor | None = None, *, squared: bool = False
) -> Tensor:
    """Return the parts [P, B, R] of x [M, B, K] @ weight^T; see `rows_linear`.

    Args:
        x: of up to `MAX_ROWS` rows.
        weight: [R, K].
        groups: which input each 64 outputs read.
        squared: return max(y, 0)^2 [1, B, R] in the dtype of x.
    """
    multiply = linear_ops.rows_linear if isinstance(weight, Tensor) else quantized_linear
    if squared:
        return multiply(x, weight, groups, activation="relu2", out_dtype=x.dtype)  # type: ignore[arg-type]
    return multiply(x, weight, groups)  # type: ignore[arg-type]


def one_part(x: Tensor, weight: Weight, groups: Tensor | None = None) -> Tensor:
    """Return x [M, B, K] @ weight^T of few outputs, in one part [1, B, R] fp32."""
    if isinstance(weight, Tensor):
        return linear_ops.rows_linear(x, weight, groups, config=_ONE_PART)
    return quantized_linear(x, weight, groups, one_part=True)


def many_rows(x: Tensor, weight: Weight, *, out: Tensor | None = None) -> Tensor:
    """Return x [B, K] @ weight^T [B, R] in the dtype of x, by the library.

    Args:
        x: any number of rows.
        weight: [R, K]; a quantised one is written out to its scratch, in parts that fit, if the
            rows are more than `MAX_QUANTIZED_ROWS`.
        out: where to put it, [B, R], contiguous; or None.
    """
    if isinstance(weight, Tensor):
        return torch.mm(x, weight.t(), out=out)
    if x.shape[0] <= MAX_QUANTIZED_ROWS:
        x = x.contiguous()[None]
        return quantized_linear(x, weight, out_dtype=x.dtype, one_part=True, out=out)[0]
    size_r, size_k = weight.shape
    if out is None:
        out = torch.empty((x.shape[0], size_r), dtype=x.dtype, device=x.device)
    step = weight.scratch.numel() // size_k // linear_ops.GROUP_LEN * linear_ops.GROUP_LEN
    for first in range(0, size_r, step):
        end = min(first + step, size_r)
        part = into_scratch(weight.rows(first, end))
        torch.mm(x, part.t(), out=out[:, first:end])
    return out


def square_products(x: Tensor, weight: Weight) -> Tensor:
    """Return x [M, B, C], each times its own C rows of weight [M C or more, C]: [M, B, C]."""
    num_inputs, rows, channels = x.shape
    if isinstance(weight, Tensor):
        square = weight[: num_inputs * channels].view(num_inputs, channels, channels)
        return torch.bmm(x, square.mT)
    out = torch.empty((num_inputs, rows, channels), dtype=x.dtype, device=x.device)
    for i in range(num_inputs):
        many_rows(x[i], weight.rows(i * channels, (i + 1) * channels), out=out[i])
    return out


def written_out(weight: Weight) -> Tensor:
    """Return a weight as a tensor, which holds until the next product of many rows."""
    return weight if isinstance(weight, Tensor) else into_scratch(weight)


def product(x: Tensor, weight: Weight) -> Tensor:
    """Return the parts [P, B, R] of x [1, B, K] @ weight^T, to be added up by the reader."""
    if x.shape[1] <= linear_ops.MAX_ROWS:
        return few_rows(x, weight)
    return many_rows(x[0], weight)[None]


def squared_relu(x: Tensor, weight: Weight) -> Tensor:
    """Return max(x @ weight^T, 0)^2 [1, B, R] in the dtype of x [1, B, K]."""
    if x.shape[1] <= linear_ops.MAX_ROWS:
        return few_rows(x, weight, squared=True)
    return linear_ops.square_relu_(many_rows(x[0], weight))[None]


def ffn_chunk_len(ffn_size: int, weight: Weight) -> int:
    """Return for how many tokens an FFN of this width and kind of weights is computed at a time."""
    elements = _FFN_ELEMENTS if isinstance(weight, Tensor) else _QUANTIZED_FFN_ELEMENTS
    return max(elements // ffn_size, 1)


def ffn_in_chunks(x: Tensor, key: Weight, value: Weight, chunk_len: int) -> Tensor:
    """Return max(x @ key^T, 0)^2 @ value^T [1, T, C] of many tokens x [T, C], by the library.

    Args:
        x: more than `MAX_ROWS` tokens.
        key: [F, C].
        value: [C, F].
        chunk_len: tokens whose inner activations are held at a time, at most.
    """
    num_tokens = x.shape[0]
    out = torch.empty_like(x)
    # Chunks of one length, in whole tiles of the library's products.
    even_len = -(-num_tokens // -(-num_tokens // chunk_len))
    step = min(even_len + -even_len % _TILE_LEN, chunk_len)
    for first in range(0, num_tokens, step):
        chunk = slice(first, first + step)
        hidden = linear_ops.square_relu_(many_rows(x[chunk], key))
        many_rows(hidden, value, out=out[chunk])
    return out[None]


def head_logits(hidden: Tensor, head: Weight) -> Tensor:
    """Return the logits [M, V] fp32 of hidden states [M, C] under a head [V, C]."""
    x = hidden.to(head.dtype).contiguous()
    if isinstance(head, QuantizedWeight):
        # Whatever the rows: logits are not to be rounded to 16 bits.
        return quantized_linear(x[None], head, one_part=True)[0]
    if x.shape[0] > linear_ops.MAX_ROWS:
        return torch.mm(x, head.t(), out_dtype=torch.float32)
    return linear_ops.rows_linear(x[None], head, one_part=True)[0]


def _stacked(weights: Sequence[Weight], lengths: Sequence[int]) -> Weight:
    first = weights[0]
    if isinstance(first, QuantizedWeight):
        padded = zip(cast(Sequence[QuantizedWeight], weights), lengths, strict=True)
        return stack_rows([each.padded(length) for each, length in padded])
    packed = first.new_zeros((sum(lengths), first.shape[1]))
    for rows, weight in zip(torch.split(packed, list(lengths)), weights, strict=True):
        rows[: len(weight)].copy_(cast(Tensor, weight))
    return packed
