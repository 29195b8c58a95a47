"""Weights in 8 bits. Oracle: the products and models that weights rounded by hand give in fp32."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from reading import decode, prefill, relative_rms
from tiny_model import TINY, checkpoint, write_checkpoint, write_state

from mrss_provider.engine.snapshot_folder import SnapshotFolder
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.errors import ConfigError, ModelFileError, StateFileError
from mrss_provider.model import int8, load_model
from mrss_provider.model.snapshot_file import SnapshotBlob, dump_snapshots, load_snapshots

# Of the outputs against the same rounded weights in fp64; the form pack has bf16 inputs.
BOUNDS = {"vnni": 5e-4, "pack": 1e-2}
FORMS = [form for form in BOUNDS if form == "pack" or int8.pick_int8_form(packed=True) == form]
SHAPES = [(768, 3072), (64, 768), (24, 128), (500, 192)]


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(path, **options):
    return load_model(path, **({"device": "cpu", "dtype": "fp32", "threads": 1} | options))


def rounded(weight):
    """Return `weight` as 8 bits hold it."""
    values, scales = int8.quantize_int8(weight)
    return values.double() * scales.double()[:, None]


def test_no_weight_is_further_away_than_half_a_step(monkeypatch):
    weight = torch.randn(50, 33) * torch.logspace(-6, 6, 50)[:, None]
    weight[7] = 0
    before = weight.clone()
    values, scales = int8.quantize_int8(weight)
    assert torch.equal(weight, before)
    assert torch.equal(scales, scales.bfloat16().float())
    # All of the range is used.
    largest = values.abs().amax(1)
    assert largest[7] == 0
    assert ((largest >= 126) | (torch.arange(50) == 7)).all()
    error = (rounded(weight) - weight.double()).abs()
    assert (error <= 0.5001 * scales.double()[:, None]).all()
    monkeypatch.setattr(int8, "_BLOCK_ROWS", 7)
    assert all(map(torch.equal, int8.quantize_int8(weight.double()), (values, scales)))


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_a_product_with_the_rounded_weights(form, activation):
    weight = torch.randn(40, 96) / 96**0.5
    # Each row has its own size, and some inputs stand out.
    x = torch.randn(7, 96) * torch.logspace(-8, 8, 7)[:, None]
    x[3, 5] *= 50
    y = x.double() @ rounded(weight).T
    wanted = y.relu() if activation == "relu" else y
    layer = int8.make_int8_linear(int8.quantize_int8(weight), form, activation)
    got = layer(x)
    assert got.dtype == layer.input_dtype
    for row in range(7):
        assert relative_rms(got[row], wanted[row]) < BOUNDS[form]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rows_bits_are_the_same_in_any_batch(form, shape, threads):
    torch.set_num_threads(threads)
    weight = torch.randn(shape) / shape[1] ** 0.5
    layer = int8.make_int8_linear(int8.quantize_int8(weight), form)
    x = torch.randn(130, shape[1])
    # A row with an outlier changes nobody else's scale.
    x[64] *= 1e4
    wanted = layer(x)
    for num_rows in (*range(1, 20), 32, 33, 37, 64, 121):
        assert torch.equal(layer(x[:num_rows]), wanted[:num_rows])
        assert torch.equal(layer(x[-num_rows:]), wanted[-num_rows:])


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_not_finite_stays_so_and_alone(form):
    layer = int8.make_int8_linear(int8.quantize_int8(torch.randn(16, 64)), form)
    x = torch.randn(5, 64)
    wanted = layer(x)
    x[1, 3], x[2, 4] = torch.nan, -torch.inf
    x[4] = 0
    got = layer(x)
    assert torch.equal(got[[0, 3]], wanted[[0, 3]])
    assert not got[1].isfinite().any()
    assert not got[2].isfinite().any()
    assert (got[4] == 0).all()


def test_a_processor_that_adds_bytes_in_16_bits_gets_atens_form(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    exact = int8._byte_products
    monkeypatch.setattr(int8, "_byte_products", lambda *args: exact(*args).clamp_max(32767))
    assert int8.pick_int8_form(packed=True) == "pack"


@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_the_one_whose_large_matrices_are_rounded(
    version, form, checkpoint_path, token_ids, tmp_path
):
    tensors = checkpoint(version)
    for name, tensor in tensors.items():
        is_large = name.endswith((".att.output.weight", ".att.gate.weight")) or any(
            part in name for part in (".receptance.", ".key.", ".value.")
        )
        if is_large or name == "head.weight":
            tensors[name] = rounded(tensor).float()
    torch.save(tensors, tmp_path / "m.pth")
    wanted = load(tmp_path / "m.pth", packed=False)
    model = load(checkpoint_path, quantize="int8", packed=form == "vnni")
    assert model.config.precision == "fp32+int8"
    bound = {"vnni": 2e-3, "pack": 0.1}[form]
    logits = prefill(wanted, wanted.new_pool(1), [token_ids], [0])
    assert relative_rms(prefill(model, model.new_pool(1), [token_ids], [0]), logits) < bound
    assert relative_rms(decode(model, model.new_pool(1), token_ids, 0), logits) < bound
    plain = load(checkpoint_path, packed=False)
    assert relative_rms(prefill(plain, plain.new_pool(1), [token_ids], [0]), logits) > 3e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_models_rows_bits_do_not_depend_on_their_batch(form, checkpoint_path):
    model = load(checkpoint_path, dtype="auto", quantize="int8", packed=form == "vnni")
    rng = random.Random(0)
    prompts = [rng.choices(range(TINY.vocab_size), k=rng.randrange(1, 40)) for _ in range(8)]

    def run(rows):
        pool = model.new_pool(len(rows))
        slots = torch.arange(len(rows))
        offsets = [0, *itertools.accumulate(len(prompts[row]) for row in rows)]
        packed = torch.tensor([token for row in rows for token in prompts[row]])
        read = model.head(model.prefill(packed, offsets, slots, pool))
        ids = torch.tensor([prompts[row][0] for row in rows])
        logits = model.head(model.decode(ids, slots, pool))
        return [(read[i], logits[i], pool.wkv[:, i]) for i in range(len(rows))]

    alone = [run([row])[0] for row in range(8)]
    for size in (2, 3, 8):
        rows = rng.sample(range(8), size)
        for row, tensors in zip(rows, run(rows), strict=True):
            assert all(map(torch.equal, tensors, alone[row]))


def test_what_is_not_offered_is_refused(checkpoint_path):
    with pytest.raises(ConfigError, match="must be one of none, int8, int4, fp8, got 'nf4'"):
        load(checkpoint_path, quantize="nf4")
    for name in ("int4", "fp8"):
        with pytest.raises(ConfigError, match=f"{name} weights are offered on cuda, not on a CPU"):
            load(checkpoint_path, quantize=name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    tensors = checkpoint(7)
    tensors["blocks.1.ffn.key.weight"][3, 4] = value
    torch.save(tensors, tmp_path / "m.pth")
    with pytest.raises(ModelFileError, match=r"m: blocks.1.ffn.key.weight holds NaN or infinity"):
        load(tmp_path / "m.pth", quantize="int8")


def test_snapshots_of_another_quantisation_are_refused_and_kept_apart(checkpoint_path, tmp_path):
    configs = [load(checkpoint_path, quantize=kind).config for kind in ("none", "int8")]
    blob = SnapshotBlob((), torch.tensor([1], dtype=torch.int32), {})
    for one, other in (configs, configs[::-1]):
        data = dump_snapshots(replace(blob, rows=(snapshot(one),)), one)
        load_snapshots(data, one, torch.float32)
        with pytest.raises(StateFileError, match="another model, dtype or quantisation"):
            load_snapshots(data, other, torch.float32)
    folders = {SnapshotFolder(tmp_path, config, torch.float32).folder for config in configs}
    assert len(folders) == 2


def snapshot(config):
    """Return a state of zeros."""
    from mrss_provider.model import StateSnapshot

    shift = torch.zeros(config.num_layers, config.hidden_size)
    return StateSnapshot(torch.zeros(config.state_shape), shift, shift.clone())


def test_a_tuned_state_loads_and_its_answers_are_told_apart(checkpoint_path, tmp_path):
    write_state(tmp_path / "tone.pth")
    configs = [load(checkpoint_path, quantize=kind).config for kind in ("none", "int8")]
    assert configs[0].fingerprint == configs[1].fingerprint
    libraries = [StateLibrary(tmp_path, config, strict=True) for config in configs]
    assert "tone" in libraries[1].states
    # But an answer's fingerprint says that it is another model's.
    one, other = (library.resolve("tone").fingerprint for library in libraries)
    assert one != other


def test_a_large_matrix_is_held_once_and_in_bytes(tmp_path):
    model = load(write_checkpoint(tmp_path / "m.pth"), quantize="int8", packed=False)
    for layer in (*(each.ffn_key for each in model._layers), model._head):
        held = [part for part in vars(layer).values() if isinstance(part, torch.Tensor)]
        assert sum(part.nbytes for part in held) <= held[0].numel() + 4 * held[0].shape[0]
