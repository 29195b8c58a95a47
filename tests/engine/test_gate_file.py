"""Gate files: what is written comes back, and what does not fit is refused with the reason."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import write_checkpoint

from mrss_provider.engine.gate_file import SHAPES, load_gate
from mrss_provider.engine.gate_metadata import GateMetadata
from mrss_provider.engine.gating_layer import fold
from mrss_provider.errors import FileFormatError
from mrss_provider.model import load_model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("gates") / "tiny.safetensors")
    return load_model(path, device="cpu", dtype="fp32", threads=1).config


@pytest.fixture
def metadata(config):
    return GateMetadata(
        config.name,
        config.shape_text(),
        config.fingerprint,
        states={"tone": "abc"},
        training={"tokens": 12},
        licence="MIT",
    )


def tensors(seed=0):
    gen = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=gen) for name, shape in SHAPES.items()}
    made["features.scale"] = made["features.scale"].abs() + 0.1
    return made


def write(path, metadata, **changes):
    strings = metadata.to_strings() | changes.pop("strings", {})
    save_file(tensors() | changes, path, metadata={k: v for k, v in strings.items() if v})
    return path


def test_a_gate_comes_back_with_its_numbers_and_what_it_says_of_itself(tmp_path, config, metadata):
    gate = load_gate(write(tmp_path / "mine.safetensors", metadata), config, name="mine")
    assert gate.metadata == metadata
    assert gate.file == "mine"
    assert torch.equal(gate.layer.table, fold(*tensors().values()).table)
    save_file(tensors(1), tmp_path / "other.safetensors", metadata=metadata.to_strings())
    other = load_gate(tmp_path / "other.safetensors", config, name="other")
    again = load_gate(tmp_path / "mine.safetensors", config, name="again")
    assert gate.sha256 == again.sha256 != other.sha256


def test_a_gate_of_another_model_says_which_it_is_for_and_which_is_loaded(
    tmp_path, config, metadata
):
    elsewhere = replace(metadata, base_name="big", base_sha256="f" * 64)
    path = write(tmp_path / "mine.safetensors", elsewhere)
    with pytest.raises(FileFormatError) as caught:
        load_gate(path, config, name="mine")
    assert caught.value.status_code == 400
    for part in ("'mine'", "trained on big", "f" * 12, config.name, config.fingerprint[:12]):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strings": {"format": ""}}, "is not a gate"),
        ({"strings": {"format": "mrss-state"}}, "is not a gate.*'mrss-state'"),
        ({"strings": {"version": "2"}}, "version '2'; this program computes '1'"),
        ({"strings": {"features": "[]"}}, r"features '\[\]'; this program computes"),
        ({"strings": {"hidden": "8"}}, "hidden '8'"),
        ({"strings": {"base_model": "{}"}}, "does not name its model"),
        ({"strings": {"states": "["}}, "states must be a JSON object"),
        ({"hidden.bias": torch.zeros(3)}, "holds .*a gate holds"),
        ({"more": torch.zeros(3)}, "holds .*a gate holds"),
        ({"hidden.bias": torch.full((16,), torch.nan)}, "hidden.bias holds NaN"),
        ({"features.scale": torch.zeros(5)}, "features.scale must be above 0"),
        ({"features.scale": torch.full((5,), 1e-44)}, "features.scale is too small"),
    ],
)
def test_a_bad_file_is_refused_with_what_is_wrong(tmp_path, config, metadata, changes, says):
    path = write(tmp_path / "mine.safetensors", metadata, **changes)
    with pytest.raises(FileFormatError, match=says):
        load_gate(path, config, name="mine")


def test_a_damaged_file_is_refused(tmp_path, config):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        load_gate(path, config, name="mine")
