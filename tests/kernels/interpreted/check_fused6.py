"""The fused decode kernels of RWKV-6 against their plain torch forms in fp64."""

from __future__ import annotations

import pytest
import torch
from mrss_kernels import ffn6 as ffn_ops
from mrss_kernels import norm_mix6 as norm_ops
from mrss_kernels import reference_fused6 as plain
from mrss_kernels import time_mix6 as time_ops
from mrss_kernels.linear_cuts import LinearConfig
from oracle import DEVICE, INTERPRETED, assert_as_good_as_reference, guarded, randn

# The interpreter's dot works on raw bfloat16 bits, so bfloat16 dots are checked on a GPU only.
DOT_DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS, SIZE, SLOTS = 3, 64, 40
CHANNELS = HEADS * SIZE


@pytest.fixture(autouse=True)
def guard_outputs(monkeypatch):
    """Put every tensor that a wrapper allocates between guard bands."""
    checks = []
    plain_new_empty = torch.Tensor.new_empty

    def new_empty(self, shape, *, dtype=None, **other):
        # The interpreter itself allocates too, and names a device.
        if other:
            return plain_new_empty(self, shape, dtype=dtype, **other)
        out, check = guarded(*shape, dtype=dtype or self.dtype)
        checks.append(check)
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for check in checks:
        check()


def double(x):
    if isinstance(x, tuple):
        return tuple(map(double, x))
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def doubles(*args):
    return [double(x) for x in args]


def some_slots(rows):
    """Return shuffled slots, the fourth row's being padding."""
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(rows))[:rows]
    slots[3:4] = -1
    return slots.to(DEVICE)


def guarded_copy(source, dtype):
    out, check = guarded(*source.shape, dtype=dtype)
    return out.copy_(source), check


def norm_of(seed, dtype=torch.float32):
    return randn(CHANNELS, seed=seed, dtype=dtype), randn(CHANNELS, seed=seed + 1, dtype=dtype)


def compare_codes(rows, dtype, *, num_parts=0, gated=False, embed=False, fused=True, rank=24):
    slots, shift = some_slots(rows), randn(SLOTS, CHANNELS, seed=1)
    tokens = torch.arange(rows, device=DEVICE) * 5 % 11 if embed else None
    x = randn(11 if embed else rows, CHANNELS, seed=2, dtype=dtype if embed else torch.float32)
    parts = randn(num_parts, rows, CHANNELS, seed=3) if num_parts else None
    gate = randn(rows, CHANNELS, seed=4, scale=2) if gated else None
    down = randn(5 * rank, CHANNELS, seed=5, dtype=dtype, scale=0.1)
    mix = randn(CHANNELS, seed=6)
    args = (x, parts, gate, norm_of(7), shift, slots, mix, down)
    options = {"tokens": tokens, "norm0": norm_of(9) if embed else None, "scale": 1 / 64}
    before = shift.clone()
    total, h, codes = norm_ops.add_norm_codes(*args, **options, fuse_rows=rows if fused else 0)
    same = plain.add_norm_codes(*args, **options)
    exact = plain.add_norm_codes(*doubles(*args), **options | {"norm0": double(options["norm0"])})
    assert torch.equal(shift, before)
    assert total.dtype == h.dtype == torch.float32
    assert_as_good_as_reference(total, same[0], exact[0])
    assert_as_good_as_reference(h, same[1], exact[1])
    # Apart, the input of the product is rounded to the weight's dtype.
    summed = codes.float().sum(0, keepdim=True)
    assert_as_good_as_reference(summed, same[2], exact[2], None if fused else dtype)


class TestAddNormCodes:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_launch_equals_reference(self, dtype):
        compare_codes(1, dtype, num_parts=1, gated=True)

    @pytest.mark.parametrize("dtype", DOT_DTYPES)
    @pytest.mark.parametrize("rows", [5, 33])
    def test_two_launches_equal_reference(self, rows, dtype):
        compare_codes(rows, dtype, num_parts=3, gated=True, fused=False)

    @pytest.mark.slow
    def test_several_rows_in_one_launch_equal_reference(self):
        compare_codes(2, torch.float16, num_parts=2, gated=True)

    def test_more_codes_than_programs_equal_reference(self):
        compare_codes(1, torch.float16, num_parts=1, rank=40)

    def test_more_rows_than_the_skinny_product_takes_equal_reference(self):
        compare_codes(39, torch.float32, num_parts=1, gated=True, fused=False, rank=64)

    @pytest.mark.parametrize("fused", [pytest.param(True, marks=pytest.mark.slow), False])
    @pytest.mark.slow
    def test_the_first_layer_looks_up_its_tokens(self, fused):
        compare_codes(2, torch.float16, embed=True, fused=fused)


