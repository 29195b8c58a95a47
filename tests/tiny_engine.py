"""The configuration of an engine on a tiny model and tiny states, which it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_model import write_model_folder, write_state

from mrss_provider.config import EngineConfig


def tiny_config(
    folder: Path, names: Sequence[str] = ("knowledge", "tone"), **values: Any
) -> EngineConfig:
    """Write a model and a state of each name into `folder`; return how an engine has them."""
    states = folder / "states"
    states.mkdir()
    for seed, name in enumerate(names):
        write_state(states / f"{name}.pth", seed=seed)
    model = write_model_folder(folder / "model")
    return EngineConfig(model=model, states=states, device="cpu", dtype="fp32", threads=1, **values)
