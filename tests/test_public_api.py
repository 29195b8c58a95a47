"""What `mrss_provider` exports, and what importing it does not load."""

import subprocess
import sys

import pytest

import mrss_provider
from mrss_provider.mixture import Mixture
from mrss_provider.provider import MRSSProvider

HEAVY = {"torch", "litellm", "httpx", "triton", "starlette", "uvicorn", "jinja2", "numpy"}


def modules_after(code):
    """Return the top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_all_is_the_promise():
    assert mrss_provider.__all__ == [
        "AsyncEngine",
        "Client",
        "EngineConfig",
        "Mixture",
        "SamplingParams",
        "__version__",
        "handler",
        "register",
        "text_stream_retries",
    ]
    assert set(mrss_provider.__all__) <= set(dir(mrss_provider))


@pytest.mark.parametrize("name", mrss_provider.__all__)
def test_every_exported_name_resolves(name):
    assert getattr(mrss_provider, name) is getattr(mrss_provider, name)


def test_handler_is_an_instance():
    # LiteLLM accepts a class or a module here and fails at the first request.
    assert isinstance(mrss_provider.handler, MRSSProvider)
    assert mrss_provider.Mixture is Mixture


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Handler'"):
        mrss_provider.Handler  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
    assert not modules_after("import mrss_provider") & HEAVY


def test_client_and_wire_load_without_torch_and_litellm():
    loaded = modules_after("import mrss_provider.client, mrss_provider.openai_schema")
    assert not loaded & {"torch", "litellm", "starlette", "uvicorn"}


def test_provider_loads_without_torch_and_starts_no_thread():
    code = (
        "from mrss_provider import handler; import threading; "
        "assert not [t for t in threading.enumerate() if t.name == 'mrss-io']"
    )
    assert not modules_after(code) & {"torch", "starlette", "uvicorn"}
