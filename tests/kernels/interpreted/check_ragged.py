"""The ragged kernels of RWKV-7 against their plain torch forms in fp64."""

from __future__ import annotations

import pytest
import torch
from check_fused import CHANNELS, DOT_DTYPES, DTYPES, HEADS, SIZE, doubles, guard_outputs
from mrss_kernels import lora_down7, ragged_index, ragged_norm, time_inputs7, time_output7
from mrss_kernels import reference_ragged as plain
from mrss_kernels.ragged_lora7 import TimeCut
from oracle import DEVICE, assert_as_good_as_reference, guarded, randn

__all__ = ["guard_outputs"]

SLOTS = 9
RANKS = {0: (64, 64, 128, 0), 1: (128, 64, 192, 64)}
# Lengths and slots: one token, two, many, a padding sequence, an empty one, a block's end.
BATCHES = {
    "one token": ([1], [4]),
    "decoding rows": ([1, 1, 1], [4, 0, 7]),
    "a prompt": ([17], [2]),
    "mixed": ([1, 2, 13, 1, 5], [4, 0, 7, 8, 2]),
    "padded": ([1, 9, 0, 4, 0, 3], [4, 0, -1, 2, -1, -1]),
}


def batch(name, dtype=torch.int64):
    """Return offsets, slots and T of a batch."""
    lengths, slots = BATCHES[name]
    bounds = torch.tensor([0, *lengths], dtype=dtype, device=DEVICE).cumsum(0).to(dtype)
    return bounds, torch.tensor(slots, device=DEVICE), sum(lengths)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", BATCHES)
def test_the_index_says_where_each_token_stands(name, dtype):
    bounds, slots, num_tokens = batch(name, dtype)
    got = ragged_index.ragged_index(bounds, slots, num_tokens)
    assert torch.equal(got, plain.ragged_index(bounds, slots, num_tokens))


@pytest.mark.parametrize("name", BATCHES)
def test_the_tail_is_each_sequences_last_two_tokens(name):
    bounds, slots, _ = batch(name)
    for got, expected in zip(
        ragged_index.ragged_tail(bounds, slots), plain.ragged_tail(bounds, slots), strict=True
    ):
        assert torch.equal(got, expected)


def test_many_sequences_are_found_across_blocks():
    lengths = torch.arange(70, device=DEVICE) % 4
    bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    slots = torch.randperm(70).to(DEVICE)
    got = ragged_index.ragged_index(bounds, slots, int(bounds[-1]))
    assert torch.equal(got, plain.ragged_index(bounds, slots, int(bounds[-1])))


def compare_norm(
    name,
    num_parts,
    num_mixes,
    dtype,
    embed=False,
    channels=CHANNELS,
    block_t=None,
    pool_dtype=None,
    gated=False,
):
    bounds, slots, num_tokens = batch(name)
    index = plain.ragged_index(bounds, slots, num_tokens)
    tokens = torch.arange(num_tokens, device=DEVICE) * 3 % 11 if embed else None
    x = randn(
        11 if embed else num_tokens, channels, seed=1, dtype=dtype if embed else torch.float32
    )
    parts = randn(num_parts, num_tokens, channels, seed=2) if num_parts else None
    weight, bias = randn(channels, seed=3, dtype=dtype), randn(channels, seed=4, dtype=dtype)
    mix = randn(num_mixes, channels, seed=5, dtype=dtype)
    shift, check = guarded(SLOTS, channels, dtype=pool_dtype or dtype)
    shift.copy_(randn(SLOTS, channels, seed=6))
    old, same_shift, exact_shift = shift.clone(), shift.clone(), shift.double()
    before = old[slots]
    norm0 = (randn(channels, seed=7), randn(channels, seed=8)) if embed else None
    args = (x, parts, weight, bias, before)
    options = {"tokens": tokens, "norm0": norm0}
    same_h = exact_h = h = None
    if gated:
        gate = randn(num_tokens, channels, seed=9, dtype=dtype, scale=2)
        options |= {"gate": gate, "scale": 1 / 64, "first_scale": 0.125}
        h, check_h = guarded(num_tokens, channels, dtype=torch.float32)
        same_h, exact_h = h.clone(), h.double()
    total, out = ragged_norm.ragged_norm_mix(
        *args, shift, index, mix, dtype=dtype, block_t=block_t, h=h, **options
    )
    same = plain.ragged_norm_mix(*args, same_shift, index, mix, h=same_h, **options)
    exact = plain.ragged_norm_mix(
        *doubles(*args), exact_shift, index, mix.double(), h=exact_h, **options
    )
    check()
    if gated:
        check_h()
        assert_as_good_as_reference(h, same_h, exact_h)
    assert total.dtype == torch.float32
    assert out.dtype == dtype
    assert_as_good_as_reference(total, same[0], exact[0])
    assert_as_good_as_reference(out, same[1].to(dtype), exact[1])
    assert_as_good_as_reference(shift, same_shift, exact_shift)
    untouched = [s for s in range(SLOTS) if s not in slots.tolist()]
    assert torch.equal(shift[untouched], old[untouched])


