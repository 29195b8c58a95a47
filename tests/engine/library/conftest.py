"""A folder of three states and five mixtures, which no test changes, and its library."""

from pathlib import Path

import pytest
import tiny_model

from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.model import ModelConfig

MIXTURES = """
[story]
terms = "tone:0.5+knowledge"
temperature = 0.8
top_p = 0.9
sampling_order = "rwkv"
description = "Facts, told warmly"

[average]
terms = "knowledge+tone+base"
merge = "geometric"
gate = "fixed"

[sharp]
terms = "knowledge+tone"
cut = 0.4

[timed]
terms = "knowledge+tone"
merge = "power:0.5"
gate = { name = "schedule", points = "tone=0@0,1@2", over = "turns" }

[away]
terms = "base+tone:-0.25"
merge = "contrast"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    for seed, name in enumerate(("knowledge", "tone", "poetry")):
        tiny_model.write_state(folder / f"{name}.pth", seed=seed)
    (folder / "mixtures.toml").write_text(MIXTURES)
    (folder / "README.md").write_text("not a state")
    return folder


@pytest.fixture(scope="module")
def library(folder: Path, model_config: ModelConfig) -> StateLibrary:
    return StateLibrary(folder, model_config, model_name="tiny", max_states=4, context_len=512)
