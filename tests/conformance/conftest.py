"""One engine and one proxy for the whole matrix."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import litellm
import pytest
from conformance.routes import Route, routes, running_engine, start_proxy, write_config

# The clients' own.
_WARNINGS = (
    "ignore:::litellm",
    "ignore:::pydantic",
    "ignore:::langchain_openai",
    # Of its own `echo` and other parameters that it passes on.
    "ignore:WARNING!",
    "ignore:::instructor",
)
_NEEDED = ("langchain_openai", "instructor", "anthropic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the clients warn, and leave out those that are not installed."""
    is_whole = all(importlib.util.find_spec(name) for name in _NEEDED)
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in _WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))
            if not is_whole and item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="needs the extra `conformance`"))


@pytest.fixture(scope="module", autouse=True)
def _closed_clients() -> Iterator[None]:
    """Close the clients, which keep connections open.

    Else these are closed when they are collected, which fails the test that runs just then.
    """
    before = {id(client) for client in _http_clients()}
    yield
    for client in _http_clients():
        if id(client) not in before:
            client.close()
    # LiteLLM hands out again what it has kept.
    litellm.in_memory_llm_clients_cache.flush_cache()


def _http_clients() -> list[Any]:
    # Anthropic's is one of httpx2. Not isinstance, at which some lazy objects of others warn.
    modules = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    kinds = tuple(module.Client for module in modules)
    return [one for one in gc.get_objects() if issubclass(type(one), kinds)]


@pytest.fixture(scope="module")
def engine_url() -> Iterator[str]:
    """An engine on the bundled model."""
    with running_engine() as url:
        yield url


@pytest.fixture(scope="module")
def proxy_url(engine_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A proxy before it, with the configuration that `mrss litellm-config` writes."""
    path = tmp_path_factory.mktemp("proxy") / "config.yaml"
    write_config(path, engine_url)
    proxy = start_proxy(path)
    yield proxy.url
    proxy.stop()


@pytest.fixture(scope="module")
def client_on(request: pytest.FixtureRequest) -> Any:
    """Return a client on a route; the proxy is started when the first needs it."""

    @cache
    def make(client: Any, route_id: str) -> Any:
        proxy = "" if route_id == "server" else request.getfixturevalue("proxy_url")
        found: list[Route] = routes(request.getfixturevalue("engine_url"), proxy)
        return client.on(next(route for route in found if route.id == route_id))

    return make
