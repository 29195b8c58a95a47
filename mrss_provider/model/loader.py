"""Loader: a checkpoint's tensors as a model computes with them: converted, quantised, laid out.

One matrix after the other, so that never more than one is held in two forms.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mrss_provider.errors import ModelFileError
from mrss_provider.model.int8 import make_int8_linear, quantize_int8
from mrss_provider.model.linear import Activation, Backend, Linear, make_head, make_linear
from mrss_provider.model.weights import Weights

if TYPE_CHECKING:
    from mrss_kernels.quantized import Format

    from mrss_provider.model.int8 import Int8Form

# Elements of the room that quantised weights are written out to on CUDA: 32 MB stay in the L2.
_SCRATCH_LEN = 1 << 24

_CPU_FORMS = ("vnni", "pack")

# What one product reads together with receptance, key and value.
_FIRST_HALVES = ("att.w1", "att.a1", "att.g1", "att.v1", "att.time_decay_w1")


class Loader:
    """Hands out tensors in the dtype and on the device that they are used in."""

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend,
        large: Int8Form | Format | None = None,
    ) -> None:
        """Set what all tensors become.

        Args:
            weights: what to read from.
            device: where they go.
            dtype: of matrices.
            backend: the form of linears.
            large: the form of large linears: of int8 on a CPU, a format of the kernels on CUDA;
                None leaves them as the others.
        """
        self._name = weights.name
        self._tensors = weights.tensors
        self._device = device
        self._dtype = dtype
        self._backend = backend
        self._large = large

    def matrix(self, name: str, *, own: bool) -> Tensor:
        """Return a matrix in the weights' dtype.

        Args:
            name: in the checkpoint.
            own: copy it, so that it is never a view of the mapped file.

        Raises:
            ModelFileError: values that this dtype cannot hold, or NaN.
        """
        tensor = self._tensors[name].to(self._device, self._dtype, copy=own)
        if not torch.isfinite(tensor).all():
            raise ModelFileError(
                f"{self._name}: {name} holds NaN, or values beyond the range of {self._dtype}: "
                f"try another dtype"
            )
        return tensor

    def vectors(self, prefix: str) -> dict[str, Tensor]:
        """Return the fp32 vectors (and the [H, N] ones) of a layer, without the prefix."""
        small = ("att.r_k", "att.time_faaaa")
        return {
            name.removeprefix(prefix): tensor.to(self._device, torch.float32, copy=True)
            for name, tensor in self._tensors.items()
            if name.startswith(prefix) and (tensor.ndim == 1 or name.endswith(small))
        }

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        """Return weight and bias of a norm, fp32."""
        weight, bias = (
            self._tensors[f"{name}.{part}"].to(self._device, torch.float32, copy=True)
            for part in ("weight", "bias")
        )
        return weight, bias

    def linears(self, prefix: str) -> LayerLinears:
        """Return the factory of a layer's linears."""
        return LayerLinears(self, prefix)

    def linear(self, name: str, activation: Activation) -> Linear:
        """Return the linear of a matrix in the checkpoint; `name.3` is the third of stacked ones.

        Raises:
            ModelFileError: as `matrix`.
        """
        if self._is_large(name):
            return self._large_linear(name, activation)
        stacked, _, index = name.rpartition(".")
        own = self._backend == "plain"
        if index.isdigit():
            weight = self.matrix(stacked, own=own)[int(index)]
        else:
            weight = self.matrix(name, own=own)
        return make_linear(weight, self._backend, activation)

    def head(self) -> Linear:
        """Return the output head.

        Raises:
            ModelFileError: as `matrix`.
        """
        name = "head.weight"
        if self._is_large(name):
            return self._large_linear(name, "none")
        return make_head(self.matrix(name, own=self._backend == "plain"), self._backend)

    def _is_large(self, name: str) -> bool:
        """Tell whether a matrix is one of those that are quantised."""
        if self._large is None:
            return False
        is_first_half = self._large not in _CPU_FORMS and name.endswith(_FIRST_HALVES)
        return name.endswith(".weight") or is_first_half

    def _large_linear(self, name: str, activation: Activation) -> Linear:
        """Quantise a matrix where it is to be used."""
        if self._large in _CPU_FORMS:
            on_cpu = quantize_int8(self._tensors[name])
            self._expect_finite(name, on_cpu.scales)
            return make_int8_linear(on_cpu, cast("Int8Form", self._large), activation)
        # Here and not above: a machine without CUDA needs no Triton.
        from mrss_provider.model.quantized import QuantizedLinear, quantize

        matrix = self._tensors[name].to(self._device)
        weight = quantize(matrix, cast("Format", self._large), self._scratch)
        self._expect_finite(name, weight.scales)
        return QuantizedLinear(weight, activation)

    @functools.cached_property
    def _scratch(self) -> Tensor:
        return torch.empty(_SCRATCH_LEN, dtype=self._dtype, device=self._device)

    def _expect_finite(self, name: str, scales: Tensor) -> None:
        if not torch.isfinite(scales).all():
            raise ModelFileError(f"{self._name}: {name} holds NaN or infinity; get the file again")


class LayerLinears:
    """Builds the linears of one layer by their names in it."""

    def __init__(self, loader: Loader, prefix: str) -> None:
        self._loader = loader
        self._prefix = prefix

    def __call__(self, name: str, activation: Activation) -> Linear:
        """Return the linear of a name, with an activation at its end."""
        return self._loader.linear(self._prefix + name, activation)
