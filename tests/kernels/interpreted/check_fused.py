"""The fused decode kernels of RWKV-7 against their plain torch forms in fp64."""

from __future__ import annotations

import pytest
import torch
from mrss_kernels import add_norm_mix as norm_ops
from mrss_kernels import reference_fused as plain
from mrss_kernels import rows_linear as linear_ops
from mrss_kernels import time_mix7 as time_ops
from mrss_kernels.linear_cuts import LinearConfig
from oracle import DEVICE, INTERPRETED, assert_as_good_as_reference, guarded, randn

# The interpreter's dot works on raw bfloat16 bits, so bfloat16 dots are checked on a GPU only.
DOT_DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS, SIZE, SLOTS = 3, 64, 9
CHANNELS = HEADS * SIZE


@pytest.fixture
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
    assert checks
    for check in checks:
        check()


def doubles(*tensors):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors
    ]


def compare_linear(rows, size_r, size_k, dtype, config, activation="none", grouped=False):
    groups = None
    num_inputs = 1
    if grouped:
        num_inputs = 3
        groups = torch.tensor([2, 0, 1, 1, 2][: size_r // 64], dtype=torch.int32, device=DEVICE)
    x = randn(num_inputs, rows, size_k, seed=rows, dtype=dtype)
    weight = randn(size_r, size_k, seed=5, dtype=dtype, scale=size_k**-0.5)
    out_dtype = dtype if activation == "relu2" else torch.float32
    parts = linear_ops.rows_linear(
        x, weight, groups, activation=activation, out_dtype=out_dtype, config=config
    )
    expected_parts = config.num_splits if config else parts.shape[0]
    assert parts.shape == (expected_parts, rows, size_r)
    exact = plain.rows_linear(x.double(), weight.double(), groups, activation=activation)
    same = plain.rows_linear(x, weight, groups, activation=activation).to(parts.dtype)
    assert_as_good_as_reference(
        parts if len(parts) == 1 else parts.sum(0, keepdim=True), same, exact
    )


@pytest.mark.usefixtures("guard_outputs")
class TestRowsLinear:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size_r", [64, 77])
    def test_one_row_equals_reference(self, size_r, dtype):
        compare_linear(1, size_r, 256, dtype, LinearConfig(8, 128, 1, 4))

    @pytest.mark.parametrize("dtype", DOT_DTYPES)
    @pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 63])
    def test_few_rows_equal_reference(self, rows, dtype):
        compare_linear(rows, 77, 256, dtype, LinearConfig(32, 64, 2, 4, 2))

    @pytest.mark.parametrize("rows", [2, 8, 9])
    def test_long_blocks_of_few_rows_equal_reference(self, rows):
        # Of 77 outputs the last program has fewer rows than it may ask into the L2.
        compare_linear(rows, 77, 1024, torch.float16, LinearConfig(32, 512, 1, 2, 3, 2, 512))
        compare_linear(rows, 64, 1024, torch.float16, LinearConfig(32, 512, 1, 2, 3, 4))

    @pytest.mark.parametrize("rows", [100, 257])
    def test_more_rows_than_a_block_equal_reference(self, rows):
        compare_linear(rows, 64, 64, torch.float16, LinearConfig(64, 64, 1, 4, 2))

    @pytest.mark.parametrize("rows", [1, 3])
    def test_groups_read_their_own_input(self, rows):
        compare_linear(rows, 320, 128, torch.float32, None, grouped=True)

    @pytest.mark.parametrize("rows", [1, 5])
    def test_squared_relu_equals_reference(self, rows):
        compare_linear(rows, 96, 192, torch.float16, None, activation="relu2")

    @pytest.mark.parametrize("rows", [1, 3])
    def test_parts_add_up_to_the_product(self, rows):
        stages = 1 if rows == 1 else 2
        compare_linear(rows, 64, 512, torch.float32, LinearConfig(32, 64, 4, 4, stages))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_squared_relu_in_place_equals_reference(self, dtype):
        x = linear_ops.rows_linear(randn(1, 3, 64, seed=1), randn(77, 64, seed=2)).to(dtype)
        exact = x.double().relu().square()
        assert linear_ops.square_relu_(x) is x
        assert_as_good_as_reference(x, exact.to(dtype), exact)

    @pytest.mark.parametrize("rows", [1, 2, 33])
    def test_the_chosen_cut_suits_every_size(self, rows):
        for size_r, size_k in [(64, 192), (192, 64), (96, 320)]:
            compare_linear(rows, size_r, size_k, torch.float16, None)


