"""Where a command's answers come from: a server, this process, or this user's shared engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from mrss_provider.backend import Backend
from mrss_provider.cli.output import note


@contextmanager
def connected(
    *,
    server: str | None,
    api_key: str | None = None,
    in_process: bool,
    overrides: Mapping[str, Any],
) -> Iterator[tuple[Backend, asyncio.Runner]]:
    """Yield a backend, and the runner whose loop it lives on; both are closed at the end.

    Args:
        server: address of an engine, `http://...` or `unix://...`.
        api_key: sent to that engine; MRSS_API_KEY when None.
        in_process: load the model here.
        overrides: engine settings given as flags; they describe the engine to load or start.

    Raises:
        typer.BadParameter: options that contradict each other.
        MRSSError: no engine answers, or the model cannot be loaded.
    """
    if server is not None and (in_process or overrides):
        raise typer.BadParameter(
            "--server asks an engine that runs; --in-process and the engine's options start one: "
            "give one or the other"
        )
    if in_process and api_key is not None:
        raise typer.BadParameter("--api-key is for an engine that runs; --in-process wants none")
    with asyncio.Runner() as runner:
        backend = (
            _own_engine(overrides) if in_process else _other_engine(server, api_key, overrides)
        )
        try:
            yield backend, runner
        finally:
            runner.run(backend.aclose())


def _own_engine(overrides: Mapping[str, Any]) -> Backend:
    note("loading the model in this process ...")
    from mrss_provider.async_engine import AsyncEngine
    from mrss_provider.config import EngineConfig

    return AsyncEngine(EngineConfig.from_env(overrides))


def _other_engine(server: str | None, api_key: str | None, overrides: Mapping[str, Any]) -> Backend:
    from mrss_provider.autostart import LocalEngine, engine_address
    from mrss_provider.client import Client

    address = None if overrides else engine_address(server)
    if address is not None:
        return Client(address, api_key=api_key)
    flags = {f"MRSS_{name.upper()}": str(value) for name, value in overrides.items()}
    return LocalEngine({**os.environ, **flags})
