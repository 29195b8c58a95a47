"""RWKV-7's decode step on CUDA, from token ids to the last norm.

Seven or eight launches a layer; on a card and for a model that `persistent7` takes, all layers in
one launch, for few rows.

Built from the layers of `rwkv7`, whose weights it packs so that r, k, v and the first halves of
the LoRAs are one matrix; the layers' own linears become views of it, so nothing is held twice but
the second halves. Same result as `Model.decode`'s layer by layer form, up to rounding. Kernels and
layouts: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from mrss_kernels import add_norm_mix as norm_ops
from mrss_kernels import persistent7 as persistent_ops
from mrss_kernels import persistent7_choice
from mrss_kernels import rows_linear as linear_ops
from mrss_kernels import sparse_linear as sparse_ops
from mrss_kernels import time_mix7 as time_ops
from torch import Tensor
from torch.nn import functional as F

from mrss_provider.errors import ConfigError
from mrss_provider.model.config import ModelConfig
from mrss_provider.model.fused_support import decode_choice, fused_obstacle
from mrss_provider.model.linear import Linear
from mrss_provider.model.products import (
    Weight,
    few_rows,
    head_logits,
    one_part,
    product,
    rows_of,
    square_products,
    squared_relu,
    stack,
    tensor_of,
    weight_of,
)
from mrss_provider.model.rwkv7 import Layer7
from mrss_provider.model.stacked7 import stack_layers, stacking_obstacle
from mrss_provider.model.state import StatePool

Norm = tuple[Tensor, Tensor]

SPARSE_ROWS = 1
"""Rows up to which reading the ffn's useful rows gains (kernels/README.md, measured)."""


@dataclass(frozen=True)
class PackedLayer:
    """One layer's weights as the kernels read them.

    Attributes:
        mix: how far r, k, v, w, a, g move to the token before, [6, C] fp32.
        project: rows of receptance, key, value, w1, a1, g1, v1, each LoRA padded with zeros to a
            multiple of 64 rows: [3C + sum(ranks), C].
        groups: which row of `mix` each 64 rows of `project` read, int32.
        ranks: padded ranks of w, a, g, v; v's is 0 in layer 0.
        up: w2, a2, g2, v2 side by side, padded likewise: [C, sum(ranks)].
        vectors: [8, C] fp32, rows as `mrss_kernels.time_mix7.VECTORS`.
        ffn_value_t: `ffn_value` once more, transposed, of which few rows are read for a token; or
            None.
    """

    ln1: Norm
    ln2: Norm
    mix: Tensor
    project: Weight
    groups: Tensor
    ranks: tuple[int, int, int, int]
    up: Tensor
    vectors: Tensor
    output: Weight
    ffn_mix: Tensor
    ffn_key: Weight
    ffn_value: Weight
    ffn_value_t: Tensor | None


def is_supported(config: ModelConfig, device: torch.device) -> bool:
    """Tell whether the kernels take this model; `fused_obstacle` tells why not."""
    return fused_obstacle(config, device) is None


