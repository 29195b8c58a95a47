"""A server over a real engine with tiny models, in folders called `models` and `states`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tiny_model import write_model_folder, write_state

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.config import EngineConfig, ServerConfig
from mrss_provider.server.app import create_app

if TYPE_CHECKING:
    from starlette.testclient import TestClient


def write_folders(folder: Path) -> EngineConfig:
    """Write two models, two states, and three more that no start finds."""
    states, models = folder / "states", folder / "models"
    (states / "more").mkdir(parents=True)
    for seed, name in enumerate(("knowledge", "tone", "more/a", "more/b", "more/c")):
        write_state(states / f"{name}.pth", seed=seed)
    (states / "mixtures.toml").write_text('# ours\n[story]\nterms = "knowledge+tone"\n')
    first = write_model_folder(models / "first")
    write_model_folder(models / "second", seed=7)
    return EngineConfig(
        model=first,
        states=states,
        models=models,
        device="cpu",
        dtype="fp32",
        threads=1,
        max_rows=8,
        max_context_len=200,
        max_state_bytes=1 << 20,
    )


@contextlib.contextmanager
def serving_engine(config: EngineConfig, **server: object) -> Iterator[TestClient]:
    """Yield a client of a server over an engine."""
    # Here and not above: it wants packages that not every machine with a GPU has.
    from starlette.testclient import TestClient

    app = create_app(AsyncEngine(config), ServerConfig(**server), model="tiny")  # type: ignore[arg-type]
    with TestClient(app, base_url="http://127.0.0.1:9000") as client:
        yield client