class TestAddNormMix:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 5])
    def test_equals_reference_and_keeps_the_shift_state(self, rows, dtype):
        slots = some_slots(rows)
        shift, check = guarded_copy(randn(SLOTS, CHANNELS, seed=1), torch.float32)
        x, parts = randn(rows, CHANNELS, seed=2), randn(3, rows, CHANNELS, seed=3)
        norm, mix = norm_of(4, dtype), randn(2, CHANNELS, seed=6)
        options = {"scale": 0.25, "key_scale": 0.125}
        same_shift, exact_shift = shift.clone(), shift.double()
        total, out = norm_ops.add_norm_mix(
            x, parts, norm, shift, slots, mix, dtype=dtype, **options
        )
        same = plain.add_norm_mix(x, parts, norm, same_shift, slots, mix, **options)
        args = doubles(x, parts, norm)
        exact = plain.add_norm_mix(*args, exact_shift, slots, mix.double(), **options)
        check()
        assert_as_good_as_reference(total, same[0], exact[0])
        assert_as_good_as_reference(out, same[1].to(dtype), exact[1])
        assert_as_good_as_reference(shift, same_shift, exact_shift)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_norm_alone_equals_reference(self, dtype):
        args = randn(3, CHANNELS, seed=1), randn(2, 3, CHANNELS, seed=2), randn(3, CHANNELS, seed=3)
        norm = norm_of(4, dtype)
        out = norm_ops.add_norm(*args, norm, scale=0.5, dtype=dtype)
        assert out.dtype == dtype
        same = plain.add_norm(*args, norm, scale=0.5).to(dtype)
        exact = plain.add_norm(*doubles(*args, norm), scale=0.5)
        assert_as_good_as_reference(out, same, exact)


class TestMixInputs:
    @pytest.mark.parametrize("dtype", DOT_DTYPES)
    @pytest.mark.parametrize(("rows", "rank", "parts"), [(1, 32, 1), (4, 24, 3), (19, 24, 3)])
    def test_equals_reference(self, rows, rank, parts, dtype):
        slots, shift = some_slots(rows), randn(SLOTS, CHANNELS, seed=1)
        h, codes = randn(rows, CHANNELS, seed=2), randn(parts, rows, 5 * rank, seed=3)
        up, mix = randn(5, CHANNELS, rank, seed=4, dtype=dtype), randn(5, CHANNELS, seed=5)
        args = (h, codes, up, mix, shift, slots)
        out = time_ops.mix_inputs(*args)
        assert out.dtype == dtype
        assert_as_good_as_reference(
            out, plain.mix_inputs(*args).to(dtype), plain.mix_inputs(*doubles(*args))
        )


def compare_time_mix(
    rows, dtype, *, pool_dtype=torch.float32, parts=1, offset=False, stacked=False, rank=40, heads=3
):
    channels = heads * SIZE
    slots = some_slots(rows)
    projected = randn(parts, rows, 4 * channels + 64, seed=1, dtype=dtype)
    up = randn(channels, rank, seed=2, dtype=dtype, scale=0.1)
    vectors, h = randn(4, channels, seed=3), randn(rows, channels, seed=4)
    pool, check = guarded_copy(randn(SLOTS, heads, SIZE, SIZE, seed=5), pool_dtype)
    shift, check_shift = guarded_copy(randn(SLOTS + 1, channels, seed=6), torch.float32)
    before = pool.clone(), shift.clone()
    same_kept, exact_kept = (shift.clone(), pool.clone()), (shift.double(), pool.double())
    time_offset = randn(SLOTS, channels, seed=7) if offset else None
    low = None
    if stacked:
        low = projected[..., 4 * channels :].contiguous()
        projected = randn(4, rows, channels, seed=8, dtype=dtype)
    options = {"out_scale": 0.25}
    y = time_ops.time_mix6(
        projected, up, vectors, h, shift, pool, slots, time_offset, low=low, **options
    )
    same = plain.time_mix6(
        projected, up, vectors, h, *same_kept, slots, time_offset, low=low, **options
    )
    args = doubles(projected, up, vectors, h)
    exact = plain.time_mix6(
        *args, *exact_kept, slots, double(time_offset), low=double(low), **options
    )
    check()
    check_shift()
    assert y.dtype == dtype
    assert_as_good_as_reference(y, same.to(dtype), exact)
    assert_as_good_as_reference(pool, same_kept[1], exact_kept[1])
    assert torch.equal(shift, same_kept[0])
    others = [s for s in range(SLOTS) if s not in slots.tolist()]
    assert torch.equal(pool[others], before[0][others])
    assert torch.equal(shift[others], before[1][others])


