"""The ragged kernels of RWKV-6 alone against their plain torch forms in fp64."""

from __future__ import annotations

import pytest
import torch
from check_fused6 import CHANNELS, DOT_DTYPES, SIZE, doubles, guard_outputs
from check_ragged import BATCHES, SLOTS, batch
from mrss_kernels import ragged_inputs6 as inputs_ops
from mrss_kernels import ragged_mix6
from mrss_kernels import reference_ragged as shared
from mrss_kernels import reference_ragged6 as plain
from mrss_kernels.ragged_inputs6 import MixCut
from oracle import assert_as_good_as_reference, randn

__all__ = ["guard_outputs"]

SLOW = pytest.mark.slow


def index_of(name):
    """Return a batch's index, its slots and T."""
    bounds, slots, num_tokens = batch(name)
    return shared.ragged_index(bounds, slots, num_tokens), slots, num_tokens


def compare_mixed(name, dtype, *, parts=1, rank=24, cut=None):
    index, slots, num_tokens = index_of(name)
    h, before = randn(num_tokens, CHANNELS, seed=1), randn(len(slots), CHANNELS, seed=2)
    codes = randn(parts, num_tokens, 5 * rank, seed=3)
    up, mix = randn(5, CHANNELS, rank, seed=4, dtype=dtype), randn(5, CHANNELS, seed=5)
    args = (h, codes, up, mix, before)
    out = inputs_ops.ragged_inputs6(*args, index, cut=cut)
    assert out.dtype == dtype
    same = plain.ragged_inputs6(*args, index).to(dtype)
    assert_as_good_as_reference(out, same, plain.ragged_inputs6(*doubles(*args), index))


def compare_inputs(num_tokens, dtype, *, parts=1, stacked=True, rank=40, cut=None):
    up = randn(CHANNELS, rank, seed=2, dtype=dtype, scale=0.1)
    vectors, low = randn(4, CHANNELS, seed=3), None
    if stacked:
        projected = randn(4, num_tokens, CHANNELS, seed=8, dtype=dtype)
        low = randn(num_tokens, 64, seed=9, dtype=dtype)
    else:
        projected = randn(parts, num_tokens, 4 * CHANNELS + 64, seed=1)
    args = (projected, up, vectors, SIZE)
    same = plain.time_inputs6(*args, low=low)
    exact = plain.time_inputs6(*doubles(*args), low=doubles(low)[0])
    got = ragged_mix6.time_inputs6(*args, low=low, cut=cut)
    assert got.w.dtype == torch.float32
    assert not stacked or got.gate.data_ptr() == projected[3].data_ptr()
    for name, *trio in zip(got._fields, got, same, exact, strict=True):
        # Tensor cores take the first half in the weights' dtype.
        rounded_to = dtype if name == "w" else None
        assert_as_good_as_reference(trio[0], trio[1].to(trio[0].dtype), trio[2], rounded_to)


def compare_output(name, dtype, *, y_dtype=torch.float32, offset=False, cut=None):
    index, _, num_tokens = index_of(name)
    vectors = randn(4, CHANNELS, seed=3)
    y = randn(num_tokens, CHANNELS, seed=4, dtype=y_dtype, scale=1 / 64)
    y[index[2] < 0] = float("nan")
    gate = randn(num_tokens, CHANNELS, seed=5, dtype=dtype)
    time_offset = randn(SLOTS, CHANNELS, seed=8) if offset else None
    rest = (gate, vectors, SIZE, index, time_offset)
    scales = {"y_scale": 1 / 64, "out_scale": 0.25}
    out = ragged_mix6.time_output6(y, *rest, **scales, cut=cut)
    assert out.dtype == dtype
    assert not out[index[2] < 0].any()
    args = (y.nan_to_num(0), *rest)
    same = plain.time_output6(*args, **scales).to(dtype)
    assert_as_good_as_reference(out, same, plain.time_output6(*doubles(*args), **scales))


class TestInputs:
    @pytest.mark.parametrize(
        "name", ["padded", *(pytest.param(x, marks=SLOW) for x in BATCHES if x != "padded")]
    )
    def test_five_inputs_equal_reference(self, name):
        compare_mixed(name, torch.float32, parts=2)

    @pytest.mark.parametrize("dtype", DOT_DTYPES)
    @pytest.mark.parametrize("rank", [8, 40])
    @SLOW
    def test_ranks_that_are_no_powers_of_two_equal_reference(self, rank, dtype):
        compare_mixed("mixed", dtype, rank=rank, cut=MixCut(64, 4))

    @pytest.mark.parametrize("dtype", DOT_DTYPES)
    def test_decay_beside_stacked_products_equals_reference(self, dtype):
        compare_inputs(21, dtype)

    @pytest.mark.parametrize("dtype", DOT_DTYPES)
    def test_products_in_parts_equal_reference(self, dtype):
        compare_inputs(19, dtype, parts=3, stacked=False)


class TestOutput:
    @pytest.mark.parametrize("name", [pytest.param("one token", marks=SLOW), "mixed", "padded"])
    def test_outputs_equal_reference(self, name):
        compare_output(name, torch.float32, offset=True)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_rounded_recurrence_equals_reference(self, dtype):
        compare_output("padded", dtype, y_dtype=torch.float16, cut=MixCut(32, 4))


class TestWrongArguments:
    def test_inputs_name_what_is_wrong(self):
        index, slots, num_tokens = index_of("decoding rows")
        h, before = randn(num_tokens, 64, seed=1), randn(len(slots), 64, seed=2)
        up, mix = randn(5, 64, 16, seed=3), randn(5, 64, seed=4)
        with pytest.raises(ValueError, match=r"codes must have shape \[1, 3, 80\]"):
            inputs_ops.ragged_inputs6(h, randn(1, 3, 64, seed=5), up, mix, before, index)
        codes = randn(1, 3, 80, seed=5)
        with pytest.raises(ValueError, match="index must have dtype"):
            inputs_ops.ragged_inputs6(h, codes, up, mix, before, index.long())

    def test_time_mixing_names_what_is_wrong(self):
        vectors, up = randn(4, 64, seed=1), randn(64, 40, seed=2)
        with pytest.raises(ValueError, match=r"projected must have shape \[1, 2, 296\]"):
            ragged_mix6.time_inputs6(randn(1, 2, 280, seed=3), up, vectors, 64)
        projected, low = randn(4, 2, 64, seed=3), randn(2, 32, seed=4)
        with pytest.raises(ValueError, match=r"low must have shape \[2, 40\], got \[2, 32\]"):
            ragged_mix6.time_inputs6(projected, up, vectors, 64, low=low)
        index, _, _ = index_of("decoding rows")
        y = randn(3, 64, seed=5)
        with pytest.raises(ValueError, match=r"gate must have shape \[3, 64\], got \[2, 64\]"):
            ragged_mix6.time_output6(y, y[:2], vectors, 64, index)
