"""Weights in 8 and 4 bits on CUDA, without one: codes, scales, what is loaded and what is refused.

Products with them are tested in the interpreter. Oracle: the formats' definitions, in fp64.
"""

import dataclasses

import pytest
import torch
from tiny_model import TINY, checkpoint, write_checkpoint

from mrss_provider.errors import ConfigError, ModelFileError
from mrss_provider.model import Model, load_model
from mrss_provider.model import model as model_module
from mrss_provider.model.fused_support import INT4_PAIR_SIZE, check_quantizable
from mrss_provider.model.int8 import quantize_int8
from mrss_provider.model.weights import load_weights

kernels = pytest.importorskip("mrss_kernels.quantized")
quantized = pytest.importorskip("mrss_provider.model.quantized")

FORMATS = ("int8", "fp8", "int4")
SCRATCH = torch.zeros(1)


def weight_of_every_size():
    torch.manual_seed(0)
    weight = torch.randn(70, 256) * torch.logspace(-3, 3, 70)[:, None]
    weight[7] = 0
    return weight


def held(weight, form):
    return kernels.dequantize(quantized.quantize(weight, form, SCRATCH), torch.float64)


def test_int8_on_cuda_has_the_codes_of_a_cpu():
    weight = weight_of_every_size()
    codes, scales = quantize_int8(weight)
    assert torch.equal(held(weight, "int8"), codes.double() * scales.double()[:, None])


def test_fp8_is_the_nearest_number_of_e4m3():
    weight = weight_of_every_size()
    found = quantized.quantize(weight, "fp8", SCRATCH)
    assert (found.codes.double().abs().amax(1)[[0, 20, 69]] == 448).all()
    error = (held(weight, "fp8") - weight.double()).abs()
    # Three bits of mantissa: half a step is 2^-4 of a number, or of the least one with all bits.
    assert (error <= 2**-4 * weight.abs() + 2**-10 * found.scales.double()[:, None]).all()
    assert not held(weight, "fp8")[7].any()


def test_int4_holds_each_group_within_half_a_step_of_its_own_scale():
    weight = weight_of_every_size()
    found = quantized.quantize(weight, "int4", SCRATCH)
    groups = weight.double().view(70, 4, 64)
    scales = found.scales.double().permute(1, 0, 2).reshape(70, 4, 1)
    error = (held(weight, "int4").view(70, 4, 64) - groups).abs()
    # Of the numbers within the range; those that a better scale cuts off are less than a third out.
    inside = (groups / scales >= -8.5) & (groups / scales <= 7.5)
    assert (error <= 0.5001 * scales.abs())[inside].all()
    assert (error <= 0.37 * groups.abs())[~inside].all()
    assert inside.double().mean() > 0.95
    # No other scale of the ten would have been better than rounding by the largest weight alone.
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    plain = (largest / -8).half().double()
    plain = torch.where(plain == 0, 1.0, plain)
    rounded = (groups / plain).round().clamp(-8, 7) * plain
    assert (error.square().sum(-1) <= (rounded - groups).square().sum(-1) * 1.001 + 1e-12).all()


def test_int4_has_two_dense_tiles_in_a_pair_of_groups():
    # Of the scale 1: codes can be told by hand.
    numbers = torch.arange(256) % 16 - 8.0
    codes = quantized.quantize(numbers[None], "int4", SCRATCH).codes[0].int()
    assert codes.shape == (128,)
    for pair in range(2):
        both = codes[64 * pair : 64 * pair + 64]
        assert torch.equal((both & 15) - 8, numbers[128 * pair : 128 * pair + 64].int())
        assert torch.equal((both >> 4) - 8, numbers[128 * pair + 64 : 128 * pair + 128].int())


@pytest.mark.parametrize("form", FORMATS)
def test_a_weight_is_quantised_alike_in_blocks_and_as_a_transposed_view(form, monkeypatch):
    weight = weight_of_every_size()
    whole = held(weight, form)
    for module in ("mrss_provider.model.quantized", "mrss_provider.model.int8"):
        monkeypatch.setattr(f"{module}._BLOCK_ROWS", 7)
    assert torch.equal(held(weight.mT.contiguous().mT, form), whole)


