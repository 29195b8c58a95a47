"""The blocked recurrence of RWKV-6 against `reference.py` in fp64, in every form it has."""

from __future__ import annotations

import itertools

import pytest
import torch
from check_wkv_chunk import SLOTS, _dot_of_bfloat16, guarded_pool
from mrss_kernels import reference, wkv6_chunk
from mrss_kernels.blocked import BLOCK_LEN, Form
from mrss_kernels.wkv6_chunk import choose_form
from oracle import DEVICE, assert_as_good_as_reference, randn
from torch import Tensor

__all__ = ["_dot_of_bfloat16"]

SLOW = pytest.mark.slow
FORMS = {
    "fp32": Form("fp32", 16, 1, 2),
    "bf16x3": Form("bf16x3", 16, 1, 3),
    "fp16": Form("fp16", 16, 1, 3),
}
# What a precision's products cost, next to the fp32 arithmetic of the reference.
COSTS = {"fp32": torch.float32, "bf16x3": torch.float16, "fp16": torch.float16}


def vectors(tokens: int, dtype: torch.dtype, *, heads: int = 2, size: int = 32) -> list[Tensor]:
    """Return r, w, k, v, u; w and u are fp32 like the model's, w from -20 to -0.05."""
    r, w, k, v = (randn(tokens, heads, size, seed=3 + i) for i in range(4))
    half = [x.to(dtype) for x in (r, k, v)]
    return [half[0], -w.exp(), *half[1:], randn(heads, size, seed=9)]


def compare(inputs, lengths, form, *, pool_dtype=torch.float32, on_host=True, padding=0) -> None:
    """Compare y and the pool with the reference; `padding` sequences stand between the others."""
    heads, size = inputs[0].shape[1:]
    pool, check = guarded_pool(pool_dtype, heads=heads, size=size)
    before, same_dtype, exact = pool.clone(), pool.clone(), pool.double()
    slots = [7, 2, 5, 0, 8][: len(lengths)]
    offsets = [0, *itertools.accumulate(lengths)]
    ids = torch.tensor(slots, device=DEVICE)
    y_exact = reference.wkv6_prefill(*(x.double() for x in inputs), exact, ids, offsets)
    y_same = reference.wkv6_prefill(*inputs, same_dtype, ids, offsets)
    if padding:
        ids = torch.cat((ids[:1], ids.new_full((padding,), -1), ids[1:]))
        offsets = [*offsets[:1], *[offsets[1]] * (padding + 1), *offsets[2:]]
    given = offsets if on_host else torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    y = wkv6_chunk.wkv6_prefill(*inputs, pool, ids, given, form=form)
    check()
    cost = COSTS[form.precision] if form is not None else torch.float32
    assert y.dtype == torch.float32
    assert_as_good_as_reference(y, y_same, y_exact, rounded_to=cost)
    kept = torch.float16 if torch.float16 in (pool_dtype, cost) else torch.float32
    assert_as_good_as_reference(pool, same_dtype, exact, rounded_to=kept)
    others = [s for s in range(SLOTS) if s not in slots]
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize(
    ("form", "lengths"),
    [
        ("fp16", [17, 1, 2]),
        ("bf16x3", [18]),
        *(
            pytest.param(form, lengths, marks=SLOW)
            for form in FORMS
            for lengths in ([2], [15], [16], [17, 1, 33], [100])
        ),
    ],
)
def test_every_precision_equals_reference(form, lengths) -> None:
    dtype = torch.bfloat16 if form == "bf16x3" else getattr(torch, "float" + form[2:])
    compare(vectors(sum(lengths), dtype, heads=1), lengths, FORMS[form], on_host=False)


@SLOW
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_chosen_form_equals_reference(dtype, size, pool_dtype) -> None:
    inputs = vectors(19, dtype, heads=1, size=size)
    compare(inputs, [18, 1], choose_form(size, dtype), pool_dtype=pool_dtype)


@pytest.mark.parametrize(
    "form",
    [pytest.param(FORMS["fp32"], id="fp32"), pytest.param(FORMS["fp16"], id="fp16", marks=SLOW)],
)
@pytest.mark.parametrize("case", ["no decay", "everything forgotten", "now and then"])
def test_extreme_decays_equal_reference(case, form) -> None:
    r, w, k, v, u = vectors(17, torch.float32, heads=1)
    w = torch.full_like(w, {"no decay": 0, "everything forgotten": -torch.inf}.get(case, -0.01))
    if case == "now and then":
        # After sums of -3e4, what lies between later tokens is as exact as before.
        w[3::5] = -3e4
    compare([r, w, k, v, u], [17], form)