def compare_norm(
    rows, num_parts, num_mixes, dtype, embed=False, slots=None, channels=CHANNELS, mean=0.0
):
    slots = torch.tensor(slots or [4, 0, 7, -1, 2][:rows], device=DEVICE)
    tokens = torch.tensor([3, 9, 3, 0, 1][:rows], device=DEVICE) if embed else None
    x = randn(11 if embed else rows, channels, seed=1, dtype=dtype if embed else torch.float32)
    x += mean
    parts = randn(num_parts, rows, channels, seed=2) if num_parts else None
    weight, bias = randn(channels, seed=3, dtype=dtype), randn(channels, seed=4, dtype=dtype)
    mix = randn(num_mixes, channels, seed=5, dtype=dtype)
    shift, check = guarded(SLOTS, channels, dtype=dtype)
    shift.copy_(randn(SLOTS, channels, seed=6))
    same_shift, exact_shift = shift.clone(), shift.double()
    norm0 = (randn(channels, seed=7), randn(channels, seed=8)) if embed else None
    total, out = norm_ops.add_norm_mix(
        x, parts, weight, bias, shift, slots, mix, dtype=dtype, tokens=tokens, norm0=norm0
    )
    args = (x, parts, weight, bias)
    same = plain.add_norm_mix(*args, same_shift, slots, mix, tokens=tokens, norm0=norm0)
    exact = plain.add_norm_mix(
        *doubles(*args), exact_shift, slots, mix.double(), tokens=tokens, norm0=norm0
    )
    check()
    assert total.dtype == torch.float32
    assert out.dtype == dtype
    assert_as_good_as_reference(total, same[0], exact[0])
    assert_as_good_as_reference(out, same[1].to(dtype), exact[1])
    assert_as_good_as_reference(shift, same_shift, exact_shift)


@pytest.mark.usefixtures("guard_outputs")
class TestAddNormMix:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 5])
    def test_equals_reference(self, rows, dtype):
        compare_norm(rows, 3, 6, dtype)

    def test_the_first_layer_looks_up_its_tokens(self):
        compare_norm(5, 0, 6, torch.float16, embed=True)

    @pytest.mark.parametrize("mean", [0.9, 3.0, 2000.0])
    def test_a_mean_beside_the_deviation_costs_no_precision(self, mean):
        compare_norm(2, 2, 1, torch.float32, mean=mean)

    def test_a_row_is_cut_into_slices(self):
        compare_norm(2, 1, 1, torch.float32, channels=832)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_norm_alone_equals_reference(self, dtype):
        x, parts = randn(3, CHANNELS, seed=1), randn(2, 3, CHANNELS, seed=2)
        weight, bias = randn(CHANNELS, seed=3, dtype=dtype), randn(CHANNELS, seed=4, dtype=dtype)
        out = norm_ops.add_norm(x, parts, weight, bias, dtype=dtype)
        assert out.dtype == dtype
        same = plain.add_norm(x, parts, weight, bias).to(dtype)
        exact = plain.add_norm(*doubles(x, parts, weight, bias))
        assert_as_good_as_reference(out, same, exact)


RANKS = {0: (64, 64, 128, 0), 1: (128, 64, 192, 64)}


