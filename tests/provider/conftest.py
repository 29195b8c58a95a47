"""A provider of its own for each test, registered with LiteLLM as a user's would be."""

from pathlib import Path

import litellm
import pytest
from fakes import FakeBackend
from litellm.utils import custom_llm_setup

from mrss_provider.provider import MRSSProvider

litellm.suppress_debug_info = True

# LiteLLM's own; as an error, each would end the call that met it.
LITELLM_WARNINGS = ("ignore:::litellm", "ignore:::pydantic")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in LITELLM_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture
def backend():
    return FakeBackend()


@pytest.fixture
def provider(backend, monkeypatch):
    provider = MRSSProvider(backend)
    entry = {"provider": "mrss", "custom_handler": provider}
    monkeypatch.setattr(litellm, "custom_provider_map", [entry])
    custom_llm_setup()
    yield provider
    provider.close()
