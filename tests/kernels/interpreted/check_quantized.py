"""Products with weights in 8 and 4 bits against fp64, and the fused steps of models that have them.

The truth is what codes and scales stand for; that they stand for the weights is tested elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from check_decoder import TOLERANCE, error, fill
from check_decoder6 import fill as fill6
from check_fused import DOT_DTYPES, doubles, guard_outputs
from mrss_kernels import reference_fused as plain
from mrss_kernels import rows_linear as linear_ops
from mrss_kernels.dequantize import into_scratch, write_dequantized
from mrss_kernels.linear_cuts import LinearConfig
from mrss_kernels.quantized import CODE_DTYPES, QuantizedWeight, dequantize, stack_rows
from mrss_kernels.quantized_linear import choose_quantized_config, quantized_linear
from oracle import DEVICE, INTERPRETED, assert_as_good_as_reference, guarded, randn
from safetensors.torch import save_file
from tiny_model import Shape, checkpoint

from mrss_provider.model import Model, products
from mrss_provider.model.products import many_rows, weight_of
from mrss_provider.model.quantized import quantize
from mrss_provider.model.rwkv6_cuda import FusedDecoder6
from mrss_provider.model.rwkv6_ragged import RaggedStep6
from mrss_provider.model.rwkv7_cuda import FusedDecoder
from mrss_provider.model.rwkv7_ragged import RaggedStep
from mrss_provider.model.weights import load_weights

__all__ = ["guard_outputs"]

FORMATS = list(CODE_DTYPES)
# fp32 last, whose products take a GPU's compiler longest.
OTHER_DTYPES = [dtype for dtype in reversed(DOT_DTYPES) if dtype != torch.float16]


def slow_ones(values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def quantized(size_r, size_k, form, dtype, scratch_len=1 << 17) -> QuantizedWeight:
    scratch = torch.zeros(scratch_len, dtype=dtype, device=DEVICE)
    return quantize(randn(size_r, size_k, seed=5, scale=size_k**-0.5), form, scratch)


def compare_linear(rows, weight, config=None, activation="none", grouped=False):
    size_r, size_k = weight.shape
    groups = torch.tensor([2, 0, 1, 1][: size_r // 64], dtype=torch.int32, device=DEVICE)
    groups = groups if grouped else None
    x = randn(3 if grouped else 1, rows, size_k, seed=rows, dtype=weight.dtype)
    out_dtype = weight.dtype if activation == "relu2" else torch.float32
    options = {"activation": activation, "out_dtype": out_dtype, "config": config}
    parts = quantized_linear(x, weight, groups, **options)
    values = dequantize(weight, torch.float64)
    exact = plain.rows_linear(*doubles(x, values), groups, activation=activation)
    same = plain.rows_linear(x, values.to(weight.dtype), groups, activation=activation)
    got = parts if len(parts) == 1 else parts.sum(0, keepdim=True)
    assert_as_good_as_reference(got, same.to(parts.dtype), exact)
    return parts


@pytest.mark.usefixtures("guard_outputs")
@pytest.mark.parametrize("form", FORMATS)
class TestQuantizedLinear:
    @pytest.mark.parametrize("dtype", [torch.float16, *slow_ones([torch.float32, torch.bfloat16])])
    def test_one_row_equals_reference(self, form, dtype):
        compare_linear(1, quantized(77, 256, form, dtype))

    @pytest.mark.parametrize("dtype", [torch.float16, *slow_ones(OTHER_DTYPES)])
    @pytest.mark.parametrize("rows", [3, 17, *slow_ones([2, 63])])
    def test_few_rows_equal_reference(self, form, rows, dtype):
        compare_linear(rows, quantized(77, 256, form, dtype))

    @pytest.mark.slow
    def test_more_rows_than_a_block_equal_reference(self, form):
        compare_linear(100, quantized(64, 128, form, torch.float16))

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [1, 3])
    def test_groups_read_their_own_input(self, form, rows):
        compare_linear(rows, quantized(256, 128, form, torch.float16), grouped=True)

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [1, 5])
    def test_squared_relu_equals_reference(self, form, rows):
        compare_linear(rows, quantized(96, 384, form, torch.float16), activation="relu2")

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [1, 3])
    def test_parts_add_up_to_the_product(self, form, rows):
        config = LinearConfig(32, 128, 2, 1, rows)
        assert len(compare_linear(rows, quantized(64, 512, form, torch.float16), config)) == 2

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [3, 20])
    @pytest.mark.parametrize("warps", [1, 2, 4])
    @pytest.mark.parametrize("block_n", [16, 64])
    def test_every_way_to_divide_k_equals_reference(self, form, block_n, warps, rows):
        config = LinearConfig(block_n, 512, 2, warps, 2)
        compare_linear(rows, quantized(100, 2048, form, torch.float16, scratch_len=1), config)

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [1, 4])
    def test_wide_inputs_equal_reference(self, form, rows):
        for size_k in (1024, 2048, 8192):
            compare_linear(rows, quantized(64, size_k, form, torch.float16, scratch_len=1))

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [1, 2])
    def test_some_of_a_weights_rows_are_a_weight(self, form, rows):
        weight = quantized(192, 256, form, torch.float16)
        x = randn(1, rows, 256, seed=3, dtype=torch.float16)
        config = LinearConfig(16, 128, 1, 1, rows)
        whole = quantized_linear(x, weight, config=config)
        some = quantized_linear(x, weight.rows(64, 128), config=config)
        assert torch.equal(some, whole[..., 64:128])
        parts = [weight.rows(0, 64).padded(128), weight.rows(64, 192)]
        both = quantized_linear(x, stack_rows(parts), config=config)
        assert torch.equal(both[..., 128:], whole[..., 64:])
        assert not both[..., 64:128].any()


# The interpreter cuts numbers off to bfloat16, and does not round them.
@pytest.mark.parametrize("dtype", [torch.float16] + ([] if INTERPRETED else [torch.bfloat16]))
@pytest.mark.parametrize("form", FORMATS)
def test_weights_are_written_out_rounded_once(form, dtype):
    weight = quantized(77, 384, form, dtype)
    out, check = guarded(77, 384, dtype=dtype)
    write_dequantized(weight, out)
    check()
    assert torch.equal(out, dequantize(weight, dtype))
    assert torch.equal(into_scratch(weight.rows(64, 77)), out[64:])


@pytest.mark.parametrize("form", FORMATS)
def test_products_of_many_rows_are_those_of_the_weight_in_parts(form):
    whole = quantized(256, 128, form, torch.float16)
    parts = quantized(256, 128, form, torch.float16, scratch_len=100 * 128)
    x = randn(130, 128, seed=1, dtype=torch.float16)
    exact = x.double() @ dequantize(whole, torch.float64).mT
    same = x @ dequantize(whole, torch.float16).mT
    for weight in (whole, parts):
        assert_as_good_as_reference(many_rows(x, weight), same, exact)
        out, check = guarded(130, 256, dtype=torch.float16)
        many_rows(x, weight, out=out)
        check()
        assert_as_good_as_reference(out, same, exact)


def test_what_no_kernel_can_take_is_refused():
    weight = quantized(64, 128, "int4", torch.float16)
    x = randn(1, 2, 128, seed=1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"x must have dtype torch.float16, got torch.float32"):
        quantized_linear(x.float(), weight)
    with pytest.raises(ValueError, match=r"x must be \[M, B, 128\], got \[1, 2, 64\]"):
        quantized_linear(x[..., :64], weight)
    with pytest.raises(ValueError, match="activation must be one of"):
        quantized_linear(x, weight, activation="gelu")
    with pytest.raises(ValueError, match=r"block_k must be a multiple of 512, got 128"):
        quantized_linear(x, weight, config=LinearConfig(16, 128, 1, 4, 2))
    narrow = QuantizedWeight("int4", weight.codes[:, :32].contiguous(), weight.scales, x)
    with pytest.raises(ValueError, match="K must be a multiple of 128 for int4, got 64"):
        quantized_linear(x[..., :64].contiguous(), narrow)
    wrong = QuantizedWeight("int8", weight.codes, weight.scales, x)
    with pytest.raises(ValueError, match=r"weight.codes must have dtype torch.int8"):
        quantized_linear(x, wrong)
    with pytest.raises(ValueError, match="64 x 128 does not fit in a scratch of 512 elements"):
        into_scratch(QuantizedWeight("int4", weight.codes, weight.scales, x.new_empty(512)))


def test_the_cut_suits_every_size():
    for form in FORMATS:
        for rows in (1, 2, 16, 33, 64):
            for size_k in (128, 384, 768, 2048, 2560, 4096, 8192, 10240, 16384):
                for splittable in (False, True):
                    config = choose_quantized_config(
                        form, rows, 2048, size_k, splittable=splittable, shared_bytes=227 << 10
                    )
                    linear_ops.check_config(config, rows, size_k, True, "none")
                    assert splittable or config.num_splits == 1


SHAPE = Shape(num_layers=2, hidden_size=128, vocab_size=77, ffn_size=384, ranks=(16, 80, 8, 24))
SHAPE6 = Shape(num_layers=2, hidden_size=128, vocab_size=77, ffn_size=384, ranks=(8, 40, 8, 24))
FIRST_HALVES = (".w1", ".a1", ".g1", ".v1", ".time_decay_w1")
MODELS = [(7, form) for form in FORMATS] + [(6, "int4")]
# Of which one runs every time.
ONE_OF_MODELS = [
    pytest.param(*each, marks=() if each == (7, "int4") else pytest.mark.slow) for each in MODELS
]


def build(tmp_path, version, form, dtype="fp16"):
    """Return a model of what quantised weights stand for, one that has them, and its decoder."""
    path = tmp_path / "model.safetensors"
    save_file(checkpoint(version, SHAPE if version == 7 else SHAPE6), path)
    parts = (torch.device(DEVICE), dtype, "fp32", "plain")
    model = Model(load_weights(path), *parts, large=form)
    weights = load_weights(path)
    scratch = torch.zeros(1, device=DEVICE)
    for name, tensor in weights.tensors.items():
        is_large = name.endswith((".weight", *FIRST_HALVES)) and tensor.ndim == 2
        if is_large and name != "emb.weight":
            held = quantize(tensor.to(DEVICE), form, scratch)
            weights.tensors[name] = dequantize(held, torch.float32)
    plain_model = Model(weights, *parts)
    decoder = FusedDecoder if version == 7 else FusedDecoder6
    around = (model._embedding, model._ln0, model._ln_out, weight_of(model._head))
    return plain_model, model, decoder(model._layers, *around)


def filled_pools(version, *models):
    pools = [model.new_pool(6) for model in models]
    for pool in pools:
        (fill if version == 7 else fill6)(pool, *(() if version == 6 else (1, False)))
    return pools


def compare_pools(pools, slots):
    for name in ("wkv", "shift_att", "shift_ffn"):
        got, want = (getattr(pool, name)[:, slots] for pool in pools)
        assert error(got, want) < TOLERANCE["fp16"], name


@pytest.mark.parametrize("slots", [[4, -1, 0], *slow_ones([[3]])])
@pytest.mark.parametrize(("version", "form"), ONE_OF_MODELS)
def test_a_fused_step_is_that_of_the_weights_it_stands_for(tmp_path, version, form, slots):
    plain_model, model, fused = build(tmp_path, version, form)
    pools = filled_pools(version, model, plain_model)
    ids = torch.tensor(slots, device=DEVICE)
    live = ids >= 0
    tokens = torch.tensor([7, 0, 60][: len(slots)], device=DEVICE)
    wanted = plain_model.decode_by_layer(tokens, ids, pools[1])
    hidden = fused.decode(tokens, ids, pools[0])
    assert error(hidden[live], wanted[live]) < TOLERANCE["fp16"]
    logits = fused.head(hidden)
    assert logits.dtype == torch.float32
    assert error(logits[live], plain_model.head(wanted)[live]) < TOLERANCE["fp16"]
    compare_pools(pools, [slot for slot in slots if slot >= 0])


@pytest.mark.slow
@pytest.mark.parametrize(("version", "form"), MODELS)
def test_the_layer_by_layer_form_reads_the_same_weights(tmp_path, monkeypatch, version, form):
    plain_model, model, _ = build(tmp_path, version, form)
    slots = torch.tensor([4, 0], device=DEVICE)
    for max_rows in (64, 4):
        monkeypatch.setattr(linear_ops, "MAX_ROWS", max_rows)
        monkeypatch.setattr(products, "MAX_QUANTIZED_ROWS", max_rows)
        pools = filled_pools(version, model, plain_model)
        tokens = torch.arange(9, device=DEVICE)
        got, wanted = (
            each.prefill_by_layer(tokens, [0, 3, 9], slots, pool)
            for each, pool in zip((model, plain_model), pools, strict=True)
        )
        assert error(got, wanted) < TOLERANCE["fp16"]
        compare_pools(pools, [4, 0])


@pytest.mark.slow
@pytest.mark.parametrize(("version", "form"), MODELS)
def test_a_step_of_library_products_is_that_of_the_weights(tmp_path, monkeypatch, version, form):
    monkeypatch.setattr(linear_ops, "MAX_ROWS", 2)
    monkeypatch.setattr(products, "MAX_QUANTIZED_ROWS", 2)
    plain_model, model, fused = build(tmp_path, version, form)
    pools = filled_pools(version, model, plain_model)
    slots = torch.tensor([4, 2, 0], device=DEVICE)
    wanted = plain_model.decode_by_layer(slots + 5, slots, pools[1])
    assert error(fused.decode(slots + 5, slots, pools[0]), wanted) < TOLERANCE["fp16"]
    compare_pools(pools, [4, 2, 0])


@pytest.mark.slow
@pytest.mark.parametrize(("version", "form"), MODELS)
def test_packed_tokens_are_read_as_by_the_weights_it_stands_for(
    tmp_path, monkeypatch, version, form
):
    plain_model, model, fused = build(tmp_path, version, form)
    make_step = RaggedStep if version == 7 else RaggedStep6
    slots = torch.tensor([4, 0], device=DEVICE)
    for max_rows in (64, 4):
        monkeypatch.setattr(linear_ops, "MAX_ROWS", max_rows)
        monkeypatch.setattr(products, "MAX_QUANTIZED_ROWS", max_rows)
        around = (model._embedding, model._ln0, model._ln_out)
        step = make_step(fused.layers, *around, grouped_tokens=max_rows, ffn_chunk_len=5)
        pools = filled_pools(version, model, plain_model)
        tokens = torch.arange(12, device=DEVICE)
        wanted = plain_model.prefill_by_layer(tokens, [0, 3, 12], slots, pools[1])
        bounds = torch.tensor([0, 3, 12], device=DEVICE)
        assert error(step.forward(tokens, bounds, slots, pools[0]), wanted) < TOLERANCE["fp16"]
        compare_pools(pools, [4, 0])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_no_copy_of_a_large_matrix_is_kept(tmp_path, form):
    _, model, fused = build(tmp_path, 7, form)
    layer = fused.layers[1]
    bytes_a_weight = {"int8": 1.04, "fp8": 1.04, "int4": 0.54}[form]
    for weight in (layer.project, layer.output, layer.ffn_key, layer.ffn_value, model._head.weight):
        assert weight.num_bytes <= bytes_a_weight * weight.shape[0] * weight.shape[1]
        assert weight.scratch.data_ptr() == layer.project.scratch.data_ptr()
    for linear, first in ((model._layers[1].key, 128), (model._layers[1].a1, 448)):
        start = layer.project.codes[first:].data_ptr()
        assert linear.weight.codes.data_ptr() == start


if not INTERPRETED:

    @pytest.mark.parametrize(("version", "form"), MODELS)
    def test_graphs_of_steps_and_prompts_equal_the_layer_by_layer_form(tmp_path, version, form):
        plain_model, model, _ = build(tmp_path, version, form)
        pools = [each.new_pool(80) for each in (model, plain_model)]
        for step, rows in enumerate((1, 3, 11, 70, 3)):
            tokens = (torch.arange(rows, device=DEVICE) * 5 + step) % 77
            ids = torch.randperm(80)[:rows].to(DEVICE)
            wanted = plain_model.decode_by_layer(tokens, ids, pools[1])
            got = model.decode(tokens, ids, pools[0])
            assert error(got, wanted) < TOLERANCE["fp16"]
            assert error(model.head(got), plain_model.head(wanted)) < TOLERANCE["fp16"]
        for lengths in ([1, 5, 2], [40, 1, 27], [300], [2000, 3]):
            ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
            slots = torch.randperm(80)[: len(lengths)].to(DEVICE)
            tokens = torch.arange(ends[-1], device=DEVICE) % 77
            wanted = plain_model.prefill_by_layer(tokens, ends, slots, pools[1])
            assert error(model.prefill(tokens, ends, slots, pools[0]), wanted) < TOLERANCE["fp16"]
        assert error(pools[0].wkv, pools[1].wkv) < TOLERANCE["fp16"]
