"""Random RWKV-6 and RWKV-7 models of official shapes, made on the device: for speed, not text."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from unittest import mock

import torch
from mrss_kernels.quantized import Format
from torch import Tensor

from mrss_provider.model import Model, rwkv7_cuda
from mrss_provider.model.config import DTYPES
from mrss_provider.model.weights import Weights


@dataclass(frozen=True)
class Shape:
    """An official shape; `ranks` are the LoRAs' of w, a, v, g, or RWKV-6's of mixing and decay."""

    num_layers: int
    hidden_size: int
    ranks: tuple[int, ...]
    vocab_size: int = 65536
    head_size: int = 64
    version: int = 7

    @property
    def ffn_size(self) -> int:
        return 4 * self.hidden_size if self.version == 7 else 7 * self.hidden_size // 2

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_size


SHAPES = {
    "0.1b": Shape(12, 768, (64, 64, 32, 128)),
    "0.4b": Shape(24, 1024, (64, 64, 32, 128)),
    "1.5b": Shape(24, 2048, (96, 96, 64, 256)),
    "7.2b": Shape(32, 4096, (128, 128, 96, 480)),
    "v6-1.6b": Shape(24, 2048, (32, 64), version=6),
    "v6-7b": Shape(32, 4096, (64, 128), version=6),
}

_Draw = Callable[..., Tensor]


def random_model(
    shape: Shape,
    *,
    dtype: str,
    state_dtype: str = "fp32",
    compute_dtype: str | None = None,
    device: str = "cuda",
    seed: int = 0,
    ffn_zeros: float | None = None,
    quantize: str = "none",
) -> Model:
    """Return a model with seeded random weights, drawn so that activations stay near 1.

    Weights are drawn in `dtype` and then held in `compute_dtype`, if that is given; the large ones
    in codes with `quantize`, on CUDA. With
    `ffn_zeros`, about that share of the ffns' inner activations are zeros, as in trained models,
    and the model reads sparsely; without it half of them are, and it does not.
    """
    tensors = random_tensors(shape, dtype=dtype, device=device, seed=seed)
    if ffn_zeros is not None:
        lower_keys(tensors, shape, ffn_zeros)
    sparse = ffn_zeros is not None
    held = compute_dtype or dtype
    return model_of(
        shape, tensors, dtype=held, state_dtype=state_dtype, quantize=quantize, sparse_ffn=sparse
    )


def model_of(
    shape: Shape,
    tensors: dict[str, Tensor],
    *,
    dtype: str,
    state_dtype: str = "fp32",
    quantize: str = "none",
    sparse_ffn: bool = False,
) -> Model:
    """Return a model that holds weights by name in `dtype`, on the device that they are on."""
    weights = Weights(
        version=shape.version,
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
    large = None if quantize == "none" else cast(Format, quantize)
    device = tensors["emb.weight"].device
    return Model(weights, device, dtype, state_dtype, "plain", large=large, sparse_ffn=sparse_ffn)


def lower_keys(tensors: dict[str, Tensor], shape: Shape, share: float) -> None:
    """Turn each ffn's keys against its norm's bias, so that a `share` of them come out below 0.

    What a key sees is that bias and noise; its outputs without the bias have a deviation near 0.9.
    """
    lowered_by = 0.9 * statistics.NormalDist().inv_cdf(share)
    for i in range(shape.num_layers):
        bias = tensors[f"blocks.{i}.ln2.bias"].float()
        key = tensors[f"blocks.{i}.ffn.key.weight"]
        key -= (lowered_by * bias / bias.square().sum()).to(key.dtype)


def zero_share(model: Model) -> float:
    """Return the share of zeros among the inner activations of the ffns of one decode step."""
    shares: list[Tensor] = []
    plain = rwkv7_cuda.squared_relu

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        y = plain(x, weight)
        shares.append((y == 0).float().mean())
        return y

    ids = torch.arange(8, device=model.device)
    with mock.patch.object(rwkv7_cuda, "squared_relu", counted):
        pool = model.new_pool(8)
        for _ in range(3):
            model.fused.decode(ids, ids, pool)  # type: ignore[union-attr]
    return float(torch.stack(shares[-model.config.num_layers :]).mean())


def layer_weights(shape: Shape) -> int:
    """Return how many numbers a layer's matrices have."""
    channels, total = shape.hidden_size, sum(shape.ranks)
    square = 4
    if shape.version == 6:
        # The output gate and the ffn's receptance; the mixing's LoRA is five of one rank.
        square, total = 6, 5 * shape.ranks[0] + shape.ranks[1]
    return square * channels * channels + 2 * channels * (shape.ffn_size + total)


