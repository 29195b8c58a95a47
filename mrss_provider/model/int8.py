"""Weights in 8 bits, one fp32 scale an output, rounded to nearest; and linears of them on a CPU.

Two forms:

- vnni (x86 with AVX-512 VNNI): oneDNN's products of bytes. Each row of the input is scaled by its
  own largest value to 16 bits, and its high and low bytes go through the product as two rows. The
  sums are exact integers and the output is fp32: the result is that of fp32 on the rounded weights
  within 1e-4, and a row's bits cannot depend on its batch.
- pack (any other CPU): aten's product of bf16 inputs with bytes; the output is bf16.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mrss_provider.model.linear import ACTIVATIONS, Activation, Linear

Int8Form = Literal["vnni", "pack"]

_LARGEST = 127

# So many rows are held in fp32 at a time: the head is the largest matrix of a small model.
_BLOCK_ROWS = 4096

# An input's largest value in 16 bits, so that the high byte, rounded, still fits in one.
_LARGEST_INPUT = 127 * 256
# Makes both bytes of such a number those of unsigned ones, each 128 too large.
_OFFSET = 128 * 256 + 128


class Int8Weight(NamedTuple):
    """A matrix as `values * scales[:, None]`.

    Attributes:
        values: int8 [out, in], in [-127, 127].
        scales: fp32 [out], numbers that bf16 holds; not finite where the matrix is not.
    """

    values: Tensor
    scales: Tensor


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Return each row of a matrix [out, in], any float dtype, in 8 bits around zero."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], device=weight.device)
    for start in range(0, weight.shape[0], _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        block = weight[rows].float()
        # Rounded up, so that the largest value still fits; a row of zeros can be divided by it.
        scale = block.abs().amax(1).clamp_min(1e-30) * ((1 + 2**-8) / _LARGEST)
        scale = scale.bfloat16().float()
        values[rows] = (block / scale[:, None]).round_()
        scales[rows] = scale
    return Int8Weight(values, scales)


def pick_int8_form(*, packed: bool) -> Int8Form:
    """Return the fastest form that is right here; `packed=False` asks for aten's."""
    return "vnni" if packed and _has_exact_products() else "pack"


def make_int8_linear(weight: Int8Weight, form: Int8Form, activation: Activation = "none") -> Linear:
    """Build a linear layer; `weight` is not kept by the form vnni."""
    layer = _VnniLinear if form == "vnni" else _PackLinear
    return layer(weight, activation)


class _VnniLinear:
    """fp32 in and out; the input in 16 bits, as two rows of bytes."""

    input_dtype = torch.float32

    def __init__(self, weight: Int8Weight, activation: Activation) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(weight.values, None)
        self._scales = weight.scales / _LARGEST_INPUT
        self._zeros = torch.zeros(weight.scales.shape, dtype=torch.int32)
        self._offset = torch.tensor(_OFFSET + 0.5)
        self._largest = torch.tensor(float(_LARGEST_INPUT))
        self._activate = ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        num_rows, width = x.shape
        # A row that is not finite comes out as such: its bytes mean nothing, its scale does.
        # So does a row of zeros.
        largest = x.abs().amax(1, keepdim=True)
        # Cutting off after half is added is rounding.
        fixed = torch.addcmul(self._offset, x, self._largest / largest).to(torch.int32)
        low_high = fixed.view(torch.uint8).view(num_rows, width, 4)[..., :2]
        y = _byte_products(
            low_high.permute(2, 0, 1).reshape(2 * num_rows, width),
            self._packed,
            self._scales,
            self._zeros,
        )
        y = torch.add(y[:num_rows], y[num_rows:], alpha=256).mul_(largest)
        return self._activate(y)


class _PackLinear:
    """bf16 in and out; the weights stay rows of bytes."""

    input_dtype = torch.bfloat16

    def __init__(self, weight: Int8Weight, activation: Activation) -> None:
        self._values = weight.values
        self._scales = weight.scales.bfloat16()
        self._activate = ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(x.to(torch.bfloat16), self._values, self._scales)
        return self._activate(y)


def _byte_products(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return `(x - 128) @ weight.T * scales` in fp32, for x uint8 [M, in]."""
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


def _has_exact_products() -> bool:
    """Whether oneDNN sums products of bytes as they are.

    Without VNNI it adds two of them in 16 bits, where large ones do not fit; on other processors
    it takes a hundred times as long. A private flag of torch says what the processor can, but not
    what ONEDNN_MAX_CPU_ISA leaves of it.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return False
    width = 64
    packed = torch.ops.onednn.qlinear_prepack(
        torch.full((16, width), _LARGEST, dtype=torch.int8), None
    )
    largest = torch.full((1, width), 255, dtype=torch.uint8)
    zeros = torch.zeros(16, dtype=torch.int32)
    y = _byte_products(largest, packed, torch.ones(16), zeros)
    return bool((y == _LARGEST * _LARGEST * width).all())
