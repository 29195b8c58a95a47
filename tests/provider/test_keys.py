"""A deployment's key goes to the engine, and what the engine says of it comes back."""

import litellm
import pytest
from fakes import FakeBackend, serving
from litellm.utils import custom_llm_setup

from mrss_provider.config import ServerConfig
from mrss_provider.provider import MRSSProvider

KEY = "key-of-litellm-01234"


@pytest.fixture
def address(tmp_path, monkeypatch):
    monkeypatch.setenv("MRSS_API_KEY", KEY)
    with serving(FakeBackend(), ServerConfig(socket=tmp_path / "s")):
        # The server has read its keys; the client must not find one there.
        monkeypatch.delenv("MRSS_API_KEY")
        provider = MRSSProvider()
        entry = {"provider": "mrss", "custom_handler": provider}
        monkeypatch.setattr(litellm, "custom_provider_map", [entry])
        custom_llm_setup()
        yield f"unix://{tmp_path / 's'}"
        provider.close()


def ask(address, **more):
    messages = [{"role": "user", "content": "hi"}]
    return litellm.completion("mrss/tone", messages, api_base=address, **more)


def test_the_deployments_key_is_sent(address):
    assert ask(address, api_key=KEY).choices[0].message.content == "Hello, world"


@pytest.mark.parametrize("key", [None, "key-of-nobody-01234"])
@pytest.mark.parametrize("stream", [False, True])
def test_without_it_the_error_is_litellms(address, key, stream):
    with pytest.raises(litellm.AuthenticationError) as caught:
        ask(address, api_key=key, stream=stream)
    assert caught.value.status_code == 401


def test_the_environments_key_is_sent_else(address, monkeypatch):
    monkeypatch.setenv("MRSS_API_KEY", KEY)
    assert ask(address).choices[0].message.content == "Hello, world"
