"""`register`, and the cache that it makes safe."""

import asyncio

import litellm
import pytest
from fakes import FakeBackend, text, traced
from litellm.caching.caching import Cache

import mrss_provider
from mrss_provider.backend import Delta, ModelCard, TokenLogprob
from mrss_provider.config import EngineConfig
from mrss_provider.errors import ConfigError, ModelFileError

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def clean(monkeypatch):
    """LiteLLM as it is before `register`, and again afterwards."""
    other = {"provider": "another", "custom_handler": object()}
    monkeypatch.setattr(litellm, "custom_provider_map", [other])
    monkeypatch.setattr(litellm, "enable_caching_on_provider_specific_optional_params", False)
    monkeypatch.setattr(litellm, "models_by_provider", {})
    monkeypatch.setattr(litellm, "cache", None)
    yield other
    mrss_provider.handler.attach(None)
    mrss_provider.handler.close()


def test_registering_appends_once_and_keeps_others(clean):
    mrss_provider.register()
    mrss_provider.register()
    assert litellm.custom_provider_map == [
        clean,
        {"provider": "mrss", "custom_handler": mrss_provider.handler},
    ]
    assert litellm.models_by_provider["mrss"] == ["mrss/base"]
    assert litellm.get_model_info("mrss/base")["litellm_provider"] == "mrss"


@pytest.mark.usefixtures("clean")
def test_engine_in_process_answers_and_its_names_are_known(capfd):
    backend = FakeBackend()
    mrss_provider.register(backend)
    response = litellm.completion("mrss/tone", messages=HI)
    assert response.choices[0].message.content == "Hello, world"
    assert litellm.models_by_provider["mrss"] == ["mrss/base", "mrss/knowledge", "mrss/tone"]
    assert litellm.get_model_info("mrss/tone")["max_input_tokens"] == 4096
    # Registering again without an engine leaves it in place.
    mrss_provider.register()
    litellm.completion("mrss/tone", messages=HI)
    assert len(backend.requests) == 2
    assert "WARNING" not in capfd.readouterr().err


@pytest.mark.usefixtures("clean")
def test_model_list_says_what_the_engine_says_of_itself():
    able = ModelCard("able", "state", "", 0, 2048, supports=("tools", "thinking", "embeddings"))
    mrss_provider.register(FakeBackend(cards=[ModelCard("base", "base"), able]))
    assert litellm.supports_function_calling("mrss/able")
    assert litellm.supports_response_schema("mrss/able")
    assert litellm.supports_reasoning("mrss/able")
    assert not litellm.supports_vision("mrss/able")
    assert litellm.get_model_info("mrss/able")["max_input_tokens"] == 2048
    assert not litellm.supports_function_calling("mrss/base")
    assert not litellm.supports_reasoning("mrss/base")


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"mrss": {"gate": "fixed"}}, {"mrss": {"gate": "novelty"}}),
        ({"extra_body": {"top_k": 1}}, {"extra_body": {"top_k": 2}}),
        ({"min_p": 0.1}, {"min_p": 0.2}),
        ({"model": "mrss/tone"}, {"model": "mrss/knowledge"}),
    ],
)
def test_cache_tells_our_parameters_apart(first, second):
    backend = FakeBackend()
    mrss_provider.register(backend)
    litellm.cache = Cache()

    def ask(params):
        return litellm.completion(
            **{"model": "mrss/base", "messages": HI, "caching": True, **params}
        )

    answers = [ask(params) for params in (first, second, first)]
    assert len(backend.requests) == 2
    assert answers[2].id == answers[0].id != answers[1].id


def astream(ask, **call):
    async def main():
        chunks = [chunk async for chunk in await ask[1](**call)]
        # The cache is written behind the reader's back.
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))
        return chunks

    return asyncio.run(main())


CHAT = (litellm.completion, litellm.acompletion)
TEXT = (litellm.text_completion, litellm.atext_completion)
LOGPROB = Delta(text="Hi", num_tokens=1, logprobs=(TokenLogprob(1, b"Hi", -0.5),))
THOUGHT = Delta(reasoning="Hm.", num_tokens=1)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("read", [astream, lambda ask, **call: list(ask[0](**call))])
@pytest.mark.parametrize(
    ("ask", "script", "asked", "num_asked"),
    [
        (CHAT, [text("Hi")], {"messages": HI}, 1),
        # LiteLLM's cache would give them back as one choice with the text of all,
        (CHAT, [text("Hi")], {"messages": HI, "n": 2}, 2),
        # without these,
        (CHAT, [LOGPROB], {"messages": HI, "logprobs": True}, 2),
        (CHAT, [traced("Hi")], {"messages": HI, "mrss": {"trace": True}}, 2),
        (CHAT, [THOUGHT, text("Hi")], {"messages": HI}, 2),
        # and as the chunks of a chat.
        (TEXT, [text("Hi")], {"prompt": "Hi"}, 2),
    ],
)
def test_stream_that_the_cache_would_give_back_as_less_stays_out_of_it(
    read, ask, script, asked, num_asked
):
    backend = FakeBackend(script)
    mrss_provider.register(backend)
    litellm.cache = Cache()
    call = {"model": "mrss/base", "stream": True, "caching": True, **asked}
    first, second = read(ask, **call), read(ask, **call)
    assert len(backend.requests) == num_asked
    assert first[0].object == second[0].object


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("engine", ["http://127.0.0.1:9000", FakeBackend, 7])
def test_what_is_no_engine_is_refused_and_leaves_the_one_before(engine):
    mrss_provider.register(backend := FakeBackend())
    with pytest.raises(ConfigError, match=r"such as AsyncEngine\(\), got .*api_base"):
        mrss_provider.register(engine)
    litellm.completion("mrss/tone", messages=HI)
    assert len(backend.requests) == 1


@pytest.mark.usefixtures("clean")
def test_engine_that_cannot_be_loaded_leaves_the_one_before():
    def fail(config):
        raise ModelFileError("no such model")

    mrss_provider.register(backend := FakeBackend())
    with pytest.raises(ModelFileError, match="no such model"):
        mrss_provider.register(mrss_provider.AsyncEngine(EngineConfig(), loader=fail))
    litellm.completion("mrss/tone", messages=HI)
    assert len(backend.requests) == 1
