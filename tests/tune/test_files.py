"""Checkpoints in, tuned states out."""

import pytest
import torch
from tiny_model import TINY, checkpoint, write_checkpoint

from mrss_provider.errors import ModelFileError, StateFileError
from mrss_provider.model import load_model, load_tuned_state
from mrss_provider.tune import TuneConfig, TuneResult, read_weights, save_result

CONFIG = TuneConfig(steps=3, locality=1.0)


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
