"""RWKV-6 over packed tokens on CUDA: prompts and decoding rows share one pass over the weights.

The ragged twin of `rwkv6_cuda`, on the same packed weights: twelve launches a layer up to 64
tokens, fifteen above, from token ids to the last norm.
It only launches, so that a step of few tokens can be captured. See kernels/README.md.
"""

from __future__ import annotations

import math

import torch
from mrss_kernels import norm_mix6 as norm_ops
from mrss_kernels import ragged_index
from mrss_kernels import ragged_inputs6 as inputs_ops
from mrss_kernels import ragged_mix6 as time_ops
from mrss_kernels import ragged_norm as ragged_ops
from mrss_kernels import rows_linear as linear_ops
from mrss_kernels import wkv6_chunk as wkv_ops
from mrss_kernels.ragged_mix6 import TimeInputs6
from mrss_kernels.time_mix6 import multiply_codes
from torch import Tensor

from mrss_provider.model import products
from mrss_provider.model.products import few_rows, many_rows, product, rows_of, square_products
from mrss_provider.model.ragged_pass import RaggedPass, Reading
from mrss_provider.model.rwkv6_cuda import PackedLayer, key_receptance
from mrss_provider.model.state import StatePool


class RaggedStep6(RaggedPass[PackedLayer]):
    """One pass of an RWKV-6 with fp16 or bf16 weights over packed tokens."""

    def _forward(
        self, token_ids: Tensor, reading: Reading, pool: StatePool, *, all_positions: bool
    ) -> Tensor:
        cu_seqlens, slots, index = reading.cu_seqlens, reading.slots, reading.index
        dtype = self._embedding.dtype
        x, parts, gate, scale = self._embedding, None, None, 1.0
        before = reading.shift_att
        h = before.new_empty((len(token_ids), before.shape[-1]))
        for i, layer in enumerate(self._layers):
            x, mixed = ragged_ops.ragged_norm_mix(
                x,
                parts,
                *layer.ln1,
                before[i],
                pool.shift_att[i],
                index,
                layer.mix_x[None],
                dtype=dtype,
                tokens=token_ids if i == 0 else None,
                norm0=self._ln0 if i == 0 else None,
                gate=gate,
                scale=scale,
                h=h,
            )
            codes = multiply_codes(mixed, layer.mix_down)
            weights = (layer.mix_up, layer.mix)
            mixed = inputs_ops.ragged_inputs6(h, codes, *weights, before[i], index)
            y, y_scale, inputs = self._recur(i, layer, mixed, cu_seqlens, slots, pool)
            output_gate = inputs.gate
            if reading.cuts_tail and i == len(self._layers) - 1:
                rows, index = ragged_index.ragged_tail(cu_seqlens, slots)
                x, y, output_gate = x[rows], y[rows], output_gate[rows]
            scale = layer.scale
            y = time_ops.time_output6(
                y,
                output_gate,
                layer.vectors,
                pool.wkv.shape[-1],
                index,
                pool.layer_offsets(i),
                y_scale=y_scale,
                out_scale=scale,
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
                scale=scale,
                first_scale=math.sqrt(scale),
            )
            if reading.cuts_tail and i == len(self._layers) - 1:
                x, mixed = x[1::2].contiguous(), mixed[:, 1::2].contiguous()
            parts, gate = self._ffn(mixed, layer)
        if all_positions or reading.cuts_tail:
            return norm_ops.add_norm(x, parts, gate, self._ln_out, scale=scale)
        return ragged_ops.ragged_norm_last(
            x, parts, *self._ln_out, cu_seqlens, gate=gate, scale=scale
        )

    def _recur(
        self,
        index: int,
        layer: PackedLayer,
        mixed: Tensor,
        cu_seqlens: Tensor,
        slots: Tensor,
        pool: StatePool,
    ) -> tuple[Tensor, float, TimeInputs6]:
        """Run a layer's recurrence on its five mixed inputs [5, T, C].

        Returns:
            y [T, C]; what it is multiplied by; what the recurrence read, and the output's gate.
        """
        _, num_tokens, channels = mixed.shape
        size = pool.wkv.shape[-1]
        if num_tokens <= self.grouped_tokens:
            projected = few_rows(mixed, layer.project, layer.groups)
            inputs = time_ops.time_inputs6(projected, layer.decay_up, layer.vectors, size)
        else:
            projected = square_products(mixed[1:], layer.project)
            low = many_rows(mixed[0], rows_of(layer.project, 4 * channels, len(layer.project)))
            inputs = time_ops.time_inputs6(projected, layer.decay_up, layer.vectors, size, low=low)
        heads = (num_tokens, channels // size, size)
        r, w, k, v = (x.view(heads) for x in (inputs.r, inputs.w, inputs.k, inputs.v))
        # As small as the next product's input, y fits in fp16; bf16 would round it too much.
        is_half = r.dtype == torch.float16 and num_tokens > self.grouped_tokens
        y_scale = layer.scale if is_half else 1.0
        y = wkv_ops.wkv6_prefill(
            r,
            w,
            k,
            v,
            layer.vectors[1].view(heads[1:]),
            pool.wkv[index],
            slots,
            cu_seqlens,
            out_dtype=torch.float16 if is_half else torch.float32,
            y_scale=y_scale,
        )
        return y.view(num_tokens, channels), y_scale, inputs

    def _ffn(self, x: Tensor, layer: PackedLayer) -> tuple[Tensor, Tensor]:
        """Return the parts [P, T, C] of the FFN of x [2, T, C], and their gate [T, C]."""
        ffn_size = layer.ffn_value.shape[1]
        if x.shape[1] <= linear_ops.MAX_ROWS:
            key, gate = key_receptance(x, layer.ffn_in, ffn_size)
            return product(key[None], layer.ffn_value), gate
        gate = many_rows(x[1], rows_of(layer.ffn_in, ffn_size, len(layer.ffn_in)))
        key_weight = rows_of(layer.ffn_in, 0, ffn_size)
        parts = products.ffn_in_chunks(x[0], key_weight, layer.ffn_value, self.ffn_chunk_len)
        return parts, gate
