"""Linear layers `[M, in] -> [M, out]` in the fastest form that a device has for a dtype.

On a CPU a step reads every weight once and does little else, so what counts is bytes and how well
a kernel streams them for few rows. Three forms:

- fbgemm (dtype fp16, x86): weights in fp16, inputs, sums and outputs in fp32. Official weights are
  bf16, which fp16 holds without loss from 6e-5 up, so the result is that of fp32 at half the bytes.
- oneDNN (bf16, fp32): weights reordered once; inputs and outputs in the weights' dtype.
- plain: `F.linear` on any device, the only one that autograd goes through.

A row's bits do not depend on its batch (torch 2.13, the official models' shapes, 1 to 8 threads
with AVX-512, 1 with AVX2). Where a kernel rounds a few rows otherwise than many, rows are added up
to a number where it does not: oneDNN from 1 to 2, plain fp32 to 4, and fbgemm's AVX2 kernels, which
take 6 rows at a time and round otherwise when 1 or 2 are left over, as `_avx2_rows` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mrss_provider.model.config import DTYPES

Backend = Literal["fbgemm", "onednn", "plain"]
Activation = Literal["none", "relu", "tanh", "sigmoid"]


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)), in the dtype of x [...].

    `torch.sigmoid` rounds a tensor's last elements on a CPU otherwise than the ones before them, so
    that a row's bits would depend on the size of its batch; these four ops round all alike.
    """
    return torch.reciprocal(torch.exp(-x) + 1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": sigmoid,
}
"""What a linear may end with; a row's bits do not depend on its batch in any of them."""


class Linear(Protocol):
    """`activation(x @ weight.T)`; `input_dtype` is what x is converted to."""

    input_dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [M, in], any float dtype, to [M, out] in `input_dtype`."""
        ...


def pick_dtype(device: torch.device, stored: torch.dtype) -> str:
    """Return what dtype "auto" means: on CUDA the file's, on a CPU the fastest exact-enough one.

    That is fp16 where fbgemm is there: it decodes as fast as bf16 but does not round activations.
    On the bundled model its predictions are within a KL of 3e-7 of fp32's, bf16's only within 8e-3,
    above the 1e-4 from which gates take two rows to differ. Prompts are read at half of bf16's
    speed. Else bf16 where the CPU has it, else fp32.
    """
    if device.type != "cpu":
        return next((name for name, dtype in DTYPES.items() if dtype == stored), "bf16")
    if _has_fbgemm():
        return "fp16"
    return "bf16" if _has_onednn_bf16() else "fp32"


def pick_backend(device: torch.device, dtype: str, *, packed: bool) -> Backend:
    """Return the fastest form for weights of `dtype`; `packed=False` asks for the plain one."""
    if device.type != "cpu" or not packed:
        return "plain"
    if dtype == "fp16":
        return "fbgemm" if _has_fbgemm() else "plain"
    if dtype == "bf16":
        return "onednn" if _has_onednn_bf16() else "plain"
    return "onednn" if _has_onednn() else "plain"


def make_linear(weight: Tensor, backend: Backend, activation: Activation = "none") -> Linear:
    """Build a linear layer.

    Args:
        weight: [out, in], in the dtype and on the device that it is to have; not kept if packed.
        backend: what `pick_backend` returned for that device and dtype.
        activation: applied to the output.
    """
    if backend == "fbgemm":
        return _FbgemmLinear(weight, activation)
    if backend == "onednn":
        return _OneDNNLinear(weight, activation)
    return PlainLinear(weight, activation)


def make_head(weight: Tensor, backend: Backend) -> Linear:
    """Build the output head, whose logits should not be rounded to 16 bits where that is free."""
    if backend == "onednn" and weight.dtype == torch.bfloat16 and _has_fbgemm():
        return _FbgemmLinear(weight, "none")
    if weight.is_cuda and weight.dtype != torch.float32:
        return _CudaHead(weight)
    return make_linear(weight, backend)


class PlainLinear:
    """`F.linear`; differentiable."""

    def __init__(self, weight: Tensor, activation: Activation = "none") -> None:
        self.weight = weight.contiguous()
        self.input_dtype = weight.dtype
        self._activate = ACTIVATIONS[activation]
        self._min_rows = 4 if weight.device.type == "cpu" else 1

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        x = _padded(_as(x, self.input_dtype), self._min_rows)
        return self._activate(F.linear(x, self.weight)[:num_rows])


class _CudaHead:
    """16-bit weights and inputs, fp32 logits."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.contiguous()
        self.input_dtype = weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.input_dtype)
        y: Tensor = torch.mm(x, self.weight.t(), out_dtype=torch.float32)
        return y


class _OneDNNLinear:
    """Weights in oneDNN's own blocked layout; the activation is fused."""

    def __init__(self, weight: Tensor, activation: Activation) -> None:
        # The hint is the number of rows to lay out for; one layout serves 1 to 16 equally well.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self._activation = activation
        self.input_dtype = weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        x = _padded(_as(x, self.input_dtype), 2)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, None, self._activation, [], ""
        )
        return y[:num_rows]


class _FbgemmLinear:
    """fp16 weights in fbgemm's blocked layout; everything else in fp32."""

    input_dtype = torch.float32

    def __init__(self, weight: Tensor, activation: Activation) -> None:
        ops = torch.ops.quantized
        self._packed = ops.linear_prepack_fp16(weight.float().contiguous(), None)
        fused = activation == "relu"
        self._op = ops.linear_relu_dynamic_fp16 if fused else ops.linear_dynamic_fp16
        self._activate = None if fused or activation == "none" else ACTIVATIONS[activation]
        self._is_avx2 = torch.backends.cpu.get_cpu_capability() != "AVX512"

    def __call__(self, x: Tensor) -> Tensor:
        x = _as(x, torch.float32)
        num_rows = x.shape[0]
        if self._is_avx2:
            x = _padded(x, _avx2_rows(num_rows))
        y: Tensor = self._op(x, self._packed)[:num_rows]
        return y if self._activate is None else self._activate(y)


def _avx2_rows(num_rows: int) -> int:
    """Return the next number of rows that fbgemm never cuts into pieces of 1 or 2."""
    if num_rows < 14:
        return {1: 3, 2: 3, 7: 8}.get(num_rows, num_rows)
    return -(-num_rows // 6) * 6


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert; asks first, as even a conversion to the same dtype costs half a microsecond."""
    return x if x.dtype is dtype else x.to(dtype)


def _padded(x: Tensor, min_rows: int) -> Tensor:
    """Return x [M, in] with rows of zeros added up to `min_rows`."""
    missing = min_rows - x.shape[0]
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x


def _has_fbgemm() -> bool:
    """Whether fbgemm's fp16 kernels are in this torch and run here (x86 with AVX2)."""
    engines = torch.backends.quantized.supported_engines
    return "fbgemm" in engines and hasattr(torch.ops.quantized, "linear_dynamic_fp16")


def _has_onednn_bf16() -> bool:
    return _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