def compare_time_mix(
    rows,
    layer,
    dtype,
    pool_dtype=torch.float32,
    parts=1,
    offset=False,
    fused=True,
    stacked=False,
):
    ranks = RANKS[layer]
    slots = torch.tensor([4, 0, 7, -1, 2, 8, *range(10, 40)][:rows], device=DEVICE)
    projected = randn(parts, rows, 3 * CHANNELS + sum(ranks), seed=1, dtype=dtype)
    up = randn(CHANNELS, sum(ranks), seed=2, dtype=dtype, scale=0.1)
    vectors = randn(8, CHANNELS, seed=3)
    num_slots = max(SLOTS, int(slots.max()) + 2)
    pool, check = guarded(num_slots, HEADS, SIZE, SIZE, dtype=pool_dtype)
    pool.copy_(randn(num_slots, HEADS, SIZE, SIZE, seed=4))
    before, same_pool, exact_pool = pool.clone(), pool.clone(), pool.double()
    v_first = randn(rows, CHANNELS, seed=6)
    same_first, exact_first = v_first.clone(), v_first.double()
    time_offset = randn(num_slots, CHANNELS, seed=7) if offset else None
    low = None
    if stacked:
        low = projected[..., 3 * CHANNELS :].contiguous()
        projected = randn(3, rows, CHANNELS, seed=8, dtype=dtype)
    y = time_ops.time_mix7(
        projected, up, vectors, ranks, v_first, pool, slots, time_offset, low=low,
        fuse_rows=rows if fused else 0,
    )  # fmt: skip
    args = (projected, up, vectors, ranks)
    same = plain.time_mix7(*args, same_first, same_pool, slots, time_offset, low=low)
    rest = doubles(exact_first, exact_pool, slots, time_offset)
    exact = plain.time_mix7(*doubles(*args), *rest, low=doubles(low)[0])
    check()
    assert y.dtype == dtype
    assert_as_good_as_reference(y, same.to(dtype), exact)
    # Tensor cores take the LoRAs' inputs in the weights' dtype; a program of one row keeps fp32.
    lora_dtype = None if fused and not time_ops.few_rows_group(rows, HEADS) else dtype
    assert_as_good_as_reference(pool, same_pool, rest[1], lora_dtype)
    assert_as_good_as_reference(v_first, same_first, rest[0], lora_dtype)
    others = [s for s in range(num_slots) if s not in slots.tolist()]
    assert torch.equal(pool[others], before[others])


@pytest.mark.usefixtures("guard_outputs")
class TestTimeMix7:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layer", [0, 1])
    def test_few_rows_equal_reference(self, layer, dtype):
        compare_time_mix(3, layer, dtype)

    @pytest.mark.parametrize("dtype", DOT_DTYPES[1:])
    @pytest.mark.parametrize("layer", [0, 1])
    @pytest.mark.parametrize("group", [1, 2, 4])
    def test_rows_of_one_program_equal_reference(self, group, layer, dtype, monkeypatch):
        monkeypatch.setattr(time_ops, "few_rows_group", lambda rows, heads: group)
        compare_time_mix(3, layer, dtype)

    def test_eight_rows_equal_reference(self):
        compare_time_mix(8, 1, torch.float16)

    @pytest.mark.parametrize("layer", [0, 1])
    def test_many_rows_equal_reference(self, layer):
        compare_time_mix(5, layer, torch.float32, fused=False)

    def test_more_rows_than_a_block_equal_reference(self):
        compare_time_mix(33, 1, torch.float32, fused=False)

    @pytest.mark.parametrize(("fused", "dtype"), [(True, torch.float16), (False, torch.float32)])
    def test_parts_and_offsets_equal_reference(self, fused, dtype):
        compare_time_mix(5, 1, dtype, parts=3, offset=True, fused=fused)

    @pytest.mark.parametrize("fused", [True, False])
    def test_stacked_projections_equal_reference(self, fused):
        compare_time_mix(5, 1, torch.float16, parts=1, fused=fused, stacked=True)

    @pytest.mark.parametrize(("rows", "dtype"), [(2, torch.float32), (5, torch.float16)])
    def test_a_half_precision_pool_equals_reference(self, rows, dtype):
        compare_time_mix(rows, 1, dtype, pool_dtype=torch.float16)


