"""Random RWKV-7 models of the official shapes, made on the device: for speed, not for text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mrss_provider.model import Model
from mrss_provider.model.config import DTYPES
from mrss_provider.model.weights import Weights


@dataclass(frozen=True)
class Shape:
    """An official shape; `ranks` are those of the LoRAs of w, a, v, g."""

    num_layers: int
    hidden_size: int
    ranks: tuple[int, int, int, int]
    vocab_size: int = 65536
    head_size: int = 64

    @property
    def ffn_size(self) -> int:
        return 4 * self.hidden_size

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_size


SHAPES = {
    "0.1b": Shape(12, 768, (64, 64, 32, 128)),
    "1.5b": Shape(24, 2048, (96, 96, 64, 256)),
    "7.2b": Shape(32, 4096, (128, 128, 96, 480)),
}


def random_model(
    shape: Shape,
    *,
    dtype: str,
    state_dtype: str = "fp32",
    compute_dtype: str | None = None,
    device: str = "cuda",
    seed: int = 0,
) -> Model:
    """Return a model with seeded random weights, drawn so that activations stay near 1.

    Weights are drawn in `dtype` and then held in `compute_dtype`, if that is given.
    """
    tensors = _tensors(shape, DTYPES[dtype], torch.device(device), seed)
    weights = Weights(
        version=7,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        head_size=shape.head_size,
        vocab_size=shape.vocab_size,
        ffn_size=shape.ffn_size,
        dtype=DTYPES[dtype],
        fingerprint="random",
        name="random",
        tensors=tensors,
        time_state=None,
    )
    held = compute_dtype or dtype
    return Model(weights, torch.device(device), held, state_dtype, "plain")


def weight_bytes(shape: Shape, dtype: str) -> int:
    """Return the bytes of weights that one decode step reads: all but the embedding."""
    channels, total = shape.hidden_size, sum(shape.ranks)
    layer = 4 * channels * channels + 2 * channels * shape.ffn_size + 2 * channels * total
    matrices = shape.num_layers * layer + shape.vocab_size * channels
    return matrices * DTYPES[dtype].itemsize


def state_bytes(shape: Shape, state_dtype: str) -> int:
    """Return the bytes of one row's recurrent state."""
    return shape.num_layers * shape.hidden_size * shape.head_size * DTYPES[state_dtype].itemsize


def _tensors(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    c, f = shape.hidden_size, shape.ffn_size

    def normal(*size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        drawn = torch.empty(size, dtype=dtype, device=device)
        return drawn.normal_(mean, scale, generator=generator)

    def norm(name: str) -> dict[str, Tensor]:
        return {
            f"{name}.weight": normal(c, scale=0.1, mean=1),
            f"{name}.bias": normal(c, scale=0.1),
        }

    tensors = {"emb.weight": normal(shape.vocab_size, c, scale=0.5)} | norm("blocks.0.ln0")
    for i in range(shape.num_layers):
        prefix = f"blocks.{i}."
        tensors |= norm(prefix + "ln1") | norm(prefix + "ln2")
        att = prefix + "att."
        for name in "rwkvag":
            tensors[f"{att}x_{name}"] = normal(c, scale=0.3, mean=0.5)
        for name, rank in zip("wavg", shape.ranks, strict=True):
            if name == "v" and i == 0:
                continue
            tensors[f"{att}{name}1"] = normal(rank, c, scale=c**-0.5)
            tensors[f"{att}{name}2"] = normal(c, rank, scale=rank**-0.5)
            if name != "g":
                tensors[f"{att}{name}0"] = normal(c)
        tensors[att + "k_k"] = normal(c, scale=0.1, mean=0.85)
        tensors[att + "k_a"] = normal(c, scale=0.1, mean=1)
        tensors[att + "r_k"] = normal(shape.num_heads, shape.head_size, scale=0.1)
        for name in ("receptance", "key", "value", "output"):
            tensors[f"{att}{name}.weight"] = normal(c, c, scale=c**-0.5)
        tensors |= norm(att + "ln_x")
        tensors[prefix + "ffn.x_k"] = normal(c, scale=0.3, mean=0.5)
        tensors[prefix + "ffn.key.weight"] = normal(f, c, scale=c**-0.5)
        tensors[prefix + "ffn.value.weight"] = normal(c, f, scale=f**-0.5)
    tensors |= norm("ln_out")
    tensors["head.weight"] = normal(shape.vocab_size, c, scale=c**-0.5)
    return tensors
