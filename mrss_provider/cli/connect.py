"""Where a command's answers come from: a server, this process, or this user's shared engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mrss_provider.backend import Backend
from mrss_provider.cli.output import CommandError, note


@contextmanager
def connected(
    *, server: str | None, in_process: bool, overrides: Mapping[str, Any]
) -> Iterator[tuple[Backend, asyncio.Runner]]:
    """Yield a backend, and the runner whose loop it lives on; both are closed at the end.

    Args:
        server: address of an engine, `http://...` or `unix://...`.
        in_process: load the model here.
        overrides: engine settings given as flags; they need a model of our own.

    Raises:
        CommandError: options that contradict each other.
        MRSSError: no engine answers, or the model cannot be loaded.
    """
    if server is not None and (in_process or overrides):
        raise CommandError(
            "--server asks an engine that runs; --in-process and the engine's options load one "
            "here: give one or the other"
        )
    with asyncio.Runner() as runner:
        if server is not None:
            backend = _client(server)
        elif in_process or overrides:
            backend = _own_engine(overrides)
        else:
            backend = _shared_engine()
        try:
            yield backend, runner
        finally:
            runner.run(backend.aclose())


def _client(server: str) -> Backend:
    from mrss_provider.client import Client

    return Client(server)


def _own_engine(overrides: Mapping[str, Any]) -> Backend:
    note("loading the model in this process ...")
    from mrss_provider.async_engine import AsyncEngine
    from mrss_provider.config import EngineConfig

    return AsyncEngine(EngineConfig.from_env(overrides))


def _shared_engine() -> Backend:
    raise NotImplementedError
