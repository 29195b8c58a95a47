"""Structured output of the bundled model, as an app asks for it: directly and through LiteLLM."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import jsonschema
import openai
import pytest
import yaml
from fakes import serving
from proxy_process import Proxy, proxy_config
from pydantic import BaseModel, ConfigDict, Field

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.config import EngineConfig, ServerConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)
    kind: Literal["alpha", "beta"]
    tags: list[Annotated[str, Field(max_length=8)]] = Field(max_length=2)


FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "person", "schema": Person.model_json_schema(), "strict": True},
}
MESSAGES = [{"role": "user", "content": "Who keeps the bakery?"}]
MAX_TOKENS = 200


@pytest.fixture(scope="module", params=["direct", "proxy"])
def client(request):
    # A Unix socket's path has some 100 characters at most.
    with tempfile.TemporaryDirectory(prefix="mrss") as name:
        folder = Path(name)
        # Where the shipped entries of `proxy_config` look for their engine.
        socket = folder / "scripted.sock"
        config = ServerConfig(socket=socket)
        with serving(AsyncEngine(EngineConfig(threads=1)), config):
            if request.param == "direct":
                with direct(socket) as client:
                    yield client
                return
            (folder / "config.yaml").write_text(yaml.safe_dump(proxy_config(folder)))
            proxy = Proxy(folder / "config.yaml", {}, num_workers=1)
            try:
                with proxy.client() as client:
                    yield client
            finally:
                proxy.stop()


def direct(path):
    import httpx

    transport = httpx.HTTPTransport(uds=str(path))
    return openai.OpenAI(
        base_url="http://localhost/v1",
        api_key="unused",
        max_retries=0,
        http_client=httpx.Client(transport=transport, timeout=120.0),
    )


def ask(client, **options):
    options = {"model": "mrss/knowledge+tone", "max_tokens": MAX_TOKENS, "seed": 1} | options
    return client.chat.completions.create(messages=MESSAGES, **options)


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_answers_follow_the_schema_at_every_temperature(client, temperature):
    answer = ask(client, response_format=FORMAT, temperature=temperature, n=3, top_p=1)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), Person.model_json_schema())


def test_a_stream_follows_the_schema(client):
    texts, reasons = {}, {}
    for chunk in ask(client, response_format=FORMAT, stream=True, n=2, temperature=1):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert reasons == {0: "stop", 1: "stop"}
    for text in texts.values():
        Person.model_validate_json(text)


def test_the_client_parses_the_answer_into_a_model(client):
    answer = client.chat.completions.parse(
        model="mrss/tone", messages=MESSAGES, response_format=Person, max_tokens=MAX_TOKENS
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_any_object_an_expression_and_a_grammar(client):
    some = ask(client, response_format={"type": "json_object"})
    assert isinstance(json.loads(some.choices[0].message.content), dict)
    for body, allowed in (
        ({"regex": "(red|green)"}, {"red", "green"}),
        ({"grammar": 'start: "yes" | "no"'}, {"yes", "no"}),
    ):
        answer = ask(client, extra_body={"mrss": body})
        assert answer.choices[0].message.content in allowed


def test_a_schema_that_cannot_be_followed_is_a_400_that_names_the_keyword(client):
    schema = {"type": "array", "uniqueItems": True}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="'uniqueItems'") as caught:
            ask(client, response_format=wanted, stream=stream)
        assert caught.value.response.json()["error"]["param"] == "response_format"
