"""Keys, limits and metrics in front of a real engine on a tiny model."""

import asyncio
import logging

import pytest
from fakes import serving
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from tiny_model import write_model_folder, write_state

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import GenerateRequest
from mrss_provider.client import Client
from mrss_provider.config import EngineConfig, ServerConfig
from mrss_provider.errors import AuthenticationError
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.server.app import create_app
from mrss_provider.server.auth import KeyRing
from mrss_provider.server.keys import Key, Limits, hash_of

KEY, ADMIN = "key-of-alice-01234", "key-of-admin-01234"
SECRET = "xylophone and 木琴"


@pytest.fixture(scope="module")
def engine_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "states").mkdir()
    write_state(folder / "states" / "tone.pth", seed=1)
    return EngineConfig(
        model=write_model_folder(folder / "model"),
        states=folder / "states",
        device="cpu",
        dtype="fp32",
        threads=1,
        max_rows=4,
        max_context_len=200,
    )


@pytest.fixture
def client(engine_config):
    limits = Limits(max_prompt_len=50, max_answer_len=20)
    keys = [Key("alice", hash_of(KEY), "user", limits), Key("op", hash_of(ADMIN), "admin")]
    app = create_app(AsyncEngine(engine_config), ServerConfig(), keys=KeyRing(fixed=keys))
    with TestClient(app, base_url="http://127.0.0.1:9000") as client:
        yield client


def complete(client, key=KEY, **body):
    asked = {"model": "tone", "prompt": SECRET, "seed": 1, "ignore_eos": True, **body}
    return client.post("/v1/completions", json=asked, headers={"authorization": f"Bearer {key}"})


def test_a_keys_lengths_hold_where_tokens_are_known(client):
    too_much = complete(client, max_tokens=21)
    assert too_much.status_code == 400
    assert too_much.json()["error"]["param"] == "max_tokens"
    too_long = complete(client, prompt="ab " * 60, max_tokens=1)
    assert too_long.status_code == 400
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    unsaid = complete(client)
    assert unsaid.json()["usage"]["completion_tokens"] == 20
    assert complete(client, ADMIN, max_tokens=21).status_code == 200


def test_the_log_tells_owner_and_numbers_but_no_text(client, caplog):
    caplog.set_level(logging.DEBUG)
    answer = complete(client, max_tokens=5).json()
    records = [record for record in caplog.records if record.name.startswith("mrss_provider")]
    (fields,) = [record.fields for record in records if hasattr(record, "fields")]
    assert (fields["owner"], fields["mixture"]) == ("alice", "tone")
    assert fields["completion_tokens"] == 5
    assert fields["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert fields["finish_reason"] == "length"
    assert not any("xylophone" in record.getMessage() for record in records)


def test_metrics_add_up_to_what_was_answered(client):
    usages = [complete(client, max_tokens=n).json()["usage"] for n in (1, 5, 9)]
    text = client.get("/metrics", headers={"authorization": f"Bearer {ADMIN}"}).text
    told = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert told["mrss_tokens_total", "completion"] == 15
    assert told["mrss_tokens_sampled_total",] == 15
    prompt = sum(usage["prompt_tokens"] for usage in usages)
    assert told["mrss_tokens_total", "prompt"] == prompt
    assert (told["mrss_rows_used",], told["mrss_rows_free",]) == (0, 4)
    assert told["mrss_device_total_bytes",] == 0


def request_of(**more) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    return GenerateRequest("tone", sampling, prompt="hi", **more)


def test_a_client_sends_its_key_or_that_of_the_environment(engine_config, tmp_path, monkeypatch):
    monkeypatch.setenv("MRSS_API_KEY", KEY)
    config = ServerConfig(socket=tmp_path / "s")
    with serving(AsyncEngine(engine_config), config):

        async def ask(client):
            stream = await client.open(request_of(timeout_s=60.0))
            deltas = [delta async for delta in stream]
            await client.aclose()
            return deltas[-1].usage.completion_tokens

        address = f"unix://{config.socket}"
        assert asyncio.run(ask(Client(address))) == 3
        assert asyncio.run(ask(Client(address, api_key=KEY))) == 3
        with pytest.raises(AuthenticationError):
            asyncio.run(ask(Client(address, api_key="x" * 20)))