class TestTimeMix6:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_few_rows_equal_reference(self, dtype):
        compare_time_mix(3, dtype)

    def test_parts_and_offsets_equal_reference(self):
        compare_time_mix(5, torch.float32, parts=3, offset=True, rank=64)

    def test_stacked_projections_of_many_rows_equal_reference(self):
        compare_time_mix(33, torch.float16, stacked=True, heads=1)

    def test_a_half_precision_pool_equals_reference(self):
        compare_time_mix(2, torch.float32, pool_dtype=torch.float16)

    def test_a_decay_beyond_every_exponent_forgets_the_state(self):
        pool, slots = randn(2, 1, SIZE, SIZE, seed=1), torch.tensor([1], device=DEVICE)
        vectors = torch.full((4, SIZE), 20.0, device=DEVICE)
        projected = torch.ones(1, 1, 4 * SIZE + 64, device=DEVICE)
        up, h = randn(SIZE, 64, seed=2, scale=0.1), randn(1, SIZE, seed=3)
        time_ops.time_mix6(projected, up, vectors, h, randn(2, SIZE, seed=4), pool, slots)
        assert (pool[1] == 1).all()


def compare_key_receptance(rows, dtype, config=None, ffn_size=192, size_k=128):
    x = randn(2, rows, size_k, seed=rows, dtype=dtype)
    weight = randn(ffn_size + 128, size_k, seed=5, dtype=dtype, scale=size_k**-0.5)
    key, gate = ffn_ops.key_receptance(x, weight, ffn_size, config=config)
    assert (key.dtype, gate.dtype) == (dtype, torch.float32)
    same = plain.key_receptance(x, weight, ffn_size)
    exact = plain.key_receptance(x.double(), weight.double(), ffn_size)
    assert_as_good_as_reference(key, same[0].to(dtype), exact[0])
    assert_as_good_as_reference(gate, same[1], exact[1])


class TestKeyReceptance:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_row_equals_reference(self, dtype):
        compare_key_receptance(1, dtype, LinearConfig(8, 64, 1, 4))

    @pytest.mark.parametrize("dtype", DOT_DTYPES)
    @pytest.mark.parametrize("rows", [2, 17])
    def test_few_rows_equal_reference(self, rows, dtype):
        compare_key_receptance(rows, dtype, LinearConfig(32, 64, 1, 4, 2))

    @pytest.mark.parametrize("rows", [1, 5, 33])
    def test_the_chosen_cut_suits_every_size(self, rows):
        compare_key_receptance(rows, torch.float16, ffn_size=64, size_k=192)


class TestWrongArguments:
    def test_norms_name_what_is_wrong(self):
        x, vector, shift = randn(2, 64, seed=1), randn(64, seed=2), randn(4, 64, seed=3)
        slots, down = torch.tensor([0, 1], device=DEVICE), randn(80, 64, seed=4)
        norm, wrong = (vector, vector), (vector, vector[:32])
        with pytest.raises(ValueError, match=r"bias must have shape \[64\], got \[32\]"):
            norm_ops.add_norm_codes(x, None, None, wrong, shift, slots, vector, down)
        with pytest.raises(ValueError, match=r"down must have shape \[80, 64\]"):
            norm_ops.add_norm_codes(
                x, None, None, norm, shift, slots, vector, randn(80, 32, seed=4)
            )
        with pytest.raises(ValueError, match="gate must be None where parts are None"):
            norm_ops.add_norm(x, None, x, norm)
        with pytest.raises(ValueError, match=r"slots must have shape \[2\], got \[1\]"):
            norm_ops.add_norm_mix(x, None, norm, shift, slots[:1], randn(2, 64, seed=5))

    def test_time_mixing_names_what_is_wrong(self):
        h, shift, pool = randn(1, 64, seed=1), randn(2, 64, seed=2), randn(2, 1, 64, 64, seed=3)
        slots, vectors = torch.tensor([0], device=DEVICE), randn(4, 64, seed=4)
        projected, up = randn(1, 1, 4 * 64 + 64, seed=5), randn(64, 64, seed=6)
        with pytest.raises(ValueError, match=r"up must have shape \[64, 64\], got \[32, 64\]"):
            time_ops.time_mix6(projected, up[:32], vectors, h, shift, pool, slots)
        with pytest.raises(ValueError, match=r"projected must have shape \[1, 1, 336\]"):
            time_ops.time_mix6(projected, randn(64, 80, seed=6), vectors, h, shift, pool, slots)
        with pytest.raises(ValueError, match="vectors must have dtype"):
            time_ops.time_mix6(projected, up, vectors.half(), h, shift, pool, slots)
        codes, up5 = randn(1, 1, 80, seed=7), randn(5, 64, 32, seed=8)
        with pytest.raises(ValueError, match=r"codes must have shape \[1, 1, 160\]"):
            time_ops.mix_inputs(h, codes, up5, randn(5, 64, seed=9), shift, slots)

    def test_key_receptance_names_what_is_wrong(self):
        x, weight = randn(2, 1, 64, seed=1), randn(192, 64, seed=2)
        with pytest.raises(ValueError, match=r"x must have shape \[2, 1, 64\], got \[1, 1, 64\]"):
            ffn_ops.key_receptance(x[:1], weight, 128)
        with pytest.raises(ValueError, match="F must be a positive multiple of 64, got 100"):
            ffn_ops.key_receptance(x, weight, 100)
