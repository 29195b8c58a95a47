"""Random models as files: an official `.pth` and tuned states, for whoever loads from a disk."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from random_models import Shape, random_tensors
from safetensors.torch import save_file
from torch import Tensor

# Matrices that an official file keeps as [in, out], and vectors that it keeps as [1, 1, C].
_LORA = re.compile(r"att\.([wavg]|time_maa_w|time_decay_w)[12]$")
_VECTOR = re.compile(r"(att|ffn)\.(x_.|[wav]0|k_k|k_a|time_maa_.|time_decay)$")


def official_tensors(
    shape: Shape, *, dtype: str = "bf16", device: str = "cuda", seed: int = 0
) -> dict[str, Tensor]:
    """Return the weights of `random_model(shape, dtype=..., seed=...)` as an official file's.

    Equal device and seed give equal weights. They stay on `device`.
    """
    return {
        name: _official(name, tensor)
        for name, tensor in random_tensors(shape, dtype=dtype, device=device, seed=seed).items()
    }


def write_checkpoint(
    path: Path, shape: Shape, *, dtype: str = "bf16", device: str = "cuda", seed: int = 0
) -> Path:
    """Write `official_tensors(...)` to `path`, a `.pth`; return it."""
    tensors = official_tensors(shape, dtype=dtype, device=device, seed=seed)
    torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, path)
    return path


def write_states(folder: Path, shape: Shape, num_states: int) -> list[str]:
    """Write random tuned states s0, s1, ... to `folder`; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    size = (shape.num_heads, shape.head_size, shape.head_size)
    names = [f"s{k}" for k in range(num_states)]
    for name in names:
        tensors = {
            f"blocks.{i}.att.time_state": torch.randn(size, generator=generator) * 0.3
            for i in range(shape.num_layers)
        }
        save_file(tensors, folder / f"{name}.safetensors")
    return names


def _official(name: str, tensor: Tensor) -> Tensor:
    if _LORA.search(name):
        return tensor.mT.contiguous()
    if _VECTOR.search(name):
        return tensor.view(1, 1, -1)
    return tensor
