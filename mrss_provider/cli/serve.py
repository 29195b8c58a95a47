"""`mrss serve`: the engine behind the OpenAI routes, in this process."""

from __future__ import annotations

import asyncio
import logging

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.cli.output import note
from mrss_provider.config import EngineConfig, ServerConfig, misspelt_variables
from mrss_provider.server.hosts import address_of, playground_url
from mrss_provider.server.logs import log_to_stderr
from mrss_provider.server.run import run_server

log = logging.getLogger(__name__)


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> None:
    """Serve until SIGTERM or Ctrl-C; running answers get `drain_s` seconds, a second one ends them.

    Raises:
        MRSSError: an address that is taken, a model that cannot be loaded, a device that is lost.
    """
    log_to_stderr(server_config.log_format)
    for variable, meant in misspelt_variables().items():
        log.warning("%s is no setting; is it %s that is meant?", variable, meant)
    engine = AsyncEngine(engine_config)
    announcements: set[asyncio.Task[None]] = set()

    def on_ready() -> None:
        task = asyncio.create_task(_announce(engine, server_config))
        # A task that nobody holds may be collected before it has run.
        announcements.add(task)
        task.add_done_callback(announcements.discard)

    run_server(engine, server_config, model=engine_config.model.name, on_ready=on_ready)


async def _announce(engine: AsyncEngine, config: ServerConfig) -> None:
    """Tell where the engine is and what it serves."""
    names = ", ".join(f"mrss/{card.id}" for card in await engine.models())
    url = playground_url(config)
    page = f"playground: {url}\n" if url else ""
    note(f"ready on {address_of(config)}\n{page}names: {names}")
