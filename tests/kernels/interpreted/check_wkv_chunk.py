"""The blocked recurrence of RWKV-7 against `reference.py` in fp64, in every form it has."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import triton.language as tl
from mrss_kernels import reference, wkv7, wkv7_chunk
from mrss_kernels.blocked import BLOCK_LEN, Form
from mrss_kernels.wkv7_chunk import choose_form
from oracle import DEVICE, FLOOR, INTERPRETED, assert_as_good_as_reference, guarded, randn
from torch import Tensor

SLOTS = 9
BOUND = -0.6065306597126334
FORMS = {
    "fp32": Form("fp32", 16, 1, 2),
    "bf16x3": Form("bf16x3", 16, 1, 3),
    "fp16": Form("fp16", 16, 1, 3),
}
# What a precision's products cost, next to the fp32 arithmetic of the reference.
COSTS = {"fp32": torch.float32, "bf16x3": torch.float16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def _dot_of_bfloat16(monkeypatch) -> None:
    """Give the interpreter the product of bf16 tensors, whose bits it would multiply."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    plain = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: plain(self, widen(a), widen(b), *rest),
    )


def vectors(tokens: int, dtype: torch.dtype, *, heads: int = 2, size: int = 32) -> list[Tensor]:
    """Return r, w, k, v, kk, a; w is fp32 like the model's."""
    r, w, k, v, kk, a = (randn(tokens, heads, size, seed=3 + i) for i in range(6))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    w = BOUND * w.sigmoid()
    return [r.to(dtype), w, *(x.to(dtype) for x in (k, v, kk, a.sigmoid()))]


def guarded_pool(dtype: torch.dtype, *, heads: int = 2, size: int = 32):
    pool, check = guarded(SLOTS, heads, size, size, dtype=dtype)
    return pool.copy_(randn(SLOTS, heads, size, size, seed=77)), check


def compare(inputs, lengths, form, *, pool_dtype=torch.float32, on_host=True, padding=0) -> None:
    """Compare y and the pool with the reference; `padding` sequences stand between the others."""
    heads, size = inputs[0].shape[1:]
    pool, check = guarded_pool(pool_dtype, heads=heads, size=size)
    before, same_dtype, exact = pool.clone(), pool.clone(), pool.double()
    slots = [7, 2, 5, 0, 8][: len(lengths)]
    offsets = [0, *itertools.accumulate(lengths)]
    ids = torch.tensor(slots, device=DEVICE)
    precise = [x.double() for x in inputs]
    y_exact = reference.wkv7_prefill(*precise, exact, ids, offsets)
    y_same = reference.wkv7_prefill(*inputs, same_dtype, ids, offsets)
    if padding:
        ids = torch.cat((ids[:1], ids.new_full((padding,), -1), ids[1:]))
        offsets = [*offsets[:1], *[offsets[1]] * (padding + 1), *offsets[2:]]
    given = offsets if on_host else torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    y = wkv7_chunk.wkv7_prefill(*inputs, pool, ids, given, form=form)
    check()
    cost = COSTS[form.precision] if form else torch.float32
    assert y.dtype == torch.float32
    assert_as_good_as_reference(y, y_same, y_exact, cost)
    assert_as_good_as_reference(pool, same_dtype, exact, max(cost, pool_dtype, key=FLOOR.get))
    others = [s for s in range(SLOTS) if s not in slots]
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize("lengths", [[1], [2], [15], [16], [17], [63], [100], [1, 33, 2, 17, 48]])
@pytest.mark.slow
def test_lengths_equal_reference(lengths) -> None:
    compare(vectors(sum(lengths), torch.float32), lengths, FORMS["fp32"])


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("precision", ["bf16x3", "fp16"])
def test_half_precision_equals_reference(precision, pool_dtype) -> None:
    compare(
        vectors(36, torch.float16, heads=1), [17, 1, 18], FORMS[precision], pool_dtype=pool_dtype
    )


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("few", [True, False])
def test_every_chosen_form_equals_reference(few, dtype, size) -> None:
    form = choose_form(2 if few else 1000, size, dtype)
    compare(vectors(18, dtype, heads=1, size=size), [18], form, on_host=not few)


