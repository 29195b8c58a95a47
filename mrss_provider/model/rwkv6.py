"""RWKV-6 (x060): one layer. Linears run in the weights' dtype, all between them in fp32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mrss_provider.model.linear import sigmoid
from mrss_provider.model.rwkv7 import HEAD_NORM_EPS, NORM_EPS, MakeLinear
from mrss_provider.model.steps import Step

_MIXED = "wkvrg"

# RWKV-6's sublayers put out more than fp16 can hold; their inputs are made smaller by this power of
# two, and their outputs larger again in fp32. RWKV-7 needs none of it.
_FP16_SCALE = 1 / 64


class Layer6:
    """Time mixing and ffn of one layer, over packed tokens."""

    def __init__(
        self, index: int, tensors: Mapping[str, Tensor], num_heads: int, make: MakeLinear
    ) -> None:
        """Build from fp32 vectors and a factory for matrices.

        Args:
            index: the layer's number.
            tensors: the layer's vectors in fp32, by official name without `blocks.{i}.`.
            num_heads: H.
            make: returns the linear layer of a name, with an activation at its end.
        """
        self.index = index
        self.num_heads = num_heads
        self.ln1 = tensors["ln1.weight"], tensors["ln1.bias"]
        self.ln2 = tensors["ln2.weight"], tensors["ln2.bias"]
        self.mix_x = tensors["att.time_maa_x"]
        self.mix = torch.stack([tensors["att.time_maa_" + name] for name in _MIXED])[:, None]
        self.mix_w1 = make("att.time_maa_w1", "tanh")
        self.mix_w2 = [make(f"att.time_maa_w2.{i}", "none") for i in range(len(_MIXED))]
        self.decay = tensors["att.time_decay"]
        self.decay_w1 = make("att.time_decay_w1", "tanh")
        self.decay_w2 = make("att.time_decay_w2", "none")
        self.bonus = tensors["att.time_faaaa"]
        self.receptance = make("att.receptance.weight", "none")
        self.key = make("att.key.weight", "none")
        self.value = make("att.value.weight", "none")
        self.gate = make("att.gate.weight", "none")
        self.output = make("att.output.weight", "none")
        self.ln_x = tensors["att.ln_x.weight"], tensors["att.ln_x.bias"]
        self.ffn_mix_k, self.ffn_mix_r = tensors["ffn.time_maa_k"], tensors["ffn.time_maa_r"]
        self.ffn_receptance = make("ffn.receptance.weight", "none")
        self.ffn_key = make("ffn.key.weight", "relu")
        self.ffn_value = make("ffn.value.weight", "none")
        self.scale = _FP16_SCALE if self.key.input_dtype == torch.float16 else 1.0

    def __call__(
        self, x: Tensor, v_first: Tensor | None, step: Step
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream after this layer [M, C] fp32, and `v_first` as it came.

        Args:
            x: residual stream [M, C] fp32.
            v_first: not used by RWKV-6.
            step: where the states are.
        """
        y = self._time_mixing(x, step)
        x = x + self.output(y * self.scale).float() / self.scale
        h = F.layer_norm(x, x.shape[1:], *self.ln2, NORM_EPS)
        delta = step.shift(self.index, "ffn", h)
        gate = sigmoid(self.ffn_receptance(torch.addcmul(h, delta, self.ffn_mix_r)).float())
        hidden = self.ffn_key(torch.addcmul(h, delta, self.ffn_mix_k))
        out = self.ffn_value(hidden * (hidden * self.scale)).float() / self.scale
        return torch.addcmul(x, gate, out), v_first

    def _time_mixing(self, x: Tensor, step: Step) -> Tensor:
        """Return the input of the output projection [M, C] fp32."""
        heads = (x.shape[0], self.num_heads, -1)
        h = F.layer_norm(x, x.shape[1:], *self.ln1, NORM_EPS)
        delta = step.shift(self.index, "att", h)
        codes = self.mix_w1(torch.addcmul(h, delta, self.mix_x)).chunk(len(_MIXED), -1)
        moved = torch.stack([w2(code) for w2, code in zip(self.mix_w2, codes, strict=True)])
        mixed = torch.addcmul(h, delta, self.mix + moved)
        x_w, x_k, x_v, x_r, x_g = mixed.to(self.key.input_dtype).unbind(0)
        w = -torch.exp(self.decay + self.decay_w2(self.decay_w1(x_w)))
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        r, w, k, v = (t.view(heads) for t in (r, w, k, v))
        y = step.wkv6(self.index, r, w, k, v, self.bonus).view(x.shape)
        offset = step.offset(self.index)
        if offset is not None:
            y = y * (1 + offset)
        y = F.group_norm(y, self.num_heads, *self.ln_x, HEAD_NORM_EPS)
        gate = self.gate(x_g).float()
        return y * (gate * sigmoid(gate))
