"""`mrss serve`: the engine behind the OpenAI routes, in this process."""

from __future__ import annotations

import logging

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import DeltaStream, GenerateRequest, ModelCard
from mrss_provider.cli.output import note
from mrss_provider.config import EngineConfig, ServerConfig
from mrss_provider.server.run import address_of, run_server


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> None:
    """Serve until SIGTERM or Ctrl-C; running answers get `drain_s` seconds, a second one ends them.

    Raises:
        MRSSError: an address that is taken, a model that cannot be loaded.
    """
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, force=True)
    engine = _Announced(AsyncEngine(engine_config), address_of(server_config))
    run_server(engine, server_config, model=engine_config.model.name)


class _Announced:
    """The engine, which tells where it is and what it serves once it is loaded."""

    def __init__(self, engine: AsyncEngine, address: str) -> None:
        self._engine = engine
        self._address = address

    async def start(self) -> None:
        """Load the model, then tell."""
        await self._engine.start()
        names = ", ".join(f"mrss/{card.id}" for card in await self._engine.models())
        note(f"ready on {self._address}\nnames: {names}")

    async def open(self, request: GenerateRequest) -> DeltaStream:
        """Admit a request."""
        return await self._engine.open(request)

    async def models(self) -> list[ModelCard]:
        """Return the names that are served."""
        return await self._engine.models()

    async def aclose(self) -> None:
        """Release everything."""
        await self._engine.aclose()
