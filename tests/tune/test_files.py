"""Checkpoints in, tuned states out."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import TINY, checkpoint, tuned_state, write_checkpoint

from mrss_provider.errors import ModelFileError, StateFileError
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


def test_an_rwkv6_cannot_be_tuned_and_the_message_says_what_can(tmp_path):
    old = write_checkpoint(tmp_path / "tiny6.pth", 6)
    with pytest.raises(ModelFileError, match=r"RWKV-7 models only.*RWKV-PEFT"):
        read_weights(old)


def test_a_state_of_another_shape_is_not_written(path, tmp_path):
    with pytest.raises(StateFileError):
        save_result(tmp_path / "x.safetensors", result(1, 2, 3), path, group="g", config=CONFIG)
    assert not (tmp_path / "x.safetensors").exists()
