"""Checkpoints in, tuned states out."""

import json

import pytest
import torch
from model.package_model import PackageModel
from safetensors.torch import save_file
from tiny_model import TINY, checkpoint, tuned_state, write_checkpoint

from mrss_provider.errors import StateFileError
from mrss_provider.model import load_model, load_tuned_state
from mrss_provider.tune import (
    Example,
    TuneConfig,
    TuneResult,
    read_weights,
    save_result,
    tune_state,
)

CONFIG = TuneConfig(steps=3, locality=1.0)

EXAMPLE = Example((3, 4, 9, 11), (False, False, True, True), (False, False, True, False))


@pytest.fixture
def path(tmp_path):
    return write_checkpoint(tmp_path / "tiny.pth")


def result(*shape):
    gen = torch.Generator().manual_seed(0)
    return TuneResult(torch.randn(*shape, generator=gen), (3.0, 2.0, 1.0), 1.25)


def test_weights_come_in_the_official_layout(path):
    read, wanted = read_weights(path), checkpoint()
    ignored = {f"blocks.0.att.v{i}" for i in range(3)}
    assert set(read) == set(wanted) - ignored
    for name, tensor in read.items():
        assert torch.equal(tensor.reshape(-1), wanted[name].reshape(-1)), name
        assert tensor.squeeze().shape == wanted[name].squeeze().shape, name


def test_a_checkpoint_of_several_dtypes_comes_in_one_that_holds_every_value(tmp_path):
    mixed = {
        name: tensor.bfloat16() if tensor.ndim == 2 else tensor
        for name, tensor in checkpoint().items()
    }
    save_file(mixed, tmp_path / "mixed.safetensors")
    read = read_weights(tmp_path / "mixed.safetensors")
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}
    for name, tensor in read.items():
        assert torch.equal(tensor.flatten(), mixed[name].float().flatten()), name
    learnt = tune_state(read, lambda rng: EXAMPLE, TuneConfig(steps=1, batch_size=1))
    assert learnt.losses[0] > 0


def test_weights_of_one_dtype_keep_it_and_a_base_state_stays_fp32(tmp_path):
    tensors = checkpoint(dtype=torch.bfloat16) | tuned_state()
    save_file(tensors, tmp_path / "based.safetensors")
    read = read_weights(tmp_path / "based.safetensors")
    for i in range(TINY.num_layers):
        name = f"blocks.{i}.att.time_state"
        state = read.pop(name)
        assert state.dtype == torch.float32
        assert torch.equal(state, tensors[name])
    assert {tensor.dtype for tensor in read.values()} == {torch.bfloat16}


def test_a_saved_state_loads_for_its_model_with_its_provenance(path, tmp_path):
    learnt = result(TINY.num_layers, TINY.num_heads, 64, 64)
    saved = save_result(
        tmp_path / "sailor.safetensors", learnt, path, group="tone", config=CONFIG, licence="MIT"
    )
    config = load_model(path, device="cpu", dtype="fp32", threads=1).config
    state = load_tuned_state(tmp_path / "sailor.safetensors", config, name="sailor", strict=True)
    assert torch.equal(state.wkv, learnt.wkv)
    assert state.sha256 == saved.sha256
    about = state.metadata
    assert about == saved.metadata
    assert (about.base_name, about.base_sha256) == (config.name, config.fingerprint)
    assert (about.group, about.loss_on, about.local) == ("tone", "answer", True)
    assert (about.licence, about.orientation, about.bos) == ("MIT", "vk", False)
    assert about.training["learning_rate"] == CONFIG.learning_rate
    assert about.training["last_loss"] == 2.0


@pytest.mark.parametrize("version", [pytest.param(6, marks=pytest.mark.slow), 7])
def test_an_rwkv_peft_file_gives_the_package_the_logits_of_our_engine(tmp_path, version):
    path = write_checkpoint(tmp_path / "tiny.pth", version)
    weights = read_weights(path)
    example = Example(tuple(range(3, 20)), (True,) * 17, (False,) * 17)
    learnt = tune_state(weights, lambda rng: example, TuneConfig(steps=2, batch_size=1))
    out = tmp_path / "mine.pth"
    save_result(out, learnt, path, group="task", config=CONFIG)

    # The package takes a state from a file of weights, as RWKV-PEFT's users merge the two.
    merged = torch.load(path, weights_only=True)
    states = torch.load(out, weights_only=True)
    ids = list(range(5, 30))
    if version == 6:
        torch.save(merged | states, tmp_path / "with_state.pth")
        theirs, *_ = PackageModel(tmp_path / "with_state.pth", 6).read(ids)
    else:
        theirs = PackageModel(path, 7).read_from(
            [states[f"blocks.{i}.att.time_state"] for i in range(TINY.num_layers)], ids
        )
    model = load_model(path, device="cpu", dtype="fp32", threads=1)
    pool = model.new_pool(1)
    pool.write(0, load_tuned_state(out, model.config, name="mine"))
    hidden = model.prefill(
        torch.tensor(ids), [0, len(ids)], torch.arange(1), pool, all_positions=True
    )
    assert float((model.head(hidden) - theirs).norm() / theirs.norm()) < 1e-5
    about = json.loads((tmp_path / "mine.pth.json").read_text())
    assert about["group"] == "task"
    assert about["training"]["locality"] == CONFIG.locality


def test_a_state_of_another_shape_is_not_written(path, tmp_path):
    with pytest.raises(StateFileError):
        save_result(tmp_path / "x.safetensors", result(1, 2, 3), path, group="g", config=CONFIG)
    assert not (tmp_path / "x.safetensors").exists()
