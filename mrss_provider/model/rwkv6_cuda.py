"""RWKV-6's decode step on CUDA: eight or nine launches a layer, from token ids to the last norm.

Built from the layers of `rwkv6`, whose weights it packs so that products of one moment are one
matrix; the layers' own linears become views of it, so nothing is held twice. Same result as
`Model.decode`'s layer by layer form, up to rounding. Kernels and layouts: kernels/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from mrss_kernels import ffn6 as ffn_ops
from mrss_kernels import norm_mix6 as norm_ops
from mrss_kernels import rows_linear as linear_ops
from mrss_kernels import time_mix6 as time_ops
from torch import Tensor

from mrss_provider.model.linear import PlainLinear
from mrss_provider.model.products import (
    Weight,
    few_rows,
    head_logits,
    many_rows,
    one_part,
    product,
    rows_of,
    square_products,
    squared_relu,
    stack,
    tensor_of,
    weight_of,
)
from mrss_provider.model.rwkv6 import Layer6
from mrss_provider.model.state import StatePool

Norm = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PackedLayer:
    """One layer's weights as the kernels read them. D and W are the ranks of mixing and decay.

    Attributes:
        mix_x: how far the codes' input moves to the token before, [C] fp32.
        mix_down: first halves of the mixing's LoRAs, [5 D, C].
        mix_up: their second halves, [5, C, D].
        mix: how far the inputs of w, k, v, r, g move, [5, C] fp32.
        project: rows of key, value, receptance, gate, decay_w1, the last one padded with zeros to a
            multiple of 64 rows: [4 C + W, C].
        groups: which of the five inputs each 64 rows of `project` read, int32.
        decay_up: decay_w2 [C, W].
        vectors: [4, C] fp32, rows as `mrss_kernels.time_mix6.VECTORS`.
        ffn_mix: of key and receptance, [2, C] fp32.
        ffn_in: rows of key, then receptance, [F + C, C].
        scale: what the inputs of `output` and `ffn_value` are multiplied by, for fp16's sake.
    """

    ln1: Norm
    ln2: Norm
    mix_x: Tensor
    mix_down: Tensor
    mix_up: Tensor
    mix: Tensor
    project: Weight
    groups: Tensor
    decay_up: Tensor
    vectors: Tensor
    output: Weight
    ffn_mix: Tensor
    ffn_in: Weight
    ffn_value: Weight
    scale: float


class FusedDecoder6:
    """The decode step of one RWKV-6 with fp16 or bf16 weights on CUDA."""

    def __init__(
        self,
        layers: Sequence[Layer6],
        embedding: Tensor,
        ln0: Norm | None,
        ln_out: Norm,
        head: Weight,
    ) -> None:
        """Pack the layers' weights; their linears are *modified* to views of the packed ones.

        Args:
            layers: of a model on CUDA whose linears are plain, or the large ones quantised.
            embedding: [V, C], in the weights' dtype.
            ln0: norm of looked-up rows, or None.
            ln_out: the last norm.
            head: [V, C], in the weights' dtype or quantised.
        """
        self._layers = [pack_layer(layer) for layer in layers]
        self._embedding = embedding
        self._ln0 = ln0
        self._ln_out = ln_out
        self._head = head

    @property
    def layers(self) -> Sequence[PackedLayer]:
        """The packed weights, for whoever reads them in another way."""
        return self._layers

    def decode(
        self,
        token_ids: Tensor,
        slots: Tensor,
        pool: StatePool,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Read one token a row; as `Model.decode`. Launches kernels only: it can be captured.

        Args:
            token_ids: int64 [B], contiguous.
            slots: int64 [B], contiguous; -1 is a padding row.
            pool: *modified* at `slots`.
            dtype: of what is returned.

        Returns:
            hidden [B, C], after the last norm; undefined for padding rows.
        """
        x, parts, gate, scale = self._embedding, None, None, 1.0
        for i, layer in enumerate(self._layers):
            shift = pool.shift_att[i]
            x, h, codes = norm_ops.add_norm_codes(
                x,
                parts,
                gate,
                layer.ln1,
                shift,
                slots,
                layer.mix_x,
                layer.mix_down,
                scale=scale,
                tokens=token_ids if i == 0 else None,
                norm0=self._ln0 if i == 0 else None,
            )
            mixed = time_ops.mix_inputs(h, codes, layer.mix_up, layer.mix, shift, slots)
            y = _time_mix(i, layer, mixed, h, slots, pool)
            parts = product(y[None], layer.output)
            scale = layer.scale
            x, mixed = norm_ops.add_norm_mix(
                x,
                parts,
                layer.ln2,
                pool.shift_ffn[i],
                slots,
                layer.ffn_mix,
                dtype=mixed.dtype,
                scale=scale,
                key_scale=math.sqrt(scale),
            )
            key, gate = key_receptance(mixed, layer.ffn_in, layer.ffn_value.shape[1])
            parts = product(key[None], layer.ffn_value)
        return norm_ops.add_norm(x, parts, gate, self._ln_out, scale=scale, dtype=dtype)

    def decode_logits(self, token_ids: Tensor, slots: Tensor, pool: StatePool) -> Tensor:
        """Return the logits [B, V] fp32 of `decode`, without a kernel that rounds for the head."""
        return self.head(self.decode(token_ids, slots, pool, dtype=self._head.dtype))

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [M, V] fp32 of hidden states [M, C]."""
        return head_logits(hidden, self._head)


def pack_layer(layer: Layer6) -> PackedLayer:
    """Pack one layer; its linears are *modified* to views of the packed weights."""
    downs = [layer.key, layer.value, layer.receptance, layer.gate, layer.decay_w1]
    project, lengths = stack(downs)
    # Of k, v, r, g and the decay's LoRA: the input that it reads, of w, k, v, r, g.
    groups = [
        source
        for source, length in zip([1, 2, 3, 4, 0], lengths, strict=True)
        for _ in range(length // linear_ops.GROUP_LEN)
    ]
    mix_up = torch.stack([tensor_of(w2) for w2 in layer.mix_w2])
    for w2, weight in zip(layer.mix_w2, mix_up, strict=True):
        cast(PlainLinear, w2).weight = weight
    return PackedLayer(
        ln1=layer.ln1,
        ln2=layer.ln2,
        mix_x=layer.mix_x,
        mix_down=tensor_of(layer.mix_w1),
        mix_up=mix_up,
        mix=layer.mix[:, 0].contiguous(),
        project=project,
        groups=torch.tensor(groups, dtype=torch.int32, device=project.device),
        decay_up=tensor_of(layer.decay_w2),
        vectors=torch.stack([layer.decay, layer.bonus.flatten(), *layer.ln_x]).contiguous(),
        output=weight_of(layer.output),
        ffn_mix=torch.stack([layer.ffn_mix_k, layer.ffn_mix_r]).contiguous(),
        ffn_in=stack([layer.ffn_key, layer.ffn_receptance])[0],
        ffn_value=weight_of(layer.ffn_value),
        scale=layer.scale,
    )


def _time_mix(
    index: int, layer: PackedLayer, mixed: Tensor, h: Tensor, slots: Tensor, pool: StatePool
) -> Tensor:
    """Return the output projection's input [B, C] from the five mixed inputs [5, B, C]."""
    low = None
    if mixed.shape[1] <= linear_ops.MAX_ROWS:
        projected = few_rows(mixed, layer.project, layer.groups)
    else:
        channels = mixed.shape[2]
        projected = square_products(mixed[1:], layer.project)
        down = rows_of(layer.project, 4 * channels, len(layer.project))
        low = one_part(mixed[:1], down)
    return time_ops.time_mix6(
        projected,
        layer.decay_up,
        layer.vectors,
        h,
        pool.shift_att[index],
        pool.wkv[index],
        slots,
        pool.layer_offsets(index),
        low=low,
        out_scale=layer.scale,
    )


def key_receptance(x: Tensor, weight: Weight, ffn_size: int) -> tuple[Tensor, Tensor]:
    """Return `max(key, 0)^2` [B, F] in the dtype of x [2, B, K], and the receptance [B, C]."""
    is_few = x.shape[1] <= linear_ops.MAX_ROWS
    if is_few and isinstance(weight, Tensor):
        return ffn_ops.key_receptance(x, weight, ffn_size)
    key = squared_relu(x[:1], rows_of(weight, 0, ffn_size))[0]
    receptance = rows_of(weight, ffn_size, len(weight))
    return key, one_part(x[1:], receptance)[0] if is_few else many_rows(x[1], receptance)