@pytest.mark.usefixtures("guard_outputs")
class TestNormMix:
    @pytest.mark.parametrize("name", BATCHES)
    @pytest.mark.parametrize("block_t", [1, 4])
    def test_equals_reference(self, name, block_t):
        compare_norm(name, 2, 6, torch.float32, block_t=block_t)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_half_precision_equals_reference(self, dtype):
        compare_norm("mixed", 1, 6, dtype, pool_dtype=torch.float32)

    @pytest.mark.parametrize("block_t", [1, 8])
    def test_the_first_layer_looks_up_its_tokens(self, block_t):
        compare_norm("mixed", 0, 6, torch.float16, embed=True, block_t=block_t)

    @pytest.mark.parametrize(("dtype", "block_t"), [(torch.float32, 4), (torch.float16, 1)])
    def test_gated_parts_and_the_norm_itself_equal_reference(self, dtype, block_t):
        compare_norm("padded", 2, 2, dtype, block_t=block_t, gated=True)

    def test_a_row_is_cut_into_slices(self):
        compare_norm("mixed", 1, 1, torch.float32, channels=832)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_last_tokens_equal_reference(self, dtype):
        bounds, _, num_tokens = batch("mixed")
        x, parts = randn(num_tokens, CHANNELS, seed=1), randn(2, num_tokens, CHANNELS, seed=2)
        weight, bias = randn(CHANNELS, seed=3, dtype=dtype), randn(CHANNELS, seed=4, dtype=dtype)
        gate = randn(num_tokens, CHANNELS, seed=5, dtype=dtype)
        for options in ({}, {"gate": gate, "scale": 0.5}):
            args = (x, parts, weight, bias)
            out = ragged_norm.ragged_norm_last(*args, bounds, **options)
            same = plain.ragged_norm_last(*args, bounds, **options).to(dtype)
            exact = plain.ragged_norm_last(*doubles(*args), bounds, **options)
            assert_as_good_as_reference(out, same, exact)


def compare_down(num_tokens, layer, dtype, channels=CHANNELS):
    ranks = RANKS[layer]
    mixed = randn(6, num_tokens, channels, seed=1, dtype=dtype)
    down = randn(sum(ranks), channels, seed=2, dtype=dtype, scale=channels**-0.5)
    out = lora_down7.lora_down7(mixed, down, ranks)
    same = plain.lora_down7(mixed, down, ranks).to(dtype)
    exact = plain.lora_down7(*doubles(mixed, down), ranks)
    assert_as_good_as_reference(out, same, exact)


