"""Weights in 8 or 4 bits on CUDA: how a matrix becomes codes and scales, and a linear of them.

- int8: one scale an output, rounded to nearest; the same codes as on a CPU.
- fp8: e4m3, one scale an output that makes its largest weight 448.
- int4: one fp16 scale for 64 weights of an output, around zero. Of ten scales, the one whose
  rounded weights have the least squared error.
"""

from __future__ import annotations

import torch
from mrss_kernels.quantized import CODE_DTYPES, GROUP_SIZE, Format, QuantizedWeight
from torch import Tensor

from mrss_provider.model.int8 import quantize_int8
from mrss_provider.model.linear import ACTIVATIONS, Activation

_LARGEST_FP8 = 448

# The largest weight of a group is -8 times the scale, or as much less as loses least.
_SHRINKS = tuple(1 - 0.04 * i for i in range(10))
# fp16's least number: the scale of a group of zeros can be divided by.
_LEAST_SCALE = 2.0**-24

# So many rows are held in fp32 at a time.
_BLOCK_ROWS = 4096


def quantize(weight: Tensor, form: Format, scratch: Tensor) -> QuantizedWeight:
    """Return a matrix in codes and scales.

    Args:
        weight: [R, K], any float dtype; for int4 K is a multiple of 128.
        form: which codes.
        scratch: of all weights of the model, see `QuantizedWeight`.

    Returns:
        The quantised weight, on the device of `weight`; scales are not finite where it is not.
    """
    weight = weight.contiguous()
    if form == "int8":
        codes, scales = quantize_int8(weight)
    elif form == "fp8":
        codes, scales = _quantize_fp8(weight)
    else:
        codes, scales = _quantize_int4(weight)
    return QuantizedWeight(form, codes, scales, scratch)


def _quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(weight, dtype=CODE_DTYPES["fp8"])
    scales = torch.empty(weight.shape[0], device=weight.device)
    for start in range(0, weight.shape[0], _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        block = weight[rows].float()
        scale = block.abs().amax(1).clamp_min(1e-30) / _LARGEST_FP8
        # A quotient rounded up would be beyond the largest number.
        quotients = (block / scale[:, None]).clamp(-_LARGEST_FP8, _LARGEST_FP8)
        codes[rows] = quotients.to(codes.dtype)
        scales[rows] = scale
    return codes, scales


def _quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    size_r, size_k = weight.shape
    num_pairs = size_k // (2 * GROUP_SIZE)
    codes = torch.empty((size_r, size_k // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((num_pairs, size_r, 2), dtype=torch.float16, device=weight.device)
    for start in range(0, size_r, _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        groups = weight[rows].float().view(-1, num_pairs, 2, GROUP_SIZE)
        scale = _best_scales(groups)
        found = ((groups / scale).round_().clamp_(-8, 7) + 8).nan_to_num_().to(torch.uint8)
        codes[rows] = (found[:, :, 0] | found[:, :, 1] << 4).view(-1, size_k // 2)
        scales[:, rows] = scale[..., 0].transpose(0, 1).half()
    return codes, scales


def _best_scales(groups: Tensor) -> Tensor:
    """Return the scale [..., 1] of each group [..., 64], a number that fp16 holds and not 0.

    Its sign is such that the largest weight is negative: there is one code more below zero.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    for shrink in _SHRINKS:
        scale = (largest * (-shrink / 8)).half().float()
        scale = torch.where(scale == 0, _LEAST_SCALE, scale)
        rounded = (groups / scale).round_().clamp_(-8, 7).mul_(scale)
        error = (rounded - groups).square_().sum(-1, keepdim=True)
        # Not finite where a weight is not, and then so is the scale.
        is_better = ~(error >= least)
        best, least = torch.where(is_better, scale, best), torch.where(is_better, error, least)
    return best


class QuantizedLinear:
    """`activation(x @ weight.T)` on CUDA; outputs have the dtype of inputs."""

    def __init__(self, weight: QuantizedWeight, activation: Activation = "none") -> None:
        """Keep the weight, which a packed layer replaces by a view of its own."""
        self.weight = weight
        self.input_dtype = weight.dtype
        self._activate = ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [M, in], any float dtype, to [M, out]."""
        # Here and not above: a machine without CUDA needs no Triton.
        from mrss_provider.model.products import many_rows

        return self._activate(many_rows(x.to(self.input_dtype), self.weight))
