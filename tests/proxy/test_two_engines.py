"""The shipped deploy/proxy_config.yaml: two `mrss serve` processes, a proxy of two workers, Redis.

Without a `redis-server` on this machine the rest is tested without it.
"""

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass

import httpx
import openai
import pytest
import redis
import yaml
from proxy_process import ROOT, Proxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WAIT_S = 60.0
NUM_REQUESTS = 48
# The bundled model's two line breaks, with which its answers would end.
NO_LINES = {"11": -100, "257": -100}
KEY = f"sk-{secrets.token_hex(16)}"
ENGINE_KEY = f"sk-{secrets.token_hex(16)}"
REDIS_SERVER = shutil.which("redis-server")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(check, what):
    deadline = time.monotonic() + WAIT_S
    while not check():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.05)


class Engine:
    """An `mrss serve` with few slots, so that answers wait for one; killed and started at will."""

    def __init__(self):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "mrss_provider.cli", "serve", "--port", str(self.port)]
        command += ["--max-rows", "6", "--threads", "1"]
        env = {**os.environ, "MRSS_API_KEY": ENGINE_KEY}
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        until(self.is_ready, "an engine is ready")

    def is_ready(self):
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)

    def stop(self):
        self.process.terminate()
        self.process.wait(WAIT_S)


@pytest.fixture(scope="module")
def redis_port():
    if REDIS_SERVER is None:
        yield None
        return
    port = free_port()
    command = [REDIS_SERVER, "--port", str(port), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(
        [*command, "--requirepass", KEY, "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL
    )
    yield port
    process.terminate()
    process.wait(WAIT_S)


@pytest.fixture(scope="module")
def engines():
    engines = [Engine(), Engine()]
    for engine in engines:
        engine.start()
    yield engines
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="module")
def balancer(engines, redis_port, tmp_path_factory):
    """The proxy; its configuration is the shipped file, as it is where there is a Redis."""
    path = ROOT / "deploy/proxy_config.yaml"
    if redis_port is None:
        config = yaml.safe_load(path.read_text())
        for key in [key for key in config["router_settings"] if key.startswith("redis_")]:
            del config["router_settings"][key]
        path = tmp_path_factory.mktemp("proxy") / "config.yaml"
        path.write_text(yaml.safe_dump(config))
    proxy = Proxy(
        path,
        {
            "MRSS_ENGINE_A": engines[0].url,
            "MRSS_ENGINE_B": engines[1].url,
            "MRSS_ENGINE_KEY": ENGINE_KEY,
            "LITELLM_MASTER_KEY": KEY,
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(redis_port),
            "REDIS_PASSWORD": KEY,
            # A worker looks once a second by itself, and meanwhile meets what others know of.
            "DEFAULT_COOLDOWN_REDIS_READ_INTERVAL_SECONDS": "0.001",
        },
    )
    yield proxy
    proxy.stop()


def ask(proxy, model="mrss/tone", post=httpx.post, **headers):
    """Ask on a connection of its own, which may be either worker's; return the answer."""
    return post(
        f"{proxy.url}/v1/chat/completions",
        json={"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
        headers={"authorization": f"Bearer {KEY}", **headers},
        timeout=WAIT_S,
    )


def answered_by(proxy, post=httpx.post, **headers):
    answer = ask(proxy, post=post, **headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-litellm-model-id"]


def both_answer(proxy):
    return {answered_by(proxy) for _ in range(8)} == {"tone-a", "tone-b"}


@dataclass
class Reading:
    """What became of one request."""

    stream: bool
    text: str = ""
    finish_reason: str | None = None
    error: Exception | None = None


async def read(client, reading, model, number):
    try:
        answer = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"Where is the lighthouse? {number}"}],
            max_tokens=60,
            logit_bias=NO_LINES,
            extra_body={"ignore_eos": True},
            stream=reading.stream,
        )
        if not reading.stream:
            reading.text = answer.choices[0].message.content
            reading.finish_reason = answer.choices[0].finish_reason
            return
        async for chunk in answer:
            for choice in chunk.choices:
                reading.text += choice.delta.content or ""
                reading.finish_reason = choice.finish_reason or reading.finish_reason
    except (openai.APIError, httpx.HTTPError) as exc:
        reading.error = exc


def test_a_session_stays_with_its_engine_and_sessions_spread(balancer):
    of_session = {}
    for number in range(12):
        headers = {"x-litellm-session-id": f"session-{number}"}
        with httpx.Client() as connection:
            # Without Redis a session stays with its engine while it stays with its worker.
            post = connection.post if REDIS_SERVER is None else httpx.post
            seen = {answered_by(balancer, post, **headers) for _ in range(4)}
        assert len(seen) == 1
        of_session[number] = seen.pop()
    # A fair coin leaves one side empty once in two thousand times.
    assert set(of_session.values()) == {"tone-a", "tone-b"}


