"""RWKV-7 over packed tokens on CUDA: prompts and decoding rows share one pass over the weights.

The ragged twin of `rwkv7_cuda`, on the same packed weights: eight launches a layer up to 64 tokens,
ten above, and the recurrence's own, from token ids to the last norm. It only launches: bounds and
slots stay on the device, so that a step of few tokens can be captured. See kernels/README.md.
"""

from __future__ import annotations

import torch
from mrss_kernels import add_norm_mix as norm_ops
from mrss_kernels import lora_down7, ragged_index, time_inputs7, time_output7
from mrss_kernels import ragged_norm as ragged_ops
from mrss_kernels import rows_linear as linear_ops
from mrss_kernels import wkv7_chunk as wkv_ops
from mrss_kernels.time_inputs7 import TimeInputs
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
from mrss_provider.model.ragged_pass import RaggedPass, Reading
from mrss_provider.model.rwkv7_cuda import PackedLayer
from mrss_provider.model.state import StatePool


class RaggedStep(RaggedPass[PackedLayer]):
    """One pass of an RWKV-7 with fp16 or bf16 weights over packed tokens."""

    def _forward(
        self, token_ids: Tensor, reading: Reading, pool: StatePool, *, all_positions: bool
    ) -> Tensor:
        cu_seqlens, slots, index = reading.cu_seqlens, reading.slots, reading.index
        dtype = self._embedding.dtype
        x, parts = self._embedding, None
        v_first: Tensor | None = None
        for i, layer in enumerate(self._layers):
            x, mixed = ragged_ops.ragged_norm_mix(
                x,
                parts,
                *layer.ln1,
                reading.shift_att[i],
                pool.shift_att[i],
                index,
                layer.mix,
                dtype=dtype,
                tokens=token_ids if i == 0 else None,
                norm0=self._ln0 if i == 0 else None,
            )
            y, inputs, low = self._recur(i, layer, mixed, v_first, cu_seqlens, slots, pool)
            v_first = inputs.v if v_first is None else v_first
            if reading.cuts_tail and i == len(self._layers) - 1:
                rows, index = ragged_index.ragged_tail(cu_seqlens, slots)
                x, y, low = x[rows], y[rows], low[:, rows]
                inputs = inputs._replace(v=inputs.v[rows], bonus=inputs.bonus[rows])
            y = time_output7.time_output7(
                y,
                inputs,
                low,
                layer.up,
                layer.vectors,
                layer.ranks,
                index,
                pool.layer_offsets(i),
                activated=not reading.is_grouped,
            )
            parts = product(y[None], layer.output)
            x, mixed = ragged_ops.ragged_norm_mix(
                x,
                parts,
                *layer.ln2,
                reading.shift_ffn[i],
                pool.shift_ffn[i],
                index,
                layer.ffn_mix,
                dtype=dtype,
            )
            if reading.cuts_tail and i == len(self._layers) - 1:
                x, mixed = x[1::2].contiguous(), mixed[:, 1::2].contiguous()
            parts = self._ffn(mixed[0], layer)
        if all_positions or reading.cuts_tail:
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
            inputs = time_inputs7.time_inputs7(projected, *common)
            low = projected[..., 3 * channels :]
        else:
            projected = square_products(mixed[:3], layer.project)
            down = written_out(rows_of(layer.project, 3 * channels, len(layer.project)))
            low = lora_down7.lora_down7(mixed, down, layer.ranks)
            inputs = time_inputs7.time_inputs7(projected, *common, low=low)
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
