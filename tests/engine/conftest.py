"""A library of two states and a mixture, three more state files beside them, and its admin."""

from pathlib import Path

import pytest
import tiny_model

from mrss_provider.engine.library_admin import LibraryAdmin
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.model import ModelConfig, load_model


@pytest.fixture(scope="module")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tiny_model.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.pth")
    return load_model(path, device="cpu", dtype="fp32", threads=1).config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "states"
    folder.mkdir()
    for seed, name in enumerate(("knowledge", "tone")):
        tiny_model.write_state(folder / f"{name}.pth", seed=seed)
    (folder / "more").mkdir()
    for seed, name in enumerate(("a", "b", "c"), 10):
        tiny_model.write_state(folder / f"more/{name}.pth", seed=seed)
    (folder / "mixtures.toml").write_text('# ours\n[story]\nterms = "knowledge+tone"\n')
    return folder


@pytest.fixture
def library(folder: Path, model_config: ModelConfig) -> StateLibrary:
    return StateLibrary(folder, model_config, model_name="tiny", max_states=4)


@pytest.fixture
def admin(folder: Path, library: StateLibrary) -> LibraryAdmin:
    return LibraryAdmin(library, folder, max_state_bytes=1 << 20, strict=False)