class FusedDecoder:
    """The decode step of one RWKV-7 with fp16 or bf16 weights on CUDA.

    Attributes:
        sparse_rows: steps of up to so many rows skip what the ffn multiplies by zero.
        persistent_rows: numbers of rows with which other steps run all layers in one launch.
        persistent_obstacle: why they cannot, or None.
    """

    def __init__(
        self,
        layers: Sequence[Layer7],
        embedding: Tensor,
        ln0: Norm | None,
        ln_out: Norm,
        head: Weight,
        *,
        sparse_ffn: bool = False,
    ) -> None:
        """Pack the layers' weights; their linears are *modified* to views of the packed ones.

        Args:
            layers: of a model on CUDA whose linears are plain, or the large ones quantised.
            embedding: [V, C], in the weights' dtype.
            ln0: norm of looked-up rows, or None.
            ln_out: the last norm.
            head: [V, C], in the weights' dtype or quantised.
            sparse_ffn: keep a transposed copy of each ffn's value, and read of it what is not
                multiplied by zero, for up to `SPARSE_ROWS` rows; not of quantised ones.

        Raises:
            ConfigError: `MRSS_DECODE` asks for what cannot be had.
        """
        self.sparse_rows = SPARSE_ROWS if sparse_ffn else 0
        self._layers = [pack_layer(layer, sparse_ffn=sparse_ffn) for layer in layers]
        self._persistent: persistent_ops.PersistentLayers7 | None = None
        self.persistent_rows: Collection[int] = ()
        choice = decode_choice()
        self.persistent_obstacle = stacking_obstacle(self._layers, layers[0].r_k.shape[-1])
        if self.persistent_obstacle and choice == "persistent":
            raise ConfigError(
                f"MRSS_DECODE is persistent, but {self.persistent_obstacle}", param="MRSS_DECODE"
            )
        if self.persistent_obstacle is None:
            self._layers, stacked = stack_layers(layers, self._layers)
            rows = persistent7_choice.rows_in_one_launch(embedding.device, embedding.shape[1])
            self._persistent = persistent_ops.PersistentLayers7(stacked, rows)
            self.persistent_rows = rows
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
        rows, channels = token_ids.shape[0], self._embedding.shape[1]
        v_first = pool.shift_att.new_empty((rows, channels))
        sparse = rows <= self.sparse_rows
        if not sparse and rows in self.persistent_rows and not pool.has_offsets:
            return self._decode_persistently(token_ids, slots, pool, dtype)
        x, parts = self._embedding, None
        for i, layer in enumerate(self._layers):
            shift = pool.shift_att[i]
            x, mixed = norm_ops.add_norm_mix(
                x,
                parts,
                *layer.ln1,
                shift,
                slots,
                layer.mix,
                dtype=self._embedding.dtype,
                tokens=token_ids if i == 0 else None,
                norm0=self._ln0 if i == 0 else None,
            )
            y = self._time_mix(i, layer, mixed, v_first, slots, pool)
            parts = product(y[None], layer.output)
            x, mixed = norm_ops.add_norm_mix(
                x,
                parts,
                *layer.ln2,
                pool.shift_ffn[i],
                slots,
                layer.ffn_mix,
                dtype=self._embedding.dtype,
            )
            squared = squared_relu(mixed, layer.ffn_key)
            if sparse and layer.ffn_value_t is not None:
                parts = sparse_ops.sparse_linear(squared[0], layer.ffn_value_t)
            else:
                parts = product(squared, layer.ffn_value)
        return norm_ops.add_norm(x, parts, *self._ln_out, dtype=dtype)

    def _decode_persistently(
        self, token_ids: Tensor, slots: Tensor, pool: StatePool, dtype: torch.dtype
    ) -> Tensor:
        assert self._persistent is not None
        layer = self._layers[0]
        x, mixed = norm_ops.add_norm_mix(
            self._embedding,
            None,
            *layer.ln1,
            pool.shift_att[0],
            slots,
            layer.mix,
            dtype=self._embedding.dtype,
            tokens=token_ids,
            norm0=self._ln0,
        )
        x, parts = self._persistent.advance(
            x, mixed, pool.shift_att, pool.shift_ffn, pool.wkv, slots
        )
        return norm_ops.add_norm(x, parts, *self._ln_out, dtype=dtype)

    def decode_logits(self, token_ids: Tensor, slots: Tensor, pool: StatePool) -> Tensor:
        """Return the logits [B, V] fp32 of `decode`, without a kernel that rounds for the head."""
        return self.head(self.decode(token_ids, slots, pool, dtype=self._head.dtype))

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [M, V] fp32 of hidden states [M, C]."""
        return head_logits(hidden, self._head)

    def _time_mix(
        self,
        index: int,
        layer: PackedLayer,
        mixed: Tensor,
        v_first: Tensor,
        slots: Tensor,
        pool: StatePool,
    ) -> Tensor:
        """Return the output projection's input [B, C] from the six mixed inputs [6, B, C]."""
        low = None
        if mixed.shape[1] <= linear_ops.MAX_ROWS:
            projected = few_rows(mixed, layer.project, layer.groups)
        else:
            channels = mixed.shape[2]
            projected = square_products(mixed[:3], layer.project)
            groups = layer.groups[3 * channels // linear_ops.GROUP_LEN :]
            down = rows_of(layer.project, 3 * channels, len(layer.project))
            low = one_part(mixed, down, groups)
        return time_ops.time_mix7(
            projected,
            layer.up,
            layer.vectors,
            layer.ranks,
            v_first,
            pool.wkv[index],
            slots,
            pool.layer_offsets(index),
            low=low,
        )


def pack_layer(layer: Layer7, *, sparse_ffn: bool = False) -> PackedLayer:
    """Pack one layer; its linears are *modified* to views of the packed weights."""
    value = weight_of(layer.ffn_value)
    downs = [layer.w1, layer.a1, layer.g1] + ([layer.v1] if layer.index else [])
    ups = [layer.w2, layer.a2, layer.g2] + ([layer.v2] if layer.index else [])
    project, lengths = stack([layer.receptance, layer.key, layer.value, *downs])
    # Of r, k, v, w, a, g, v's LoRA: the row of `mix` that it reads.
    inputs = [0, 1, 2, 3, 4, 5, 2][: len(lengths)]
    groups = [
        source
        for source, length in zip(inputs, lengths, strict=True)
        for _ in range(length // linear_ops.GROUP_LEN)
    ]
    rank_w, rank_a, rank_g, rank_v = (*lengths[3:], 0)[:4]
    r, w, k, v, a, g = layer.mix[:, 0]
    return PackedLayer(
        ln1=layer.ln1,
        ln2=layer.ln2,
        mix=torch.stack([r, k, v, w, a, g]).contiguous(),
        project=project,
        groups=torch.tensor(groups, dtype=torch.int32, device=project.device),
        ranks=(rank_w, rank_a, rank_g, rank_v),
        up=torch.cat([_padded_columns(x) for x in ups], 1).contiguous(),
        vectors=_vectors(layer),
        output=weight_of(layer.output),
        ffn_mix=layer.ffn_mix[None].contiguous(),
        ffn_key=weight_of(layer.ffn_key),
        ffn_value=value,
        ffn_value_t=cast(Tensor, value).t().contiguous() if sparse_ffn else None,
    )


def _vectors(layer: Layer7) -> Tensor:
    """Return w0, a0, v0 (0 in layer 0), k_k, k_a, r_k, ln_x weight and bias as [8, C] fp32."""
    biases = list(-layer.minus_bias[:, 0])
    if len(biases) == 2:
        biases.append(torch.zeros_like(biases[0]))
    rows = [*biases, layer.k_k, layer.k_a, layer.r_k.flatten(), *layer.ln_x]
    return torch.stack(rows).contiguous()


def _padded_columns(linear: Linear) -> Tensor:
    """Return a weight with zeros appended to its rows up to a multiple of 64."""
    weight = tensor_of(linear)
    return F.pad(weight, (0, -weight.shape[1] % linear_ops.GROUP_LEN))
