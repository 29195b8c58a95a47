"""Weights in 8 or 4 bits as the kernels read them, and what they stand for in plain torch.

A matrix [R, K] is codes times scales. `int8` and `fp8` (e4m3) have one scale an output. `int4` has
one for each group of 64 weights along K, and two codes a byte: of the 128 weights of a pair of
groups, byte j holds weight j in its low and weight 64 + j in its high four bits, so that a tile of
bytes becomes two dense tiles without a shuffle. A code is 8 more than what it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from mrss_kernels._checks import expect_device, expect_dtype, expect_shape

Format = Literal["int8", "fp8", "int4"]

CODE_DTYPES: Final[dict[str, torch.dtype]] = {
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "int4": torch.uint8,
}
"""Dtype of the codes by format."""

GROUP_SIZE: Final = 64
"""Weights along K that share one scale of `int4`."""

PAIR_SIZE: Final = 2 * GROUP_SIZE
"""Weights of one pair of groups: K is a multiple of it."""

CODE_OFFSET: Final = 8
"""What a code of `int4` is more than the number that it stands for."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [R, K] in codes and scales.

    Attributes:
        format: "int8", "fp8" or "int4".
        codes: [R, K] int8 or float8_e4m3fn; int4: [R, K / 2] uint8. Contiguous.
        scales: fp32 [R]; int4: fp16 [K / 128, R, 2], of both groups of a pair.
        scratch: room for weights in the dtype that they are computed in, [N] fp16 or bf16: what a
            product of the library reads. All weights of a model share it; it is overwritten.
    """

    format: Format
    codes: Tensor
    scales: Tensor
    scratch: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """R and K."""
        rows, width = self.codes.shape
        return rows, width * (2 if self.format == "int4" else 1)

    @property
    def dtype(self) -> torch.dtype:
        """What inputs are to have, and dequantised weights get."""
        return self.scratch.dtype

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        """Return R."""
        return self.codes.shape[0]

    def rows(self, first: int, end: int) -> QuantizedWeight:
        """Return the outputs from `first` up to `end`, a view."""
        scales = self.scales[:, first:end] if self.format == "int4" else self.scales[first:end]
        return replace(self, codes=self.codes[first:end], scales=scales)

    def padded(self, num_rows: int) -> QuantizedWeight:
        """Return a weight of so many rows, those after R zeros: a scale of 0 makes them that."""
        missing = num_rows - len(self)
        if not missing:
            return self
        codes = self.codes.view(torch.uint8)
        scales_dim = 1 if self.format == "int4" else 0
        shape = list(self.scales.shape)
        shape[scales_dim] = missing
        more = codes.new_zeros((missing, codes.shape[1]))
        return replace(
            self,
            codes=torch.cat((codes, more)).view(self.codes.dtype),
            scales=torch.cat((self.scales, self.scales.new_zeros(shape)), scales_dim),
        )


def stack_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return weights of one format and K as one matrix, one below the other; a copy."""
    first = weights[0]
    scales_dim = 1 if first.format == "int4" else 0
    return replace(
        first,
        # Concatenation has no float8.
        codes=torch.cat([each.codes.view(torch.uint8) for each in weights]).view(first.codes.dtype),
        scales=torch.cat([each.scales for each in weights], scales_dim),
    )


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return the matrix [R, K] that codes and scales stand for, rounded to `dtype` once."""
    # fp32 holds a code times a scale of int4 exactly, and fp64 any of them.
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    if weight.format != "int4":
        return (weight.codes.to(compute) * weight.scales.to(compute)[:, None]).to(dtype)
    size_r, size_k = weight.shape
    pairs = weight.codes.view(size_r, -1, 1, GROUP_SIZE)
    codes = torch.cat((pairs & 15, pairs >> 4), 2).to(compute) - CODE_OFFSET
    scales = weight.scales.permute(1, 0, 2)[..., None].to(compute)
    return (codes * scales).to(dtype).view(size_r, size_k)


def check_quantized(name: str, weight: QuantizedWeight) -> None:
    """Raise `ValueError` unless codes and scales fit each other and can go to a kernel."""
    if weight.format not in CODE_DTYPES:
        formats = ", ".join(CODE_DTYPES)
        raise ValueError(f"{name} must have a format of {formats}, got {weight.format!r}")
    size_r, size_k = weight.shape
    expect_dtype(f"{name}.codes", weight.codes, (CODE_DTYPES[weight.format],))
    scales_shape: tuple[int, ...] = (size_r,)
    scales_dtype = torch.float32
    if weight.format == "int4":
        if size_k % PAIR_SIZE:
            raise ValueError(f"K must be a multiple of {PAIR_SIZE} for int4, got {size_k}")
        scales_shape, scales_dtype = (size_k // PAIR_SIZE, size_r, 2), torch.float16
    expect_shape(f"{name}.scales", weight.scales, scales_shape)
    expect_dtype(f"{name}.scales", weight.scales, (scales_dtype,))
    if not weight.codes.is_contiguous():
        raise ValueError(
            f"{name}.codes must be contiguous, got strides {list(weight.codes.stride())}"
        )
    for part, tensor in (("codes", weight.codes), ("scales", weight.scales)):
        expect_device(f"{name}.{part}", tensor, weight.scratch.device)