@pytest.mark.parametrize("form", FORMATS)
def test_a_loaded_model_holds_large_matrices_in_codes_only(form, tmp_path):
    weights = load_weights(write_checkpoint(tmp_path / "m.pth"))
    model = Model(weights, torch.device("cpu"), "fp16", "fp32", "plain", large=form)
    assert model.config.precision == f"fp16+{form}"
    layer = model._layers[1]
    large = (layer.receptance, layer.key, layer.value, layer.output, layer.ffn_key, layer.ffn_value)
    for linear in (*large, layer.w1, layer.a1, layer.g1, layer.v1, model._head):
        assert isinstance(linear, quantized.QuantizedLinear)
        assert linear.weight.format == form
        assert linear.weight.scratch is model._head.weight.scratch
    for linear in (layer.w2, layer.a2, layer.g2, layer.v2):
        assert linear.weight.dtype == torch.float16
    exact = checkpoint()["blocks.1.ffn.key.weight"]
    assert torch.equal(held(exact, form), kernels.dequantize(layer.ffn_key.weight, torch.float64))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(form, value, tmp_path):
    tensors = checkpoint()
    tensors["blocks.1.ffn.key.weight"][3, 4] = value
    torch.save(tensors, tmp_path / "m.pth")
    weights = load_weights(tmp_path / "m.pth")
    with pytest.raises(ModelFileError, match=r"m: blocks.1.ffn.key.weight holds NaN or infinity"):
        Model(weights, torch.device("cpu"), "fp16", "fp32", "plain", large=form)


@pytest.fixture
def capability(monkeypatch):
    """Pretend that there is a card; return what sets its capability."""
    monkeypatch.setattr(model_module, "find_device", lambda name: torch.device("cuda"))

    def set_to(*numbers):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: numbers)

    set_to(9, 0)
    return set_to


def test_what_a_card_cannot_is_refused(capability, tmp_path):
    path = write_checkpoint(tmp_path / "m.pth")
    capability(8, 0)
    with pytest.raises(ConfigError, match=r"compute capability 8.0, fp8 needs 8.9; choose"):
        load_model(path, device="cuda", quantize="fp8")
    capability(7, 5)
    with pytest.raises(ConfigError, match=r"int8 weights cannot be had here: .* 7.5, .* need 8.0"):
        load_model(path, device="cuda", dtype="fp16", quantize="int8")
    capability(9, 0)
    with pytest.raises(ConfigError, match="cannot be had here: the weights are fp32"):
        load_model(path, device="cuda", dtype="fp32", quantize="int8")
    with pytest.raises(ConfigError, match="choose one of the two") as caught:
        load_model(path, device="cuda", quantize="int4", sparse_ffn=True)
    assert caught.value.param == "sparse_ffn"


@pytest.mark.usefixtures("capability")
def test_widths_that_int4_has_no_form_for_are_refused(tmp_path):
    weights = load_weights(write_checkpoint(tmp_path / "m.pth"))
    config = Model(weights, torch.device("cpu"), "fp16", "fp32", "plain").config
    cuda = torch.device("cuda", 0)
    config = dataclasses.replace(config, dtype="fp16", quantize="int4")
    check_quantizable(config, cuda)
    assert TINY.hidden_size % INT4_PAIR_SIZE == 0
    for name, words in (("hidden_size", "the width 192"), ("ffn_size", "the ffn width 192")):
        narrow = dataclasses.replace(config, **{name: 192})
        with pytest.raises(ConfigError, match=f"{words} is no multiple of 128"):
            check_quantizable(narrow, cuda)
        check_quantizable(dataclasses.replace(narrow, quantize="int8"), cuda)
    assert kernels.PAIR_SIZE == INT4_PAIR_SIZE
