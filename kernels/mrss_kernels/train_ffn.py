# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""`max(x, 0)^2` between the products of an FFN, with its gradient. Oracle: plain torch.

Where the number of elements is a multiple of 16, as an FFN's is, 16 bytes are read at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import (
    FLOATS,
    expect_contiguous,
    expect_device,
    expect_dtype,
    expect_shape,
)

BLOCK = 2048
"""Elements a program."""


@triton.jit
def train_square_relu_kernel(p_x, p_out, total, BLOCK: tl.constexpr):
    """Grid (total / BLOCK)."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < total
    x = tl.maximum(tl.load(p_x + o, mask=m, other=0.0).to(tl.float32), 0.0)
    tl.store(p_out + o, (x * x).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def train_square_relu_grad_kernel(p_x, p_grad, p_dx, total, BLOCK: tl.constexpr):
    """Grid (total / BLOCK)."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < total
    x = tl.maximum(tl.load(p_x + o, mask=m, other=0.0).to(tl.float32), 0.0)
    grad = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_dx + o, (2.0 * x * grad).to(p_dx.dtype.element_ty), mask=m)


def square_relu(x: Tensor) -> Tensor:
    """Return `max(x, 0)^2` of a contiguous tensor.

    Raises:
        ValueError: a dtype, stride or device that the kernel cannot take.
    """
    _check("x", x, x)
    out = torch.empty_like(x)
    if x.numel():
        train_square_relu_kernel[(-(-x.numel() // BLOCK),)](x, out, x.numel(), BLOCK=BLOCK)
    return out


def square_relu_grad(x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of x, given that of `square_relu(x)`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    _check("x", x, x)
    _check("grad", grad, x)
    dx = torch.empty_like(x)
    if x.numel():
        train_square_relu_grad_kernel[(-(-x.numel() // BLOCK),)](
            x, grad, dx, x.numel(), BLOCK=BLOCK
        )
    return dx


def _check(name: str, tensor: Tensor, like: Tensor) -> None:
    expect_shape(name, tensor, like.shape)
    expect_dtype(name, tensor, FLOATS)
    expect_contiguous(name, tensor)
    expect_device(name, tensor, like.device)
