"""The recurrence kernels of RWKV-6 and RWKV-7 against `reference.py` in fp64."""

from __future__ import annotations

import pytest
import torch
from mrss_kernels import reference, wkv6, wkv7
from oracle import DEVICE, assert_as_good_as_reference, guarded, randn
from torch import Tensor

HEADS, SIZE, SLOTS = 2, 32, 11
DTYPES = [torch.float32, torch.float16]
POOL_DTYPES = [torch.float32, torch.float16]
DECODE = {
    7: (wkv7.wkv7_decode, reference.wkv7_decode),
    6: (wkv6.wkv6_decode, reference.wkv6_decode),
}
PREFILL = {
    7: (wkv7.wkv7_prefill, reference.wkv7_prefill),
    6: (wkv6.wkv6_prefill, reference.wkv6_prefill),
}


def vectors(version: int, count: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Return r, w, k, v and then kk, a (RWKV-7) or u (RWKV-6); w is fp32 like the model's."""
    draw = [randn(count, HEADS, SIZE, seed=seed + i) for i in range(6)]
    r, k, v = (x.to(dtype) for x in draw[:3])
    if version == 6:
        return [r, -draw[3].exp(), k, v, randn(HEADS, SIZE, seed=seed + 9)]
    w = -0.6065306597126334 * draw[3].sigmoid()
    kk = torch.nn.functional.normalize(draw[4], dim=-1).to(dtype)
    return [r, w, k, v, kk, draw[5].sigmoid().to(dtype)]


def guarded_pool(dtype: torch.dtype, seed: int):
    pool, check = guarded(SLOTS, HEADS, SIZE, SIZE, dtype=dtype)
    return pool.copy_(randn(SLOTS, HEADS, SIZE, SIZE, seed=seed)), check


def compare(version, ops, dtype, pool_dtype, count, slots, *rest) -> None:
    kernel, plain = ops[version]
    inputs = vectors(version, count, dtype, seed=3)
    pool, check = guarded_pool(pool_dtype, seed=77)
    before, same_dtype, exact = pool.clone(), pool.clone(), pool.double()
    ids = torch.tensor(slots, device=DEVICE)
    y = kernel(*inputs, pool, ids, *rest)
    y_same = plain(*inputs, same_dtype, ids, *rest)
    y_exact = plain(*(x.double() for x in inputs), exact, ids, *rest)
    check()
    assert y.dtype == torch.float32
    assert_as_good_as_reference(y, y_same, y_exact)
    assert_as_good_as_reference(pool, same_dtype, exact)
    others = [s for s in range(SLOTS) if s not in slots]
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize("pool_dtype", POOL_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [[4], [9, 2, 7], [8, -1, 0, -1, 3]])
@pytest.mark.parametrize("version", [6, 7])
def test_decode_equals_reference(version, slots, dtype, pool_dtype) -> None:
    compare(version, DECODE, dtype, pool_dtype, len(slots), slots)


@pytest.mark.parametrize("version", [6, 7])
def test_decode_takes_bfloat16(version) -> None:
    compare(version, DECODE, torch.bfloat16, torch.float32, 3, [5, 1, 10])


@pytest.mark.parametrize("pool_dtype", POOL_DTYPES)
@pytest.mark.parametrize("seq_len", [1, 2, 15, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("version", [6, 7])
def test_prefill_equals_reference(version, seq_len, pool_dtype) -> None:
    compare(version, PREFILL, torch.float32, pool_dtype, seq_len, [6], [0, seq_len])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("version", [6, 7])
def test_prefill_of_unequal_lengths_equals_reference(version, dtype) -> None:
    compare(version, PREFILL, dtype, torch.float32, 18, [8, 0, 5], [0, 1, 16, 18])


@pytest.mark.parametrize("version", [6, 7])
def test_a_padding_row_gives_zeros(version) -> None:
    inputs = vectors(version, 2, torch.float32, seed=3)
    pool, _ = guarded_pool(torch.float32, seed=5)
    y = DECODE[version][0](*inputs, pool, torch.tensor([-1, 2], device=DEVICE))
    assert not y[0].any()
    assert y[1].any()


@pytest.mark.parametrize("version", [6, 7])
def test_token_by_token_equals_prefill(version) -> None:
    inputs = vectors(version, 5, torch.float32, seed=3)
    u = inputs[4:] if version == 6 else []
    inputs = inputs[:4] if version == 6 else inputs
    pool, _ = guarded_pool(torch.float32, seed=5)
    stepped, slots = pool.clone(), torch.tensor([3], device=DEVICE)
    y = PREFILL[version][0](*inputs, *u, pool, slots, [0, 5])
    steps = [
        DECODE[version][0](*(x[t : t + 1] for x in inputs), *u, stepped, slots)[0] for t in range(5)
    ]
    torch.testing.assert_close(y, torch.stack(steps), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool, stepped, rtol=1e-5, atol=1e-5)


def test_no_rows_is_no_work() -> None:
    pool, _ = guarded_pool(torch.float32, seed=5)
    before = pool.clone()
    inputs = vectors(7, 0, torch.float32, seed=3)
    y = wkv7.wkv7_decode(*inputs, pool, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert y.shape == (0, HEADS, SIZE)
    assert torch.equal(pool, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": lambda x: x[:1]}, r"k must have shape \[3, 2, 32\], got \[1, 2, 32\]"),
        ({"w": lambda x: x.double()}, "w must have dtype .*, got torch.float64"),
        ({"a": lambda x: x.mT.contiguous().mT}, "a must be contiguous, got strides"),
        ({"slots": lambda x: x.int()}, "slots must have dtype torch.int64, got torch.int32"),
        ({"slots": lambda x: x[:2]}, r"slots must have shape \[3\], got \[2\]"),
        ({"pool": lambda x: x.double()}, "pool must have dtype .*, got torch.float64"),
        ({"pool": lambda x: x[:, :1]}, r"pool must have shape \[11, 2, 32, 32\]"),
    ],
)
def test_a_wrong_argument_is_a_value_error(change, message) -> None:
    names = ["r", "w", "k", "v", "kk", "a"]
    args = dict(zip(names, vectors(7, 3, torch.float32, seed=1), strict=True))
    args["pool"], _ = guarded_pool(torch.float32, seed=5)
    args["slots"] = torch.tensor([1, 2, 3], device=DEVICE)
    for name, make in change.items():
        args[name] = make(args[name])
    with pytest.raises(ValueError, match=message):
        wkv7.wkv7_decode(**args)


def test_an_odd_head_size_is_a_value_error() -> None:
    x = randn(1, 2, 48, seed=1)
    pool = randn(2, 2, 48, 48, seed=2)
    with pytest.raises(ValueError, match="head size must be a power of two"):
        wkv7.wkv7_decode(x, x, x, x, x, x, pool, torch.tensor([0], device=DEVICE))
