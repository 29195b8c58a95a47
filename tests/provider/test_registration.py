"""`register`, and the cache that it makes safe."""

import asyncio

import litellm
import pytest
from fakes import FakeBackend
from litellm.caching.caching import Cache

import mrss_provider
from mrss_provider.backend import ModelCard

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


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(("n", "num_asked"), [(1, 1), (2, 2)])
def test_stream_of_several_choices_stays_out_of_the_cache(n, num_asked):
    # LiteLLM's cache would give it back as one choice with the text of all.
    backend = FakeBackend()
    mrss_provider.register(backend)
    litellm.cache = Cache()

    async def ask():
        stream = await litellm.acompletion("mrss/base", messages=HI, n=n, stream=True, caching=True)
        chunks = [chunk async for chunk in stream]
        # The cache is written behind the reader's back.
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))
        return [(c.index, c.delta.content) for k in chunks for c in k.choices if c.delta.content]

    first, second = asyncio.run(ask()), asyncio.run(ask())
    assert len(backend.requests) == num_asked
    assert "".join(text for index, text in second if index == n - 1) == "Hello, world"
    assert first[0] == (0, "Hello, world")
