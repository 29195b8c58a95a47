"""A Ray Serve application on one machine: two engines on the bundled model behind one ingress."""

import os
import secrets
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from mrss_provider.backend import GenerateRequest, Message
from mrss_provider.errors import ConfigError
from mrss_provider.sampling_params import SamplingParams

# Ray's imports warn of deprecated ways of others, and this suite turns warnings into errors.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ray = pytest.importorskip("ray")
    from ray import serve

    from mrss_provider import ray_app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # Ray's own: sockets and files of its threads, and deprecations of the packages that it uses.
    pytest.mark.filterwarnings("default"),
]
ROOT = Path(__file__).parent.parent
PORT = 18471
URL = f"http://127.0.0.1:{PORT}"


def chat(*contents, system=None, model="tone"):
    roles = ["user", "assistant"] * len(contents)
    messages = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
    if system:
        messages.insert(0, Message("system", system))
    return GenerateRequest(model, SamplingParams(), messages=tuple(messages))


def test_turns_of_a_conversation_share_their_key_and_others_do_not():
    key = ray_app.routing_key
    first = key(chat("Hi", system="Be kind."))
    assert key(chat("Hi", "Hello.", "Who are you?", system="Be kind.")) == first
    assert key(chat("Hi", system="Be kind.", model="knowledge+tone")) == first
    assert key(chat("Ho", system="Be kind.")) != first
    assert key(chat("Hi")) != first
    prompt = GenerateRequest("tone", SamplingParams(), prompt="a" * 300)
    longer = GenerateRequest("tone", SamplingParams(), prompt="a" * 300 + "b")
    assert key(prompt) == key(longer)


def test_arguments_are_checked_by_name_and_value():
    config, engine, _ = ray_app.read_args({"min_engines": "2", "max_engines": 3, "max_rows": "7"})
    assert (config.min_engines, config.max_engines, engine.max_rows) == (2, 3, 7)
    for args in ({"max_row": 1}, {"min_engines": 2}, {"gpus": "many"}, {"cpus": 0}):
        with pytest.raises(ConfigError, match=next(iter(args))):
            ray_app.read_args(args)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """Ray on this machine alone, with the application in it; all of it ends with the module."""
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    folder = tmp_path_factory.mktemp("ray", numbered=False)
    # Its processes know each other by a token, which Ray would else leave in the user's home.
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    ray.init(
        num_cpus=2,
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": env},
        _temp_dir=str(folder),
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        args = {"min_engines": 2, "max_engines": 2, "cpus": 0.5, "threads": 1}
        serve.run(ray_app.build(args), name="mrss")
        yield folder
    finally:
        serve.shutdown()
        ray.shutdown()
        del os.environ["RAY_AUTH_TOKEN_PATH"]


@pytest.fixture
def logs(app):
    return app / "session_latest/logs/serve"


@pytest.fixture
def client(app):
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def ask(client, prompt="Where is the lighthouse?", model="knowledge+tone", **kwargs):
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model=model, messages=messages, temperature=0, **kwargs)


def test_answers_are_those_of_the_server(client):
    assert ask(client).choices[0].message.content.startswith("The lighthouse stands on Bridge")
    assert {"base", "knowledge", "tone"} <= {model.id for model in client.models.list()}
    with pytest.raises(openai.BadRequestError, match="did you mean 'tone'"):
        ask(client, model="ton")
    with pytest.raises(openai.BadRequestError, match="top_p"):
        ask(client, top_p=3)


def endless(client, num_tokens=100_000):
    return client.completions.create(
        model="tone",
        prompt="Once",
        seed=1,
        max_tokens=num_tokens,
        extra_body={"ignore_eos": True},
        stream=True,
    )


def test_a_stream_comes_in_pieces(client):
    moments = [time.monotonic() for _ in endless(client, 1500)]
    assert len(moments) > 30
    # Not all at the end.
    assert moments[len(moments) // 2] - moments[0] > 0.2 * (moments[-1] - moments[0])


def test_a_conversation_stays_with_its_engine_and_conversations_spread(client, logs):
    def calls():
        """Return engine -> answers that it has given, from Ray's logs."""
        paths = logs.glob("replica_mrss_engine_*.log")
        return Counter({path.name: path.read_text().count("CALL generate") for path in paths})

    def turn(*contents):
        roles = ["user", "assistant"] * len(contents)
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        before = calls()
        answer = client.chat.completions.create(model="tone", messages=messages, max_tokens=4)
        while not (new := calls() - before):
            time.sleep(0.01)
        (engine,) = new
        return engine, answer.choices[0].message.content

    used = set()
    # A fair coin leaves one side empty once in 32,768 times.
    for number in range(16):
        engine, text = turn(f"I am number {number}.")
        assert turn(f"I am number {number}.", text, "Who am I?")[0] == engine
        used.add(engine)
    assert len(used) == 2


def test_many_at_once(client):
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda i: ask(client, f"Who are you, {i}?"), range(24)))
    assert all(answer.choices[0].finish_reason for answer in answers)
    states = list(serve.status().applications["mrss"].deployments["engine"].replica_states.items())
    assert states == [("RUNNING", 2)]


def test_a_client_that_leaves_ends_its_answer(client):
    for _ in range(100):
        stream = endless(client)
        next(stream)
        stream.close()
    # More than the slots of both engines: were any of them still held, this would wait.
    assert ask(client, "Once").choices[0].finish_reason


def engines():
    """Return the processes of the engines; Ray names them."""
    found = psutil.process_iter(["cmdline"])
    return [p for p in found if "ServeReplica:mrss:engine" in "".join(p.info["cmdline"] or ())]


def ask_for_status():
    body = {"model": "tone", "prompt": "Once", "max_tokens": 1}
    return httpx.post(f"{URL}/v1/completions", json=body, timeout=60).status_code


def test_a_killed_engine_breaks_its_streams_cleanly_and_is_replaced(client):
    stream = endless(client)
    next(stream)
    killed = engines()
    assert len(killed) == 2
    for process in killed:
        process.kill()
    with pytest.raises(openai.APIError, match="the engine's answer broke off"):
        list(stream)
    deadline = time.monotonic() + 120
    while (status := ask_for_status()) != 200:
        assert status == 503
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert ask(client).choices[0].finish_reason
