"""RWKV-7 over packed tokens on CUDA: prompts and decoding rows share one pass over the weights.

The ragged twin of `rwkv7_cuda`, on the same packed weights: eight launches a layer up to 64 tokens,
ten above, and the recurrence's own, from token ids to the last norm. It only launches: bounds and
slots stay on the device, so that a step of few tokens can be captured. See kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mrss_kernels import add_norm_mix as norm_ops
from mrss_kernels import lora_down7, ragged_index
from mrss_kernels import ragged_mix7 as time_ops
from mrss_kernels import ragged_norm as ragged_ops
from mrss_kernels import rows_linear as linear_ops
from mrss_kernels import wkv7_chunk as wkv_ops
from mrss_kernels.ragged_mix7 import TimeInputs
from torch import Tensor

from mrss_provider.model import products
from mrss_provider.model.products import (
    few_rows,
    product,
    rows_of,
    square_products,
    squared_relu,
    written_out,
)
from mrss_provider.model.rwkv7_cuda import Norm, PackedLayer
from mrss_provider.model.state import StatePool

TAIL_LEN = 4
"""From so many tokens a sequence on, the last layer's output is computed for last tokens only."""


class RaggedStep:
    """One pass of an RWKV-7 with fp16 or bf16 weights over T packed tokens of n sequences.

    Attributes:
        grouped_tokens: up to so many tokens r, k, v and the LoRAs' first halves are one product of
            our own; above, they are the library's and a small one.
        ffn_chunk_len: tokens whose FFN is computed at a time.
    """

    def __init__(
        self,
        layers: Sequence[PackedLayer],
        embedding: Tensor,
        ln0: Norm | None,
        ln_out: Norm,
        *,
        grouped_tokens: int = linear_ops.MAX_ROWS,
        ffn_chunk_len: int | None = None,
    ) -> None:
        """Take a model's packed weights; nothing is copied.

        Args:
            layers: of `rwkv7_cuda.pack_layer`.
            embedding: [V, C], in the weights' dtype.
            ln0: norm of looked-up rows, or None.
            ln_out: the last norm.
            grouped_tokens: see the attribute.
            ffn_chunk_len: see the attribute; None bounds the FFN's memory.
        """
        self._layers = layers
        self._embedding = embedding
        self._ln0 = ln0
        self._ln_out = ln_out
        self.grouped_tokens = grouped_tokens
        key = layers[0].ffn_key
        self.ffn_chunk_len = ffn_chunk_len or products.ffn_chunk_len(len(key), key)

    def forward(
        self,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        slots: Tensor,
        pool: StatePool,
        *,
        all_positions: bool = False,
    ) -> Tensor:
        """Read one or more tokens of each sequence into its state. Only launches kernels.

        Args:
            token_ids: int64 [T], packed one sequence after the other, contiguous.
            cu_seqlens: int32 or int64 [n + 1] on the device, from 0 to T, never falling.
            slots: int64 [n], no slot twice; -1 is a padding sequence. An empty one is one too.
            pool: *modified* at `slots`.
            all_positions: return every token's hidden state, not only each sequence's last.

        Returns:
            hidden [n, C], or [T, C] with `all_positions`, fp32, after the last norm; undefined for
            padding and empty sequences.

        Raises:
            ValueError: a shape, dtype, stride or device that a kernel cannot take.
        """
        num_tokens, num_seqs = token_ids.shape[0], slots.shape[0]
        dtype = self._embedding.dtype
        index = ragged_index.ragged_index(cu_seqlens, slots, num_tokens)
        # Copies, because a sequence's last token overwrites what its first one reads. Slot -1 is
        # the row that stands for padding.
        shift_att, shift_ffn = pool.shift_att[:, slots], pool.shift_ffn[:, slots]
        is_grouped = num_tokens <= self.grouped_tokens
        cuts_tail = not (all_positions or is_grouped) and num_tokens >= TAIL_LEN * num_seqs
        x, parts = self._embedding, None
        v_first: Tensor | None = None
        for i, layer in enumerate(self._layers):
            x, mixed = ragged_ops.ragged_norm_mix(
                x,
                parts,
                *layer.ln1,
                shift_att[i],
                pool.shift_att[i],
                index,
                layer.mix,
                dtype=dtype,
                tokens=token_ids if i == 0 else None,
                norm0=self._ln0 if i == 0 else None,
            )
            y, inputs, low = self._recur(i, layer, mixed, v_first, cu_seqlens, slots, pool)
            v_first = inputs.v if v_first is None else v_first
            if cuts_tail and i == len(self._layers) - 1:
                rows, index = ragged_index.ragged_tail(cu_seqlens, slots)
                x, y, low = x[rows], y[rows], low[:, rows]
                inputs = inputs._replace(v=inputs.v[rows], bonus=inputs.bonus[rows])
            y = time_ops.time_output7(
                y,
                inputs,
                low,
                layer.up,
                layer.vectors,
                layer.ranks,
                index,
                pool.layer_offsets(i),
                activated=not is_grouped,
            )
            parts = product(y[None], layer.output)
            x, mixed = ragged_ops.ragged_norm_mix(
                x,
                parts,
                *layer.ln2,
                shift_ffn[i],
                pool.shift_ffn[i],
                index,
                layer.ffn_mix,
                dtype=dtype,
            )
            if cuts_tail and i == len(self._layers) - 1:
                x, mixed = x[1::2].contiguous(), mixed[:, 1::2].contiguous()
            parts = self._ffn(mixed[0], layer)
        if all_positions or cuts_tail:
            return norm_ops.add_norm(x, parts, *self._ln_out)
        return ragged_ops.ragged_norm_last(x, parts, *self._ln_out, cu_seqlens)

    def _recur(
        self,
        index: int,
        layer: PackedLayer,
        mixed: Tensor,
        v_first: Tensor | None,
        cu_seqlens: Tensor,
        slots: Tensor,
        pool: StatePool,
    ) -> tuple[Tensor, TimeInputs, Tensor]:
        """Run a layer's recurrence on its six mixed inputs [6, T, C].

        Returns:
            y [T, C]; what the recurrence read; the LoRAs' first halves [P, T, sum(ranks)].
        """
        _, num_tokens, channels = mixed.shape
        size = pool.wkv.shape[-1]
        common = (layer.up, layer.vectors, layer.ranks, v_first, size)
        if num_tokens <= self.grouped_tokens:
            projected = few_rows(mixed, layer.project, layer.groups)
            inputs = time_ops.time_inputs7(projected, *common)
            low = projected[..., 3 * channels :]
        else:
            projected = square_products(mixed[:3], layer.project)
            down = written_out(rows_of(layer.project, 3 * channels, len(layer.project)))
            low = lora_down7.lora_down7(mixed, down, layer.ranks)
            inputs = time_ops.time_inputs7(projected, *common, low=low)
            low = low[None]
        heads = (num_tokens, channels // size, size)
        r, w, k, v, kk, a = (x.view(heads) for x in inputs[:6])
        # In fp16 it is a rounding like that of the next product's input; bf16's would show.
        is_half = r.dtype == torch.float16 and num_tokens > self.grouped_tokens
        out_dtype = torch.float16 if is_half else torch.float32
        states = (pool.wkv[index], slots, cu_seqlens)
        y = wkv_ops.wkv7_prefill(r, w, k, v, kk, a, *states, out_dtype=out_dtype)
        return y.view(num_tokens, channels), inputs, low

    def _ffn(self, x: Tensor, layer: PackedLayer) -> Tensor:
        """Return the parts [P, T, C] of the FFN of x [T, C]."""
        if x.shape[0] <= linear_ops.MAX_ROWS:
            return few_rows(squared_relu(x[None], layer.ffn_key), layer.ffn_value)
        return products.ffn_in_chunks(x, layer.ffn_key, layer.ffn_value, self.ffn_chunk_len)
