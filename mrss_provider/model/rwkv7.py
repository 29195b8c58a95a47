"""RWKV-7 (x070): one layer. Linears run in the weights' dtype, all between them in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mrss_provider.model.linear import Activation, Linear
from mrss_provider.model.steps import Step

LOG_DECAY_SCALE = -0.6065306597126334
"""-exp(-0.5): the log decay of a channel lies between this and 0."""

NORM_EPS = 1e-5
HEAD_NORM_EPS = 64e-5

MakeLinear = Callable[[str, Activation], Linear]


class Layer7:
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
        self.mix = torch.stack([tensors["att.x_" + name] for name in "rwkvag"])[:, None]
        gated = "wa" if index == 0 else "wav"
        self.minus_bias = -torch.stack([tensors[f"att.{name}0"] for name in gated])[:, None]
        # Gates are 1 / (c + c * exp(-x)): the first one comes out as the log decay at once.
        self.gate_scale = torch.ones_like(self.minus_bias[:, :, :1])
        self.gate_scale[0] = 1 / LOG_DECAY_SCALE
        self.k_k, self.k_a = tensors["att.k_k"], tensors["att.k_a"]
        self.one_minus_k_a = 1 - self.k_a
        self.r_k = tensors["att.r_k"]
        self.ln_x = tensors["att.ln_x.weight"], tensors["att.ln_x.bias"]
        self.receptance = make("att.receptance.weight", "none")
        self.key = make("att.key.weight", "none")
        self.value = make("att.value.weight", "none")
        self.output = make("att.output.weight", "none")
        self.w1, self.w2 = make("att.w1", "tanh"), make("att.w2", "none")
        self.a1, self.a2 = make("att.a1", "none"), make("att.a2", "none")
        self.g1, self.g2 = make("att.g1", "sigmoid"), make("att.g2", "none")
        if index > 0:
            self.v1, self.v2 = make("att.v1", "none"), make("att.v2", "none")
        self.ffn_mix = tensors["ffn.x_k"]
        self.ffn_key, self.ffn_value = (
            make("ffn.key.weight", "relu"),
            make("ffn.value.weight", "none"),
        )

    def __call__(self, x: Tensor, v_first: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """Return the residual stream after this layer [M, C] fp32, and layer 0's value [M, C].

        Args:
            x: residual stream [M, C] fp32.
            v_first: layer 0's value [M, C] fp32; None at layer 0.
            step: where the states are.
        """
        out, v_first = self._time_mixing(x, v_first, step)
        x = x + out
        h = F.layer_norm(x, x.shape[1:], *self.ln2, NORM_EPS)
        mixed = torch.addcmul(h, step.shift(self.index, "ffn", h), self.ffn_mix)
        hidden = self.ffn_key(mixed)
        return x + self.ffn_value(hidden * hidden), v_first

    def _time_mixing(self, x: Tensor, v_first: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        heads = (x.shape[0], self.num_heads, -1)
        h = F.layer_norm(x, x.shape[1:], *self.ln1, NORM_EPS)
        mixed = torch.addcmul(h, step.shift(self.index, "att", h), self.mix)
        x_r, x_w, x_k, x_v, x_a, x_g = mixed.to(self.key.input_dtype).unbind(0)
        r, k, v = self.receptance(x_r), self.key(x_k).float(), self.value(x_v).float()
        low_rank = [self.w2(self.w1(x_w)), self.a2(self.a1(x_a))]
        if v_first is not None:
            low_rank.append(self.v2(self.v1(x_v)))
        decayed = torch.exp(self.minus_bias - torch.stack(low_rank))
        gates = torch.reciprocal(torch.addcmul(self.gate_scale, self.gate_scale, decayed)).unbind(0)
        w, a = gates[:2]
        v_first = v if v_first is None else v_first
        if len(low_rank) == 3:
            v = torch.lerp(v, v_first, gates[2])
        kk = (k * self.k_k).view(heads)
        kk = kk / torch.linalg.vector_norm(kk, dim=-1, keepdim=True).clamp_min(1e-12)
        k = k * torch.addcmul(self.one_minus_k_a, a, self.k_a)
        r, w, k, v_heads, a = (t.view(heads) for t in (r, w, k, v, a))
        y = step.wkv7(self.index, r, w, k, v_heads, kk, a).view(x.shape)
        offset = step.offset(self.index)
        if offset is not None:
            y = y * (1 + offset)
        y = F.group_norm(y, self.num_heads, *self.ln_x, HEAD_NORM_EPS)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True)
        y = torch.addcmul(y.view(heads), bonus, v_heads).view(x.shape)
        return self.output(y * self.g2(self.g1(x_g))), v_first