def compare_inputs(num_tokens, layer, dtype, parts=1, stacked=True, cut=None):
    ranks = RANKS[layer]
    up = randn(CHANNELS, sum(ranks), seed=2, dtype=dtype, scale=0.1)
    vectors = randn(8, CHANNELS, seed=3)
    v_first = randn(num_tokens, CHANNELS, seed=6, dtype=dtype) if layer else None
    low = None
    if stacked:
        projected = randn(3, num_tokens, CHANNELS, seed=8, dtype=dtype)
        low = (randn(num_tokens, sum(ranks), seed=9).sigmoid() * 0.9 + 0.05).to(dtype)
    else:
        projected = randn(parts, num_tokens, 3 * CHANNELS + sum(ranks), seed=1)
    args = (projected, up, vectors, ranks, v_first)
    same = plain.time_inputs7(*args, SIZE, low=low)
    exact = plain.time_inputs7(*doubles(*args), SIZE, low=doubles(low)[0])
    got = time_inputs7.time_inputs7(*args, SIZE, low=low, cut=cut)
    assert got.w.dtype == got.bonus.dtype == torch.float32
    for name, *trio in zip(got._fields, got, same, exact, strict=True):
        # Tensor cores take the first halves in the weights' dtype.
        rounded_to = dtype if name in ("w", "bonus") else None
        assert name in ("w", "bonus") or trio[0].dtype == dtype
        assert_as_good_as_reference(
            trio[0], trio[1].to(trio[0].dtype), trio[2], rounded_to=rounded_to
        )


def compare_output(
    name, layer, dtype, parts=1, activated=True, offset=False, cut=None, y_dtype=torch.float32
):
    bounds, slots, num_tokens = batch(name)
    index = plain.ragged_index(bounds, slots, num_tokens)
    ranks = RANKS[layer]
    up = randn(CHANNELS, sum(ranks), seed=2, dtype=dtype, scale=0.1)
    vectors = randn(8, CHANNELS, seed=3)
    y = randn(num_tokens, CHANNELS, seed=4, dtype=y_dtype)
    y[index[2] < 0] = float("nan")
    v = randn(num_tokens, CHANNELS, seed=5, dtype=dtype)
    bonus = randn(num_tokens, HEADS, seed=6)
    low = randn(parts, num_tokens, 64 + sum(ranks), seed=7)
    low = low.sigmoid().to(dtype)[..., 64:] if activated else low[..., 64:]
    time_offset = randn(SLOTS, CHANNELS, seed=8) if offset else None
    inputs = time_inputs7.TimeInputs(v, v, v, v, v, v, bonus)
    rest = (up, vectors, ranks, index, time_offset)
    out = time_output7.time_output7(y, inputs, low, *rest, activated=activated, cut=cut)
    args = (y.nan_to_num(0), v, bonus, low, *rest)
    same = plain.time_output7(*args, activated=activated).to(dtype)
    exact = plain.time_output7(*doubles(*args), activated=activated)
    assert_as_good_as_reference(out, same, exact)


@pytest.mark.usefixtures("guard_outputs")
class TestTimeMix:
    @pytest.mark.parametrize("dtype", DOT_DTYPES)
    @pytest.mark.parametrize("layer", [0, 1])
    def test_first_halves_equal_reference(self, layer, dtype):
        compare_down(37, layer, dtype)

    @pytest.mark.parametrize("num_tokens", [513, 2049])
    def test_first_halves_of_many_tokens_equal_reference(self, num_tokens):
        compare_down(num_tokens, 1, torch.float16, channels=64)

    @pytest.mark.parametrize("dtype", DOT_DTYPES)
    @pytest.mark.parametrize("layer", [0, 1])
    def test_inputs_equal_reference(self, layer, dtype):
        compare_inputs(21, layer, dtype)

    @pytest.mark.parametrize("dtype", DOT_DTYPES)
    @pytest.mark.parametrize("layer", [0, 1])
    def test_inputs_from_parts_equal_reference(self, layer, dtype):
        compare_inputs(5, layer, dtype, parts=3, stacked=False)

    def test_inputs_of_many_tokens_equal_reference(self):
        compare_inputs(70, 1, torch.float16, cut=TimeCut(64, 8, 2))

    @pytest.mark.parametrize("name", ["one token", "mixed", "padded"])
    def test_outputs_equal_reference(self, name):
        compare_output(name, 1, torch.float32, offset=True)

    @pytest.mark.parametrize("dtype", DOT_DTYPES)
    def test_outputs_from_parts_equal_reference(self, dtype):
        cut = TimeCut(32, 4, 2)
        compare_output("mixed", 0, dtype, parts=2, activated=False, cut=cut)

    def test_outputs_of_a_rounded_recurrence_equal_reference(self):
        compare_output("padded", 1, torch.float16, y_dtype=torch.float16)