def test_a_program_takes_several_rows_where_measured_faster():
    groups = {
        heads: [time_ops.few_rows_group(rows, heads) for rows in range(1, 10)]
        for heads in (12, 32, 40, 64)
    }
    assert groups == {
        12: [0, 0, 0, 0, 1, 1, 1, 1, 0],
        32: [0, 0, 0, 0, 2, 2, 2, 2, 0],
        40: [1, 1, 1, 2, 2, 2, 4, 4, 0],
        64: [1, 1, 2, 2, 4, 4, 4, 4, 0],
    }


class TestWrongArguments:
    def test_rows_linear_names_what_is_wrong(self):
        x, weight = randn(1, 2, 128, seed=1), randn(64, 128, seed=2)
        with pytest.raises(ValueError, match=r"weight must have shape \[64, 64\]"):
            linear_ops.rows_linear(randn(1, 2, 64, seed=1), weight)
        with pytest.raises(ValueError, match="weight must have dtype"):
            linear_ops.rows_linear(x, weight.half())
        with pytest.raises(ValueError, match="weight must be contiguous"):
            linear_ops.rows_linear(x, randn(128, 64, seed=2).mT)
        with pytest.raises(ValueError, match="K must be a multiple of 64, got 96"):
            linear_ops.rows_linear(x[..., :96].contiguous(), weight[:, :96].contiguous())
        with pytest.raises(ValueError, match="activation must be one of"):
            linear_ops.rows_linear(x, weight, activation="gelu")
        config = LinearConfig(64, 64, 2, 4, 2)
        with pytest.raises(ValueError, match="num_splits must be 1 with an activation, got 2"):
            linear_ops.rows_linear(x, weight, activation="relu2", config=config)
        with pytest.raises(ValueError, match=r"K must be a multiple of .* = 256, got 128"):
            linear_ops.rows_linear(x, weight, config=LinearConfig(64, 256, 1, 4))
        for columns in (-64, 32, 128):
            config = LinearConfig(64, 64, 1, 4, 2, prefetch=columns)
            with pytest.raises(ValueError, match="prefetch must be a multiple of 64 that a second"):
                linear_ops.rows_linear(x, weight, config=config)
        with pytest.raises(ValueError, match="num_stages must be 2 or more for 2 rows, got 1"):
            linear_ops.rows_linear(x, weight, config=LinearConfig(64, 64, 1, 4))
        groups = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        with pytest.raises(ValueError, match=r"groups must have shape \[1\], got \[2\]"):
            linear_ops.rows_linear(x, weight, groups)

    def test_add_norm_mix_names_what_is_wrong(self):
        x, vector = randn(2, 64, seed=1), randn(64, seed=2)
        shift, mix = randn(4, 64, seed=3), randn(6, 64, seed=4)
        slots = torch.tensor([0, 1], device=DEVICE)
        with pytest.raises(ValueError, match=r"bias must have shape \[64\], got \[32\]"):
            norm_ops.add_norm_mix(x, None, vector, vector[:32], shift, slots, mix)
        with pytest.raises(ValueError, match=r"parts must have shape \[1, 2, 64\]"):
            norm_ops.add_norm_mix(x, randn(1, 3, 64, seed=1), vector, vector, shift, slots, mix)
        with pytest.raises(ValueError, match=r"slots must have shape \[2\], got \[1\]"):
            norm_ops.add_norm_mix(x, None, vector, vector, shift, slots[:1], mix)

    def test_time_mix_names_what_is_wrong(self):
        ranks = (64, 64, 64, 0)
        projected, up = randn(1, 1, 3 * 64 + 192, seed=1), randn(64, 192, seed=2)
        vectors, pool = randn(8, 64, seed=3), randn(2, 1, 64, 64, seed=4)
        first, slots = randn(1, 64, seed=5), torch.tensor([0], device=DEVICE)
        with pytest.raises(ValueError, match="ranks must be 4 multiples of 64"):
            time_ops.time_mix7(projected, up, vectors, (96, 64, 32, 0), first, pool, slots)
        with pytest.raises(ValueError, match=r"up must have shape \[64, 192\]"):
            time_ops.time_mix7(projected, up[:, :64], vectors, ranks, first, pool, slots)
        with pytest.raises(ValueError, match="vectors must have dtype"):
            time_ops.time_mix7(projected, up, vectors.half(), ranks, first, pool, slots)
