"""The product of rows that are mostly zeros against the plain one in fp64."""

from __future__ import annotations

import pytest
import torch
from mrss_kernels import sparse_linear as ops
from oracle import DEVICE, assert_as_good_as_reference, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rows_with_zeros(rows, size_k, dtype, share):
    x = randn(rows, size_k, seed=rows, dtype=dtype).relu().square()
    kept = randn(rows, size_k, seed=2) > torch.tensor(share * 4 - 2, device=DEVICE)
    return (x * kept).to(dtype)


def compare(rows, size_k, size_r, dtype, share=0.8):
    x = rows_with_zeros(rows, size_k, dtype, share)
    weight = randn(size_k, size_r, seed=5, dtype=dtype, scale=size_k**-0.5)
    parts = ops.sparse_linear(x, weight)
    exact = x.double() @ weight.double()
    assert parts.dtype == torch.float32
    assert parts.shape[1:] == (rows, size_r)
    assert_as_good_as_reference(parts.sum(0), x.float() @ weight.float(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_equals_the_dense_product(rows, dtype):
    compare(rows, 320, 192, dtype)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_any_share_of_zeros(share):
    compare(2, 256, 128, torch.float16, share)


def test_a_long_row_is_cut_into_parts():
    x, weight = randn(2, 2048, seed=1).relu(), randn(2048, 64, seed=2)
    assert ops.sparse_linear(x, weight).shape == (2, 2, 64)
    compare(2, 2048, 64, torch.float32)


def test_a_row_of_zeros_gives_zeros_whatever_the_weight_holds():
    x = torch.zeros(2, 128, device=DEVICE)
    x[0, 5] = 1.0
    weight = randn(128, 64, seed=1)
    weight[7] = float("nan")
    y = ops.sparse_linear(x, weight).sum(0)
    assert torch.equal(y[0], weight[5])
    assert (y[1] == 0).all()


def test_a_row_has_the_same_bits_beside_any_other():
    x = rows_with_zeros(5, 640, torch.float16, 0.8)
    weight = randn(640, 128, seed=3, dtype=torch.float16)
    together = ops.sparse_linear(x, weight)
    for i in range(5):
        assert torch.equal(ops.sparse_linear(x[i : i + 1], weight)[:, 0], together[:, i])


def test_wrong_arguments_are_named():
    x, weight = randn(1, 128, seed=1), randn(128, 64, seed=2)
    with pytest.raises(ValueError, match=r"weight must have shape \[64, 64\]"):
        ops.sparse_linear(x[:, :64].contiguous(), weight)
    with pytest.raises(ValueError, match="multiples of 64, got 96 and 64"):
        ops.sparse_linear(x[:, :96].contiguous(), weight[:96])
    with pytest.raises(
        ValueError, match=r"weight must have dtype torch.float32, got torch.float16"
    ):
        ops.sparse_linear(x, weight.half())