class TestWrongArguments:
    def test_offsets_of_the_host_are_checked(self):
        slots = torch.tensor([0, 1], device=DEVICE)
        assert ragged_index.upload_bounds([0, 1, 3], 3, slots).tolist() == [0, 1, 3]
        with pytest.raises(ValueError, match="cu_seqlens must grow from 0 to 3"):
            ragged_index.upload_bounds([0, 3, 3], 3, slots)

    def test_norm_mix_names_what_is_wrong(self):
        x, vector, mix = randn(3, 64, seed=1), randn(64, seed=2), randn(6, 64, seed=3)
        index = torch.zeros(3, 3, dtype=torch.int32, device=DEVICE)
        states = randn(4, 64, seed=3)
        with pytest.raises(ValueError, match=r"parts must have shape \[1, 3, 64\]"):
            ragged_norm.ragged_norm_mix(
                x, randn(1, 2, 64, seed=1), vector, vector, states, states, index, mix
            )
        with pytest.raises(ValueError, match="index must have dtype"):
            ragged_norm.ragged_norm_mix(x, None, vector, vector, states, states, index.long(), mix)
        with pytest.raises(ValueError, match=r"cu_seqlens must have shape \[3\], got \[2\]"):
            ragged_index.ragged_index(
                torch.tensor([0, 3], device=DEVICE), torch.tensor([0, 1], device=DEVICE), 3
            )

    def test_time_inputs_name_what_is_wrong(self):
        ranks = (64, 64, 64, 0)
        projected, up = randn(3, 2, 64, seed=1), randn(64, 192, seed=2)
        vectors, low = randn(8, 64, seed=3), randn(2, 192, seed=4)
        with pytest.raises(ValueError, match="ranks must be 4 multiples of 64"):
            time_inputs7.time_inputs7(projected, up, vectors, (96, 64, 32, 0), None, 64, low=low)
        with pytest.raises(ValueError, match="v_first must be given exactly where v has a LoRA"):
            time_inputs7.time_inputs7(projected, up, vectors, ranks, low, 64, low=low)
        with pytest.raises(ValueError, match=r"low must have shape \[2, 192\], got \[1, 192\]"):
            time_inputs7.time_inputs7(projected, up, vectors, ranks, None, 64, low=low[:1])

    def test_time_output_names_what_is_wrong(self):
        y, up, vectors = randn(2, 64, seed=1), randn(64, 192, seed=2), randn(8, 64, seed=3)
        inputs = time_inputs7.TimeInputs(y, y, y, y, y, y, randn(2, 1, seed=4))
        index = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
        low, ranks = randn(2, 2, 384, seed=5), (64, 64, 64, 0)
        with pytest.raises(ValueError, match=r"vectors must have shape \[8, 64\], got \[6, 64\]"):
            time_output7.time_output7(y, inputs, low[..., :192], up, vectors[:6], ranks, index)
        with pytest.raises(ValueError, match=r"a slice .* got strides \[768, 384, 2\]"):
            time_output7.time_output7(y, inputs, low[..., ::2], up, vectors, ranks, index)