def weight_bytes(shape: Shape, dtype: str) -> int:
    """Return the bytes of weights that one decode step reads: all but the embedding."""
    head = shape.vocab_size * shape.hidden_size
    return (shape.num_layers * layer_weights(shape) + head) * DTYPES[dtype].itemsize


def state_bytes(shape: Shape, state_dtype: str) -> int:
    """Return the bytes of one row's recurrent state."""
    return shape.num_layers * shape.hidden_size * shape.head_size * DTYPES[state_dtype].itemsize


def random_tensors(
    shape: Shape, *, dtype: str, device: str = "cuda", seed: int = 0
) -> dict[str, Tensor]:
    """Return the weights of `random_model` by name, in the layout of `Weights.tensors`."""
    kind = DTYPES[dtype]
    generator = torch.Generator(device).manual_seed(seed)
    c, f = shape.hidden_size, shape.ffn_size

    def normal(*size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        drawn = torch.empty(size, dtype=kind, device=device)
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
        drawn = _att7(shape, normal, i) if shape.version == 7 else _att6(shape, normal)
        tensors |= {att + name: tensor for name, tensor in drawn.items()}
        tensors |= norm(att + "ln_x")
        if shape.version == 7:
            tensors[prefix + "ffn.x_k"] = normal(c, scale=0.3, mean=0.5)
        else:
            for name in "kr":
                tensors[f"{prefix}ffn.time_maa_{name}"] = normal(c, scale=0.3, mean=0.5)
            tensors[prefix + "ffn.receptance.weight"] = normal(c, c, scale=c**-0.5)
        tensors[prefix + "ffn.key.weight"] = normal(f, c, scale=c**-0.5)
        tensors[prefix + "ffn.value.weight"] = normal(c, f, scale=f**-0.5)
    tensors |= norm("ln_out")
    # Logits of deviation 4: about 3 nats of entropy, as text has, where sampling is measured.
    tensors["head.weight"] = normal(shape.vocab_size, c, scale=4 * c**-0.5)
    return tensors


def _att7(shape: Shape, normal: _Draw, index: int) -> dict[str, Tensor]:
    """Return RWKV-7's time mixing but its norm, by name without `blocks.i.att.`."""
    c = shape.hidden_size
    tensors = {"x_" + name: normal(c, scale=0.3, mean=0.5) for name in "rwkvag"}
    for name, rank in zip("wavg", shape.ranks, strict=True):
        if name == "v" and index == 0:
            continue
        tensors[name + "1"] = normal(rank, c, scale=c**-0.5)
        tensors[name + "2"] = normal(c, rank, scale=rank**-0.5)
        if name != "g":
            tensors[name + "0"] = normal(c)
    tensors["k_k"] = normal(c, scale=0.1, mean=0.85)
    tensors["k_a"] = normal(c, scale=0.1, mean=1)
    tensors["r_k"] = normal(shape.num_heads, shape.head_size, scale=0.1)
    for name in ("receptance", "key", "value", "output"):
        tensors[name + ".weight"] = normal(c, c, scale=c**-0.5)
    return tensors


def _att6(shape: Shape, normal: _Draw) -> dict[str, Tensor]:
    """Return RWKV-6's time mixing but its norm, by name without `blocks.i.att.`."""
    c = shape.hidden_size
    mix_rank, decay_rank = shape.ranks
    tensors = {"time_maa_" + name: normal(c, scale=0.3, mean=0.5) for name in "xwkvrg"}
    tensors["time_maa_w1"] = normal(5 * mix_rank, c, scale=c**-0.5)
    tensors["time_maa_w2"] = normal(5, c, mix_rank, scale=0.3 * mix_rank**-0.5)
    tensors["time_decay"] = normal(c, scale=1.5, mean=-2)
    tensors["time_decay_w1"] = normal(decay_rank, c, scale=c**-0.5)
    tensors["time_decay_w2"] = normal(c, decay_rank, scale=0.3 * decay_rank**-0.5)
    tensors["time_faaaa"] = normal(shape.num_heads, shape.head_size, scale=0.5)
    for name in ("receptance", "key", "value", "output", "gate"):
        tensors[name + ".weight"] = normal(c, c, scale=c**-0.5)
    return tensors
