"""Fresh RWKV-7 weights, in the official names, shaped as the published training code shapes them.

The values follow RWKV-LM (v7, `train_temp`): small models depend on them far more than large ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HEAD_SIZE = 64


def lora_rank(scale: float, hidden_size: int) -> int:
    """Return `scale * sqrt(C)` to the nearest multiple of 32, at least 32."""
    return max(32, round(scale * math.sqrt(hidden_size) / 32) * 32)


def init_weights(
    num_layers: int, hidden_size: int, vocab_size: int, seed: int
) -> dict[str, Tensor]:
    """Return fp32 CPU weights; the same seed gives the same bytes."""
    gen = torch.Generator().manual_seed(seed)
    C = hidden_size
    weights = {
        "emb.weight": _uniform((vocab_size, C), 1e-4, gen),
        "blocks.0.ln0.weight": torch.ones(C),
        "blocks.0.ln0.bias": torch.zeros(C),
    }
    for i in range(num_layers):
        block = f"blocks.{i}."
        for norm in ("ln1", "ln2"):
            weights[f"{block}{norm}.weight"] = torch.ones(C)
            weights[f"{block}{norm}.bias"] = torch.zeros(C)
        for name, tensor in _time_mix(i, num_layers, C, gen).items():
            weights[f"{block}att.{name}"] = tensor
        for name, tensor in _channel_mix(i, num_layers, C, gen).items():
            weights[f"{block}ffn.{name}"] = tensor
    weights["ln_out.weight"] = torch.ones(C)
    weights["ln_out.bias"] = torch.zeros(C)
    gain = 0.5 * math.sqrt(max(1.0, vocab_size / C))
    weights["head.weight"] = _orthogonal((vocab_size, C), gain, gen)
    return weights


def _time_mix(layer: int, num_layers: int, C: int, gen: torch.Generator) -> dict[str, Tensor]:
    depth = layer / max(1, num_layers - 1)
    shallow = 1.0 - layer / num_layers
    channel = torch.arange(C, dtype=torch.float32)
    ratio = channel / C
    linear = channel / (C - 1) - 0.5
    zigzag = ((channel % HEAD_SIZE) - (HEAD_SIZE - 1) / 2) / ((HEAD_SIZE - 1) / 2)
    zigzag = zigzag * zigzag.abs()
    # From slow channels to fast ones, more fast ones in deep layers.
    decay = -6 + 6 * (channel / (C - 1)) ** (1 + depth**0.3)
    powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
    out = {f"x_{c}": (1.0 - ratio ** (p * shallow)).view(1, 1, C) for c, p in powers.items()}
    ranks = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}
    if layer == 0:
        # The first layer makes the value that the others mix in.
        del ranks["v"]
    for c, scale in ranks.items():
        rank = lora_rank(scale, C)
        out[f"{c}1"] = torch.zeros(C, rank)
        out[f"{c}2"] = _orthogonal((rank, C), 0.1, gen)
    out["w0"] = (decay + 0.5 + 2.5 * zigzag).view(1, 1, C)
    out["a0"] = (-0.19 + 0.3 * zigzag + 0.4 * linear).view(1, 1, C)
    if layer > 0:
        out["v0"] = (0.73 - 0.4 * linear).view(1, 1, C)
    out["k_k"] = (0.71 - 0.1 * linear).view(1, 1, C)
    out["k_a"] = torch.full((1, 1, C), 1.02)
    out["r_k"] = torch.full((C // HEAD_SIZE, HEAD_SIZE), -0.04)
    out["receptance.weight"] = _orthogonal((C, C), 1.0, gen)
    out["key.weight"] = _orthogonal((C, C), 0.1, gen)
    out["value.weight"] = _orthogonal((C, C), 1.0, gen)
    out["output.weight"] = torch.zeros(C, C)
    out["ln_x.weight"] = torch.full((C,), ((1 + layer) / num_layers) ** 0.7)
    out["ln_x.bias"] = torch.zeros(C)
    return out


def _channel_mix(layer: int, num_layers: int, C: int, gen: torch.Generator) -> dict[str, Tensor]:
    shallow = 1.0 - layer / num_layers
    ratio = torch.arange(C, dtype=torch.float32) / C
    return {
        "x_k": (1.0 - ratio ** (shallow**4)).view(1, 1, C),
        "key.weight": _orthogonal((4 * C, C), 1.0, gen),
        "value.weight": torch.zeros(C, 4 * C),
    }


def _uniform(shape: tuple[int, int], bound: float, gen: torch.Generator) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=gen)


def _orthogonal(shape: tuple[int, int], gain: float, gen: torch.Generator) -> Tensor:
    return nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=gen)
