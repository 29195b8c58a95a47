"""Files of tensors: what a training leaves in them, and what damage does."""

import hashlib
import json
import random
import zipfile

import pytest
import torch
from tiny_model import checkpoint, tuned_state, write_checkpoint

from mrss_provider.errors import ModelFileError, StateFileError
from mrss_provider.model import load_model, load_tuned_state
from mrss_provider.model.checkpoint import read_tensors
from mrss_provider.model.weights import load_weights


def test_parameters_of_a_training_are_read_as_their_values(tmp_path):
    tensors = checkpoint(7)
    torch.save({n: torch.nn.Parameter(t) for n, t in tensors.items()}, tmp_path / "m.pth")
    weights = load_weights(tmp_path / "m.pth")
    key = tensors["blocks.0.att.key.weight"]
    assert weights.fingerprint == hashlib.sha256(key.numpy().tobytes()).hexdigest()
    assert not any(tensor.requires_grad for tensor in weights.tensors.values())


def damaged_copies(data, count):
    """Copies with bytes flipped, a piece cut out or zeroed: mostly where the pickle is."""
    chance = random.Random(0)
    for i in range(count):
        copy = bytearray(data)
        start = chance.randrange(len(copy))
        if i % 8 == 0:
            copy[start : start + chance.randrange(1, 40)] = b""
        elif i % 8 == 1:
            size = min(40, len(copy) - start)
            copy[start : start + size] = bytes(size)
        else:
            for _ in range(chance.randrange(1, 4)):
                copy[chance.randrange(len(copy))] = chance.randrange(256)
        yield bytes(copy)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_damaged_copies_of_a_pth_are_read_or_refused_in_one_sentence(tmp_path, is_zip):
    path = tmp_path / "m.pth"
    tensors = {"a": torch.arange(4.0), "b": torch.nn.Parameter(torch.ones(2, 2))}
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
    refusals = []
    for copy in damaged_copies(path.read_bytes(), 1200):
        # A new file each time: the tensors of the last one may still map it.
        path.unlink()
        path.write_bytes(copy)
        try:
            read = read_tensors(path, ModelFileError)[0]
        except ModelFileError as exc:
            refusals.append(str(exc))
        else:
            assert all(type(tensor) is torch.Tensor for tensor in read.values())
    assert len(refusals) > 200
    assert not any("\n" in refusal for refusal in refusals)


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise OSError(5, "Input/output error")

    path = write_checkpoint(tmp_path / "m.pth")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ModelFileError, match=r"m.pth cannot be read: Input/output error"):
        load_weights(path)


def test_a_zip_that_grows_when_it_is_read_is_refused(tmp_path):
    write_checkpoint(tmp_path / "m.pth")
    with (
        zipfile.ZipFile(tmp_path / "m.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
        packed.writestr("archive/zeros", bytes(50 << 20))
    with pytest.raises(ModelFileError, match="compressed"):
        read_tensors(tmp_path / "bomb.pth", ModelFileError)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors"])
def test_an_index_names_files_beside_it_only(tmp_path, name):
    (tmp_path / "model").mkdir()
    write_checkpoint(tmp_path / "secret.safetensors")
    index = tmp_path / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"emb.weight": name}}))
    with pytest.raises(ModelFileError, match="not a file beside it"):
        read_tensors(index, ModelFileError)


@pytest.mark.parametrize("key", ["time_offset", "shift_att"])
def test_a_tensor_that_is_far_larger_than_its_file_costs_nothing(tmp_path, key):
    config = load_model(
        write_checkpoint(tmp_path / "m.pth"), device="cpu", dtype="fp32", threads=1
    ).config
    huge = torch.zeros(1, dtype=torch.float16).expand(1 << 20, 1 << 20)
    tensors = tuned_state()
    name = "blocks.0.att.time_offset" if key == "time_offset" else key
    torch.save({**tensors, name: huge}, tmp_path / "state.pth")
    assert (tmp_path / "state.pth").stat().st_size < 1 << 20
    with pytest.raises(StateFileError, match=key):
        load_tuned_state(tmp_path / "state.pth", config, name="huge")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_why_a_file_cannot_be_opened_is_what_the_system_says(tmp_path, suffix):
    path = tmp_path / f"loop{suffix}"
    path.symlink_to(path)
    with pytest.raises(ModelFileError, match="cannot be read: Too many levels of symbolic links"):
        read_tensors(path, ModelFileError)
