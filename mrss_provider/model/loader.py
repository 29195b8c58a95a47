"""Loader: a checkpoint's tensors as a model computes with them: converted, quantised, laid out.

One matrix after the other, so that never more than one is held in two forms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrss_provider.errors import ModelFileError
from mrss_provider.model.int8 import Int8Form, make_int8_linear, quantize_int8
from mrss_provider.model.linear import Activation, Backend, Linear, make_head, make_linear
from mrss_provider.model.weights import Weights


class Loader:
    """Hands out tensors in the dtype and on the device that they are used in."""

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend,
        int8: Int8Form | None = None,
    ) -> None:
        """Set what all tensors become.

        Args:
            weights: what to read from.
            device: where they go.
            dtype: of matrices.
            backend: the form of linears.
            int8: the form of large linears in 8 bits; None leaves them as the others.
        """
        self._name = weights.name
        self._tensors = weights.tensors
        self._device = device
        self._dtype = dtype
        self._backend = backend
        self._int8 = int8

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
        if self._int8 is not None and name.endswith(".weight"):
            return self._int8_linear(name, self._int8, activation)
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
        if self._int8 is not None:
            return self._int8_linear(name, self._int8, "none")
        return make_head(self.matrix(name, own=self._backend == "plain"), self._backend)

    def _int8_linear(self, name: str, form: Int8Form, activation: Activation) -> Linear:
        weight = quantize_int8(self._tensors[name])
        if not torch.isfinite(weight.scales).all():
            raise ModelFileError(f"{self._name}: {name} holds NaN or infinity; get the file again")
        return make_int8_linear(weight, form, activation)


class LayerLinears:
    """Builds the linears of one layer by their names in it."""

    def __init__(self, loader: Loader, prefix: str) -> None:
        self._loader = loader
        self._prefix = prefix

    def __call__(self, name: str, activation: Activation) -> Linear:
        """Return the linear of a name, with an activation at its end."""
        return self._loader.linear(self._prefix + name, activation)
