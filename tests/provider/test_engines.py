"""Which engine a call goes to, and what its absence is."""

import asyncio

import litellm
import pytest
from fakes import FakeBackend

from mrss_provider.backend import GenerateRequest
from mrss_provider.errors import EngineUnavailableError
from mrss_provider.provider import engines as module
from mrss_provider.provider.engines import ADMISSION_WAIT_S, FIRST_ADMISSION_WAIT_S, Engines
from mrss_provider.sampling_params import SamplingParams

HI = [{"role": "user", "content": "Hi"}]
REQUEST = GenerateRequest("base", SamplingParams(), prompt="x")


class Named(FakeBackend):
    """A backend that remembers how it was made."""

    def __init__(self, address="auto", api_key=None):
        super().__init__()
        self.made = (address, api_key)


@pytest.fixture
def made(monkeypatch):
    """Every backend that was made, in order."""
    made = []

    def make(*args, **kwargs):
        made.append(Named(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(module, "Client", make)
    monkeypatch.setattr(module, "LocalEngine", make)
    monkeypatch.delenv("MRSS_SOCKET", raising=False)
    return made


def test_call_decides_then_the_environment_then_one_is_started(made, monkeypatch):
    async def ask():
        engines = Engines()
        await engines.open(None, None, REQUEST)
        monkeypatch.setenv("MRSS_SOCKET", "/run/mrss.sock")
        await engines.open(None, None, REQUEST)
        await engines.open("http://a:9000", "key", REQUEST)

    asyncio.run(ask())
    assert [backend.made for backend in made] == [
        ("auto", None),
        ("unix:///run/mrss.sock", None),
        ("http://a:9000", "key"),
    ]


def test_address_and_key_have_one_client_each_until_closed(made):
    async def ask():
        engines = Engines()
        for key in ("a", "b", "a", "a"):
            await engines.open("http://a:9000", key, REQUEST)
        await engines.aclose()
        await engines.aclose()

    asyncio.run(ask())
    assert [backend.made[1] for backend in made] == ["a", "b"]
    assert all(backend.closed for backend in made)


def test_threads_wait_long_only_for_an_engine_that_answers(made):
    async def ask():
        engines = Engines()
        waits = [engines.admission_wait_s("http://a:9000")]
        await engines.open("http://a:9000", None, REQUEST)
        waits.append(engines.admission_wait_s("http://a:9000"))
        made[0].open_error = EngineUnavailableError("gone")
        with pytest.raises(EngineUnavailableError):
            await engines.open("http://a:9000", None, REQUEST)
        return [*waits, engines.admission_wait_s("http://a:9000")]

    assert asyncio.run(ask()) == [FIRST_ADMISSION_WAIT_S, ADMISSION_WAIT_S, FIRST_ADMISSION_WAIT_S]


@pytest.mark.parametrize("stream", [False, True])
def test_absent_engine_is_a_503_that_names_the_address(provider, tmp_path, stream):
    with pytest.raises(litellm.ServiceUnavailableError, match="no engine answers at unix://"):
        litellm.completion(
            "mrss/base", messages=HI, api_base=f"unix://{tmp_path}/none.sock", stream=stream
        )


def test_malformed_address_is_the_operators_mistake(provider):
    with pytest.raises(litellm.InternalServerError, match="an engine's address is"):
        litellm.completion("mrss/base", messages=HI, api_base="localhost:9000")
