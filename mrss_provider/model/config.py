"""What a loaded checkpoint is: version, shape, dtype and fingerprint. Knows no tensors' values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of weights by the names that `EngineConfig.dtype` uses."""

QUANTIZATIONS: Final = ("none", "int8", "int4", "fp8")
"""What `EngineConfig.quantize` may be."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, read from its tensors.

    Attributes:
        version: 6 or 7.
        dtype: of the weights as loaded, those apart that are quantised: "fp32", "bf16" or "fp16".
        fingerprint: sha256 (hex) of layer 0's key weight, as stored in the file.
        name: the file's or folder's name, for people.
        quantize: how the large matrices are held: "none" is in `dtype`; "int8", "int4", "fp8".
        content: a hash (hex) of all weights, as stored: what computed states belong to.
    """

    version: int
    num_layers: int
    hidden_size: int
    num_heads: int
    head_size: int
    vocab_size: int
    ffn_size: int
    dtype: str
    fingerprint: str
    name: str = ""
    quantize: str = "none"
    content: str = ""

    @property
    def precision(self) -> str:
        """What the weights are held in, for people and for keys: "fp16", or "fp16+int8".

        States of one checkpoint in different precisions differ, and none stands for another.
        """
        return self.dtype if self.quantize == "none" else f"{self.dtype}+{self.quantize}"

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Shape of one recurrent state, [L, H, N, N]."""
        return (self.num_layers, self.num_heads, self.head_size, self.head_size)

    def shape_text(self) -> str:
        """Return the shape in words: `RWKV-7, 12 layers x 12 heads of 64`."""
        return (
            f"RWKV-{self.version}, {self.num_layers} layers x {self.num_heads} heads "
            f"of {self.head_size}"
        )