@pytest.mark.parametrize("form", [FORMS["fp32"], FORMS["fp16"]], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", ["fastest decay", "no decay", "one key", "orthogonal keys"])
def test_extremes_equal_reference(case, form) -> None:
    r, w, k, v, kk, a = vectors(33, torch.float32, heads=1)
    w = torch.full_like(w, BOUND if case == "fastest decay" else 0)
    if case == "one key":
        kk, a = kk[:1].expand_as(kk).contiguous(), torch.ones_like(a)
    if case == "orthogonal keys":
        kk, a = torch.eye(32, device=DEVICE).repeat(2, 1)[:33, None], 0 * a
    compare([r, w, k, v, kk, a], [33], form)


@pytest.mark.parametrize(
    "form", [FORMS["fp32"], FORMS["bf16x3"], None], ids=["fp32", "bf16x3", "loop"]
)
def test_padding_and_empty_sequences_touch_nothing(form) -> None:
    inputs = vectors(36, torch.float32, heads=1, size=128 if form is None else 32)
    compare(inputs, [18, 1, 17], form, on_host=False, padding=2)
    size = inputs[0].shape[-1]
    pool, _ = guarded_pool(torch.float32, heads=1, size=size)
    before = pool.clone()
    ids = torch.tensor([3, -1, 4, 1], device=DEVICE)
    offsets = torch.tensor([0, 0, 20, 20, 33], device=DEVICE)
    y = wkv7_chunk.wkv7_prefill(*inputs, pool, ids, offsets, form=form)
    assert y[:20].isnan().all()
    assert y[20:33].isfinite().all()
    assert y[33:].isnan().all()
    changed = (pool != before).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == [1]


@pytest.mark.parametrize("form", FORMS.values())
def test_parts_of_whole_blocks_and_company_give_the_same_bits(form) -> None:
    inputs = vectors(54, torch.float16, heads=1)
    pool, _ = guarded_pool(torch.float32, heads=1)
    packed, parts = pool.clone(), pool.clone()
    ids = torch.tensor([6, 4, 3], device=DEVICE)
    y = wkv7_chunk.wkv7_prefill(*inputs, packed, ids, [0, 2, 51, 54], form=form)
    ys = [
        wkv7_chunk.wkv7_prefill(*(x[a:b] for x in inputs), parts, ids[1:2], [0, b - a], form=form)
        for a, b in itertools.pairwise([2, 2 + BLOCK_LEN, 51])
    ]
    assert torch.equal(torch.cat(ys), y[2:51])
    assert torch.equal(parts[4], packed[4])


def test_y_takes_the_dtype_that_is_asked_for() -> None:
    inputs = vectors(20, torch.float16)
    pool, _ = guarded_pool(torch.float32)
    again, ids = pool.clone(), torch.tensor([1], device=DEVICE)
    y = wkv7_chunk.wkv7_prefill(*inputs, pool, ids, [0, 20])
    half = wkv7_chunk.wkv7_prefill(*inputs, again, ids, [0, 20], out_dtype=torch.float16)
    assert torch.equal(half, y.half())


def test_no_tokens_are_no_work() -> None:
    pool, _ = guarded_pool(torch.float32)
    before = pool.clone()
    ids = torch.tensor([1, 2], device=DEVICE)
    offsets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    y = wkv7_chunk.wkv7_prefill(*vectors(0, torch.float16), pool, ids, offsets)
    assert y.shape == (0, 2, 32)
    assert torch.equal(pool, before)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 5, 6], "cu_seqlens must grow from 0 to 4 with 3 entries"),
        (torch.tensor([0, 4]), r"cu_seqlens must have shape \[3\], got \[2\]"),
        (torch.tensor([0.0, 2, 4]), "cu_seqlens must have dtype torch.int64, torch.int32"),
        (torch.tensor([0, 9, 2, 9, 4])[::2], "cu_seqlens must be contiguous"),
    ],
)
def test_wrong_offsets_are_a_value_error(offsets, message) -> None:
    if isinstance(offsets, Tensor) and offsets.is_contiguous():
        offsets = offsets.to(DEVICE)
    pool, _ = guarded_pool(torch.float32)
    ids = torch.tensor([1, 2], device=DEVICE)
    with pytest.raises(ValueError, match=message):
        wkv7_chunk.wkv7_prefill(*vectors(4, torch.float32), pool, ids, offsets)


def test_the_loop_over_tokens_skips_padding() -> None:
    inputs = vectors(7, torch.float32)
    pool, check = guarded_pool(torch.float32)
    before, exact = pool.clone(), pool.double()
    ids = torch.tensor([-1, 3, 5], device=DEVICE)
    offsets = torch.tensor([0, 2, 6, 6], device=DEVICE)
    y = wkv7.wkv7_prefill(*inputs, pool, ids, offsets)
    y_exact = reference.wkv7_prefill(*(x.double() for x in inputs), exact, ids, offsets)
    check()
    torch.testing.assert_close(y[2:6].double(), y_exact[2:6], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(pool[[0, 1, 2, 4, 5, 6, 7, 8]], before[[0, 1, 2, 4, 5, 6, 7, 8]])
