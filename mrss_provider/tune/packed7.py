"""RWKV-7 over packed sequences for frozen weights, its elementwise parts in fused kernels.

The same function as `network.forward` of each sequence by itself; only states, offsets and
activations have gradients. Needs Triton: CUDA, or its interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mrss_kernels import train_ffn, train_mix7, train_time7
from mrss_kernels.train_time7 import GateVectors
from torch import Tensor

from mrss_provider.tune.packing import Packing
from mrss_provider.tune.rwkv7 import embed, layer_norm
from mrss_provider.tune.wkv import Backend, wkv7_packed

MIXES = "rwkvag"

KEPT_BYTES = 78
"""Of a token, channel and layer for the backward pass, 34 of them what fla would compute again."""

ROOM_SHARE = 0.75
"""Of the device's memory that they may take; logits and gradients need the rest."""


class _NormMix(torch.autograd.Function):
    """See `train_mix7.norm_mix`; returns the residual stream and each mixed input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, *frozen: Tensor) -> tuple[Tensor, ...]:
        weight, bias, shift, first, mix = frozen
        total, out = train_mix7.norm_mix(x, delta, weight, bias, shift, first, mix)
        ctx.save_for_backward(total, weight, first, mix)
        ctx.delta_dtype = None if delta is None else delta.dtype
        return total, *out.unbind(0)

    @staticmethod
    def backward(ctx: Any, above: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, first, mix = ctx.saved_tensors
        grads = tuple(grad.contiguous() for grad in grads)
        dx, ddelta = train_mix7.norm_mix_grad(
            total, above.contiguous(), grads, weight, first, mix, ctx.delta_dtype
        )
        return dx, ddelta, None, None, None, None, None


class _Gates(torch.autograd.Function):
    """See `train_time7.gates7`; takes the six rows, then the five vectors."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        rows, vectors = inputs[:6], inputs[6:]
        return train_time7.gates7(rows, GateVectors(*vectors))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, vectors = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        grads = tuple(grad.contiguous() for grad in grads)
        found = train_time7.gates7_grad(rows, GateVectors(*vectors), grads)
        return *found, *[None] * len(vectors)


class _Output(torch.autograd.Function):
    """See `train_time7.output7`; takes the five rows, then weight, bias and r_k."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return train_time7.output7(inputs[:5], *inputs[5:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *rows, weight, bias, r_k = ctx.saved_tensors
        found = train_time7.output7_grad(rows, weight, bias, r_k, grad.contiguous())
        return *found, None, None, None


class _SquareRelu(torch.autograd.Function):
    """See `train_ffn.square_relu`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return train_ffn.square_relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return train_ffn.square_relu_grad(ctx.saved_tensors[0], grad.contiguous())


def forward_packed(
    weights: Mapping[str, Tensor],
    token_ids: Tensor,
    packing: Packing,
    wkv: Tensor,
    *,
    offsets: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the hidden states [N, C] of N packed tokens, in the weights' dtype.

    Args:
        weights: official names, all of one dtype, none of which has a gradient.
        token_ids: int64 [N].
        packing: of them.
        wkv: where each sequence begins, [n, L, H, N, N] fp32, [V, K]; the token shifts are zeros.
        offsets: [n, L, C] fp32, each sequence's `time_offset`; None is zeros.
        backend: of the recurrence, see `wkv7_packed`.
    """
    num_layers = wkv.shape[1]
    x = embed(weights, token_ids)
    keep = keeps_chunks(x.numel() * num_layers, x.device)
    shift = x.new_zeros(wkv.shape[0], x.shape[1])
    delta: Tensor | None = None
    v_first: Tensor | None = None
    for i, state in enumerate(wkv.unbind(1)):
        block = f"blocks.{i}."
        names = [f"{block}att.x_{name}" for name in MIXES]
        x, *mixed = _norm_mix(weights, x, delta, block + "ln1", shift, packing, names)
        offset = None if offsets is None else offsets[:, i]
        delta, v_first = _time_mix(
            weights, block + "att.", mixed, v_first, state, offset, packing, keep, backend
        )
        names = [block + "ffn.x_k"]
        x, mixed_k = _norm_mix(weights, x, delta, block + "ln2", shift, packing, names)
        key = _apply(_SquareRelu, F.linear(mixed_k, weights[block + "ffn.key.weight"]))
        delta = F.linear(key, weights[block + "ffn.value.weight"])
    return layer_norm(x if delta is None else x + delta, weights, "ln_out")


def keeps_chunks(num_elements: int, device: torch.device) -> bool:
    """Tell whether fla may keep what it would otherwise compute again for the gradient.

    Args:
        num_elements: tokens x channels x layers.
        device: whose free memory decides.
    """
    if device.type != "cuda" or not torch.is_grad_enabled():
        return False
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return num_elements * KEPT_BYTES <= ROOM_SHARE * (free + unused)


def _time_mix(
    weights: Mapping[str, Tensor],
    name: str,
    mixed: list[Tensor],
    v_first: Tensor | None,
    state: Tensor,
    offset: Tensor | None,
    packing: Packing,
    keep: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Return the residual update [N, C] and the first layer's value [N, H, N]."""

    def get(key: str) -> Tensor:
        return weights[name + key]

    xr, xw, xk, xv, xa, xg = mixed
    num_heads, head_size = get("r_k").shape
    heads = (len(xr), num_heads, head_size)
    r, k, v = (
        F.linear(x, get(key + ".weight")).view(heads)
        for x, key in ((xr, "receptance"), (xk, "key"), (xv, "value"))
    )
    w_low = (torch.tanh(xw @ get("w1")) @ get("w2")).view(heads)
    a_low = (xa @ get("a1") @ get("a2")).view(heads)
    g = (torch.sigmoid(xg @ get("g1")) @ get("g2")).view(heads)
    is_first = v_first is None
    v_low = None if is_first else (xv @ get("v1") @ get("v2")).view(heads)
    vectors = [get("w0"), get("a0"), None if is_first else get("v0"), get("k_k"), get("k_a")]
    flat = [None if vector is None else vector.reshape(-1) for vector in vectors]
    decay, k, v, removal, added = _apply(_Gates, w_low, a_low, v_low, k, v, v_first, *flat)
    y = wkv7_packed(r, decay, k, v, removal, added, state, packing, keep=keep, backend=backend)
    if offset is not None:
        y = y * (1 + offset).view(-1, num_heads, head_size).index_select(0, packing.rows)
    norm = get("ln_x.weight"), get("ln_x.bias")
    out = _apply(_Output, y, r, k, v, g, *norm, get("r_k")).flatten(1)
    return F.linear(out, get("output.weight")), v if v_first is None else v_first


def _norm_mix(
    weights: Mapping[str, Tensor],
    x: Tensor,
    delta: Tensor | None,
    norm: str,
    shift: Tensor,
    packing: Packing,
    mixes: list[str],
) -> list[Tensor]:
    mix = torch.stack([weights[name].reshape(-1) for name in mixes])
    scale, bias = weights[norm + ".weight"], weights[norm + ".bias"]
    return list(_apply(_NormMix, x, delta, scale, bias, shift, packing.first, mix))


def _apply(function: Any, *inputs: Tensor | None) -> Any:
    return function.apply(*inputs)
