"""`mrss compare` before a real proxy with backends of known speed and quality."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest
import yaml
from proxy_process import Proxy
from stub_backends import NUM_TOKENS, Stub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_PROMPTS = 20
WAIT_S = 60.0
KEY = f"sk-{secrets.token_hex(16)}"


@pytest.fixture(scope="module")
def stubs():
    stubs = {
        "better": Stub(right=0.95, chunk_s=0.004),
        "worse": Stub(right=0.4, chunk_s=0.06, first_s=0.2, error_rate=0.15),
        "twin-1": Stub(right=0.6, chunk_s=0.004, luck="1"),
        "twin-2": Stub(right=0.6, chunk_s=0.004, luck="2"),
        "steady": Stub(right=0.4, chunk_s=0.06, first_s=0.2),
    }
    yield stubs
    for stub in stubs.values():
        stub.stop()


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "calls.jsonl"


@pytest.fixture(scope="module")
def proxy(stubs, log):
    def entry(name, stub, arm, **params):
        served = {"model": f"openai/{name}", "api_base": stub.url, "api_key": "unused", **params}
        prices = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6}
        return {
            "model_name": name,
            "litellm_params": {**served, **prices},
            "model_info": {"id": arm},
        }

    config = {
        "model_list": [
            *(entry(name, stub, f"id-{name}") for name, stub in stubs.items()),
            entry("group", stubs["better"], "arm-better", weight=1),
            entry("group", stubs["worse"], "arm-worse", weight=1),
        ],
        "litellm_settings": {
            "callbacks": ["mrss_provider.compare.arm_log"],
            "num_retries": 0,
            "telemetry": False,
        },
        "router_settings": {"num_retries": 0, "disable_cooldowns": True},
    }
    path = log.parent / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    proxy = Proxy(path, {"MRSS_COMPARE_LOG": str(log), "LITELLM_MASTER_KEY": KEY}, num_workers=1)
    yield proxy
    proxy.stop()


@pytest.fixture
def folder(tmp_path):
    check = {"type": "contains", "value": "right"}
    lines = [
        {"messages": [{"role": "user", "content": f"Question {i}?"}], "checks": [check]}
        for i in range(NUM_PROMPTS)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "prompts.jsonl").write_text(text)
    return tmp_path


def command(proxy, folder, models, *args):
    words = [sys.executable, "-m", "mrss_provider.cli", "compare", "--models", models]
    words += ["--prompts", "prompts.jsonl", "--base-url", proxy.url, *map(str, args)]
    return {"args": words, "cwd": folder, "text": True, "env": {**os.environ, "MRSS_API_KEY": KEY}}


def compare(proxy, folder, models, *args):
    result = subprocess.run(
        **command(proxy, folder, models, *args), capture_output=True, timeout=WAIT_S * 3
    )
    return result, json.loads((folder / "comparison/summary.json").read_text())


def winners(summary, measure):
    return {c["winner"] for c in summary["comparisons"] if c["measure"] == measure}


def test_the_known_winner_is_found_in_speed_and_in_quality(proxy, folder):
    result, summary = compare(proxy, folder, "better,steady", "--seeds", 3)
    assert result.returncode == 0, result.stderr
    for measure in ("checks", "ttft_s", "tokens_per_s", "total_s"):
        assert winners(summary, measure) == {"better"}, result.stdout
    assert "checks: better is better than steady" in result.stdout
    rows = {row["model"]: row for row in summary["models"]}
    assert rows["better"]["model_ids"] == ["id-better"]
    assert rows["better"]["scores"]["checks"]["mean"] > 0.85
    assert rows["steady"]["scores"]["checks"]["mean"] < 0.6
    # 60 ms a token were served; what a busy proxy adds is not ours.
    assert 4 < rows["steady"]["tokens_per_s"]["p50"] < 17
    line = json.loads((folder / "comparison/results.jsonl").read_text().splitlines()[0])
    assert line["completion_tokens"] == NUM_TOKENS
    assert len(line["chunk_s"]) == NUM_TOKENS
    assert line["call_id"]


def test_twins_have_no_winner_in_quality(proxy, folder):
    result, summary = compare(proxy, folder, "twin-1,twin-2", "--seeds", 3)
    assert result.returncode == 0, result.stderr
    assert winners(summary, "checks") == {None}
    assert "checks: no difference found between twin-1 and twin-2" in result.stdout


def test_errors_are_results_and_tell_in_the_exit_status(proxy, folder):
    result, summary = compare(proxy, folder, "better,worse")
    assert result.returncode == 3
    assert "a bad day" in result.stderr
    rows = {row["model"]: row for row in summary["models"]}
    assert set(rows["worse"]["errors"]) == {"HTTP 400"}


def test_a_killed_comparison_goes_on_where_it_was(proxy, folder):
    first = subprocess.Popen(**command(proxy, folder, "better,steady", "--concurrency", 2))
    results = folder / "comparison/results.jsonl"
    deadline = time.monotonic() + WAIT_S
    while not results.exists() or results.read_bytes().count(b"\n") < 7:
        assert time.monotonic() < deadline
        assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait(WAIT_S)
    kept = results.read_bytes().rpartition(b"\n")[0].split(b"\n")
    assert 7 <= len(kept) < 2 * NUM_PROMPTS
    result, summary = compare(proxy, folder, "better,steady", "--concurrency", 2)
    assert result.returncode == 0, result.stderr
    assert f"{len(kept)} of {2 * NUM_PROMPTS} cells are done; going on" in result.stderr
    lines = results.read_bytes().splitlines()
    assert lines[: len(kept)] == kept
    keys = {(c["prompt"], c["model"], c["seed"]) for c in map(json.loads, lines)}
    assert len(keys) == len(lines) == summary["num_done"] == 2 * NUM_PROMPTS


def test_ctrl_c_in_a_terminal_goes_on_too(proxy, folder):
    first = subprocess.Popen(
        **command(proxy, folder, "better,steady", "--concurrency", 2), stderr=subprocess.PIPE
    )
    results = folder / "comparison/results.jsonl"
    deadline = time.monotonic() + WAIT_S
    while not results.exists() or results.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        assert first.poll() is None
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=WAIT_S)
    assert first.returncode == 130
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert results.read_bytes().endswith(b"\n")


async def call_group(proxy, num_calls):
    """Call the weighted group; return each answered call's id and text."""
    answers = []
    calls = iter(range(num_calls))

    # A connection each: the proxy closes those that rest, at times as they are used.
    once = httpx.AsyncClient(limits=httpx.Limits(max_keepalive_connections=0), timeout=WAIT_S)
    async with openai.AsyncOpenAI(
        base_url=f"{proxy.url}/v1", api_key=KEY, max_retries=0, http_client=once
    ) as client:

        async def work():
            for i in calls:
                try:
                    stream = await client.chat.completions.create(
                        model="group",
                        messages=[{"role": "user", "content": f"Hidden question {i}?"}],
                        stream=True,
                    )
                    text = ""
                    async for chunk in stream:
                        text += "".join(c.delta.content or "" for c in chunk.choices)
                    call_id = stream.response.headers["x-litellm-call-id"]
                    answers.append((call_id, text))
                except openai.BadRequestError:
                    continue

        await asyncio.gather(*(work() for _ in range(8)))
    return answers