def test_states_beyond_half_precision_are_read() -> None:
    inputs = vectors(18, torch.float16, heads=1)
    pool, _ = guarded_pool(torch.float32, heads=1)
    pool *= 1e5
    exact, ids = pool.double(), torch.tensor([4], device=DEVICE)
    y_exact = reference.wkv6_prefill(*(x.double() for x in inputs), exact, ids, [0, 18])
    y = wkv6_chunk.wkv6_prefill(*inputs, pool, ids, [0, 18], form=FORMS["fp16"])
    assert_as_good_as_reference(y, y_exact, y_exact, rounded_to=torch.float16)


@pytest.mark.parametrize(
    "form", [pytest.param(FORMS["fp16"], id="blocks"), pytest.param(None, id="loop", marks=SLOW)]
)
def test_padding_and_empty_sequences_touch_nothing(form) -> None:
    inputs = vectors(36, torch.float32, heads=1, size=16)
    pool, _ = guarded_pool(torch.float32, heads=1, size=16)
    before = pool.clone()
    ids = torch.tensor([3, -1, 4, 1], device=DEVICE)
    offsets = torch.tensor([0, 0, 20, 20, 33], device=DEVICE)
    y = wkv6_chunk.wkv6_prefill(*inputs, pool, ids, offsets, form=form)
    assert y[:20].isnan().all()
    assert y[20:33].isfinite().all()
    assert y[33:].isnan().all()
    changed = (pool != before).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == [1]


@SLOW
@pytest.mark.parametrize("form", FORMS.values())
def test_parts_of_whole_blocks_and_company_give_the_same_bits(form) -> None:
    *inputs, u = vectors(54, torch.float16, heads=1)
    pool, _ = guarded_pool(torch.float32, heads=1)
    packed, parts = pool.clone(), pool.clone()
    ids = torch.tensor([6, 4, 3], device=DEVICE)
    y = wkv6_chunk.wkv6_prefill(*inputs, u, packed, ids, [0, 2, 51, 54], form=form)
    ys = [
        wkv6_chunk.wkv6_prefill(
            *(x[a:b] for x in inputs), u, parts, ids[1:2], [0, b - a], form=form
        )
        for a, b in itertools.pairwise([2, 2 + BLOCK_LEN, 51])
    ]
    assert torch.equal(torch.cat(ys), y[2:51])
    assert torch.equal(parts[4], packed[4])


@pytest.mark.parametrize("lengths", [[18, 1, 17], [1, 1, 1]])
@pytest.mark.parametrize("form", [FORMS["fp32"], None], ids=["blocks", "loop"])
@SLOW
def test_padding_between_sequences_changes_nothing(form, lengths) -> None:
    inputs = vectors(sum(lengths), torch.float32, heads=1, size=16)
    compare(inputs, lengths, form, on_host=False, padding=2)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=SLOW)])
def test_y_takes_the_dtype_and_scale_that_are_asked_for(dtype) -> None:
    inputs = vectors(18, dtype, heads=1, size=16)
    pool, _ = guarded_pool(torch.float32, heads=1, size=16)
    again, ids = pool.clone(), torch.tensor([1, 2], device=DEVICE)
    y = wkv6_chunk.wkv6_prefill(*inputs, pool, ids, [0, 17, 18])
    small = wkv6_chunk.wkv6_prefill(
        *inputs, again, ids, [0, 17, 18], out_dtype=torch.float16, y_scale=0.25
    )
    assert torch.equal(small, (y * 0.25).half())
    assert torch.equal(again, pool)


def test_a_wrong_bonus_is_a_value_error() -> None:
    *inputs, u = vectors(2, torch.float16)
    pool, _ = guarded_pool(torch.float32)
    ids = torch.tensor([1], device=DEVICE)
    with pytest.raises(ValueError, match=r"u must have shape \[2, 32\], got \[1, 32\]"):
        wkv6_chunk.wkv6_prefill(*inputs, u[:1], pool, ids, [0, 2])