# A name of its own, which cools down, and one that only the wildcard has, which does not.
@pytest.mark.parametrize("model", ["mrss/tone", "mrss/tone:2+knowledge"])
def test_a_kill_under_load_loses_only_what_had_begun_and_says_so(balancer, engines, model):
    until(lambda: both_answer(balancer), "both engines answer")
    readings = [Reading(stream=number % 3 > 0) for number in range(NUM_REQUESTS)]

    async def main():
        async with openai.AsyncOpenAI(
            base_url=f"{balancer.url}/v1", api_key=KEY, max_retries=0, timeout=WAIT_S
        ) as client:
            tasks = [
                asyncio.create_task(read(client, reading, model, number))
                for number, reading in enumerate(readings)
            ]
            # Some streams have begun, others are admitted and wait for a slot.
            while sum(bool(reading.text) for reading in readings) < NUM_REQUESTS // 4:
                await asyncio.sleep(0.01)
            unbegun = [reading for reading in readings if not reading.text]
            engines[0].kill()
            await asyncio.gather(*tasks)
            return unbegun

    try:
        unbegun = asyncio.run(main())
        broken = [reading for reading in readings if reading.error is not None]
        assert len([reading for reading in unbegun if reading.stream]) >= 4
        # Everything that had delivered nothing has its whole answer.
        assert [str(r.error) for r in broken if not r.text] == []
        assert [r for r in broken if not r.stream] == []
        assert all(r.finish_reason == "length" for r in readings if r.error is None)
        # What had begun has an error event, inside an answer that HTTP ends as it should.
        # (Of three rows a request, so few run at once that all may be the other engine's.)
        assert broken or model != "mrss/tone"
        for reading in broken:
            assert type(reading.error) is openai.APIError
            assert "broke off" in str(reading.error)
            assert reading.finish_reason is None
        # And nobody notices the dead engine any more.
        statuses = Counter(ask(balancer, model).status_code for _ in range(20))
        assert statuses == {200: 20}
    finally:
        engines[0].start()


async def read_events(client, reading, path, body):
    """Read a stream of any wire; its text is where the wire has it."""
    try:
        async with client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                reading.error = AssertionError((await answer.aread()).decode())
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    take_event(reading, json.loads(line[6:]))
    except httpx.HTTPError as exc:
        reading.error = exc


def take_event(reading, event):
    kind = event.get("type", "")
    if event.get("error") or kind in ("error", "response.failed"):
        reading.error = AssertionError(json.dumps(event))
    elif kind == "response.output_text.delta":
        reading.text += event["delta"]
    elif kind == "content_block_delta":
        reading.text += event["delta"].get("text", "")
    elif kind in ("response.completed", "response.incomplete", "message_stop"):
        reading.finish_reason = kind
    for choice in event.get("choices", ()):
        reading.text += choice.get("text") or ""
        reading.finish_reason = choice.get("finish_reason") or reading.finish_reason


QUESTION = "Where is the lighthouse?"
WIRES = {
    "/v1/completions": {"prompt": QUESTION, "max_tokens": 60},
    "/v1/responses": {"input": QUESTION, "max_output_tokens": 60},
    "/v1/messages": {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60},
}


@pytest.mark.parametrize("path", WIRES)
def test_a_stream_of_any_wire_that_had_not_begun_is_answered(balancer, engines, path):
    until(lambda: both_answer(balancer), "both engines answer")
    readings = [Reading(stream=True) for _ in range(NUM_REQUESTS)]
    body = {"model": "mrss/tone", "stream": True, **WIRES[path]}
    body |= {"logit_bias": NO_LINES, "ignore_eos": True}

    async def main():
        headers = {"authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(max_connections=NUM_REQUESTS)
        async with httpx.AsyncClient(
            base_url=balancer.url, headers=headers, timeout=WAIT_S, limits=limits
        ) as client:
            tasks = [
                asyncio.create_task(read_events(client, reading, path, body))
                for reading in readings
            ]
            while sum(bool(reading.text) for reading in readings) < NUM_REQUESTS // 4:
                await asyncio.sleep(0.01)
            unbegun = [reading for reading in readings if not reading.text]
            engines[0].kill()
            await asyncio.gather(*tasks)
            return unbegun

    try:
        unbegun = asyncio.run(main())
        assert len(unbegun) >= 4
        broken = [reading for reading in readings if reading.error is not None]
        assert [str(r.error) for r in broken if not r.text] == []
        assert all(r.text and r.finish_reason for r in readings if r.error is None)
        # LiteLLM lets another engine continue a response that had begun.
        assert bool(broken) == (path != "/v1/responses")
        assert all("broke off" in str(reading.error) for reading in broken)
    finally:
        engines[0].start()


@pytest.mark.skipif(REDIS_SERVER is None, reason="there is no redis-server")
def test_workers_share_what_they_know_of_a_dead_engine(balancer, engines, redis_port):
    shared = redis.Redis(port=redis_port, password=KEY)
    until(lambda: both_answer(balancer), "both engines answer")
    engines[0].kill()
    try:
        # One of the workers meets it, then neither goes there: no request is tried twice.
        until(lambda: ask(balancer).headers["x-litellm-attempted-retries"] != "0", "a retry")
        until(lambda: shared.keys("*tone-a*cooldown*"), "the other is told")
        # Fewer than the time takes for which it is cooled down, also on a busy machine.
        answers = [ask(balancer) for _ in range(12)]
        assert {answer.headers["x-litellm-model-id"] for answer in answers} == {"tone-b"}
        assert [a.headers["x-litellm-attempted-retries"] for a in answers] == ["0"] * 12
    finally:
        engines[0].start()
        shared.close()


def test_an_engine_that_comes_back_is_used_again(balancer, engines):
    engines[1].kill()
    assert all(ask(balancer).status_code == 200 for _ in range(12))
    engines[1].start()
    until(lambda: both_answer(balancer), "the engine that came back answers")


def test_a_mistake_of_the_caller_cools_nothing_down(balancer):
    for _ in range(4):
        answer = ask(balancer, "mrss/knowledge+ton")
        assert answer.status_code == 400
        assert "did you mean 'tone'" in answer.text
    until(lambda: both_answer(balancer), "both engines answer")