def test_arms_of_a_weighted_group_are_told_apart_from_the_log(proxy, log, tmp_path):
    num_calls = 400
    answers = asyncio.run(call_group(proxy, num_calls))
    headers = {"authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{proxy.url}/health", headers=headers, timeout=WAIT_S).status_code == 200
    deadline = time.monotonic() + WAIT_S

    def logged():
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line for line in lines if line["group"] == "group"]

    while len(logged()) < num_calls:
        assert time.monotonic() < deadline, f"{len(logged())} calls are logged"
        time.sleep(0.1)
    assert "Hidden question" not in log.read_text()
    feedback = tmp_path / "feedback.jsonl"
    scores = [{"id": one, "score": 1.0 if "right" in text else -1.0} for one, text in answers]
    feedback.write_text("".join(json.dumps(line) + "\n" for line in scores))
    words = [sys.executable, "-m", "mrss_provider.cli", "compare", "report", "--json"]
    words += ["--from-log", log, "--feedback", feedback, "--group", "group"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert not any("log has not" in note for note in report["notes"])
    (group,) = report["groups"]
    assert group["num_calls"] == num_calls
    arms = {arm["arm"]: arm for arm in group["arms"]}
    assert set(arms) == {"arm-better", "arm-worse"}
    assert arms["arm-better"]["num_errors"] == 0 < arms["arm-worse"]["num_errors"]
    assert arms["arm-better"]["cost"] > 0
    found = {c["measure"]: c["winner"] for c in group["comparisons"]}
    assert found == dict.fromkeys(("ttft_s", "total_s", "error rate", "feedback"), "arm-better")
