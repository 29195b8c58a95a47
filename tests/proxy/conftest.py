"""One LiteLLM proxy, two workers, for the session, before two engines.

The shipped entries reach the scripted engine of the test process; `auto/...` has no address, so
it starts a real engine on the bundled model, as the shipped entries do for a user.
"""

import itertools
import tempfile
from pathlib import Path

import pytest
import yaml
from proxy_process import Proxy, proxy_config
from scripted_engine import EngineThread, ScriptedBackend, user

from mrss_provider.config import ServerConfig

_numbers = itertools.count()


@pytest.fixture(scope="session")
def folder():
    # A Unix socket's path has some 100 characters at most, and pytest's own folders are deep.
    with tempfile.TemporaryDirectory(prefix="mrss") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def backend():
    return ScriptedBackend()


@pytest.fixture(scope="session")
def engine(folder, backend):
    """The scripted engine; it listens on TCP too, for those who do without our provider."""
    engine = EngineThread(backend, ServerConfig(socket=folder / "scripted.sock"))
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def proxy(folder, engine):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(proxy_config(folder)))
    env = {
        "XDG_RUNTIME_DIR": str(folder),
        "MRSS_IDLE_EXIT_S": "1",
        "OTHER_API_BASE": f"{engine.url}/v1",
        "OTHER_API_KEY": "unused",
    }
    proxy = Proxy(path, env)
    yield proxy
    proxy.stop()


@pytest.fixture(scope="session")
def client(proxy):
    with proxy.client() as client:
        yield client


@pytest.fixture
def chat(client):
    """Call chat.completions, with a model and a prompt that most tests do not care about."""

    def call(prompt="Hi", *, model="mrss/tone", **kwargs):
        return client.chat.completions.create(model=model, messages=user(prompt), **kwargs)

    return call


@pytest.fixture
def unique():
    """A suffix that makes a prompt this test's own."""
    return f"{next(_numbers)}"
