"""Inputs, guarded outputs and the pass mark that every check of a kernel uses."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
GUARD = 64
# A GPU's exp2 and log2 are off by a last bit more than the host's.
FLOOR = {
    torch.float32: 5e-7 if INTERPRETED else 1e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Callable[[], None]]:
    """Return a NaN-filled tensor between two guard bands, and a check that the bands are whole."""
    size = 1
    for n in shape:
        size *= n
    room = torch.full((size + 2 * GUARD,), 7.0, dtype=dtype, device=DEVICE)
    inner = room[GUARD : GUARD + size]
    inner.fill_(float("nan"))

    def check() -> None:
        assert (room[:GUARD] == 7).all(), "the band before the output was written"
        assert (room[GUARD + size :] == 7).all(), "the band behind the output was written"

    return inner.view(shape), check


def rms(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


def assert_as_good_as_reference(
    got: Tensor, reference: Tensor, exact: Tensor, rounded_to: torch.dtype | None = None
) -> None:
    """Fail unless the RMS error of `got` is at most 3 x the one that `reference` makes.

    The floor is one rounding in the output's dtype, or in `rounded_to` where the op rounds on the
    way: a reference that happens to be exact must not make the kernel's last bit a failure.
    """
    assert got.isfinite().all(), "the output has elements that nothing wrote"
    allowed = 3 * rms(reference.double() - exact) + FLOOR[rounded_to or got.dtype] * rms(exact)
    error = rms(got.double() - exact)
    assert error <= allowed, f"RMS error {error:.3e} > {allowed:.3e}"
