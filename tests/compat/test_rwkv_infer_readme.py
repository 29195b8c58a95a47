"""RWKV-Infer's README against `mrss serve`, with real curl processes and the bundled model."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mrss_provider.config import BUNDLED_STATES, DEMO_MODEL

SCRIPT = Path(__file__).with_name("rwkv_infer_readme.sh")
MODEL = "RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth"
# The README's files -> ours.
STATES = {
    "state": "tone",
    "jp7b-bancho": "tone",
    "ojousama2": "knowledge",
    "secret": "knowledge",
}
SUCCESS = {"status": "success"}

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder such as RWKV-Infer's users have: models and states as `.pth`, named as there."""
    folder = tmp_path_factory.mktemp("rwkv infer")
    models, states = folder / "models", folder / "states"
    models.mkdir()
    states.mkdir()
    torch.save(load_file(DEMO_MODEL / "model.safetensors"), models / MODEL)
    for name in ("vocab.txt", "card.toml"):
        shutil.copy(DEMO_MODEL / name, models)
    for name, ours in STATES.items():
        tensors = load_file(BUNDLED_STATES / f"{ours}.safetensors")
        if name == "secret":
            tensors = {key: tensor * 0.5 for key, tensor in tensors.items()}
        kept = {key: t for key, t in tensors.items() if not key.startswith("shift")}
        torch.save(kept, states / f"{name}.pth")
    return folder


@pytest.fixture(scope="module")
def port(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (folder / "log").open("w")
    command = [sys.executable, "-m", "mrss_provider.cli", "serve", "--port", str(port)]
    command += ["--model", str(folder / "models" / MODEL), "--states", str(folder / "states")]
    server = subprocess.Popen([*command, "--threads", "1"], stderr=log, stdout=log, cwd=folder)
    try:
        _wait_until_ready(port, server)
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        log.close()


def _wait_until_ready(port, server):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the server did not become ready")


def replay(folder, port) -> list[str]:
    """Run the script; return what each of its lines answered."""
    done = subprocess.run(
        ["bash", str(SCRIPT)],
        cwd=folder,
        env={**os.environ, "PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stderr == ""
    answers, lines = [], done.stdout.splitlines()
    while lines:
        line = lines.pop(0)
        if line.startswith("data: "):
            # A stream is one answer, up to its end.
            events = [line]
            while events[-1] != "data: [DONE]":
                events.append(lines.pop(0))
            line = "\n".join(events)
        if line:
            answers.append(line)
    return answers


def check(answers) -> None:
    """Compare the answers with what the README promises."""
    (
        load, again, state, mixture, names, chat, stream, weights, text, remove, after, adapter,
        unload, health,
    ) = answers  # fmt: skip
    for answer in (load, again, state, mixture, weights, remove, unload):
        assert json.loads(answer) == SUCCESS
    ids = [item["id"] for item in json.loads(names)]
    assert ids[0] == "RWKV x060 1B6 Base"
    assert {"RWKV x060 1B6 Base State Test", "RWKV x060 1B6 Base MRSS Test"} <= set(ids)
    spoken = json.loads(chat)
    assert spoken["object"] == "chat.completion"
    assert spoken["choices"][0]["message"]["content"]
    assert spoken["mrss"] == {"mixture": "State-Test", "rows": 1}
    events = [json.loads(line[6:]) for line in stream.splitlines() if line and "[DONE]" not in line]
    assert events[0]["object"] == "chat.completion.chunk"
    assert events[0]["mrss"]["rows"] == 4
    assert events[0]["mrss"]["mixture"].endswith("~geometric~fixed")
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    completed = json.loads(text)
    assert completed["object"] == "text_completion"
    # Two of the four weights are left: the others are padded with zeros and cost nothing.
    assert completed["mrss"]["rows"] == 2
    assert json.loads(after) == [{"object": "models", "id": "RWKV x060 1B6 Base"}]
    assert "adapters are not served" in json.loads(adapter)["detail"]
    assert json.loads(health) == {"message": "ok", "status_code": 200}


def test_its_lines_work_unchanged(folder, port):
    check(replay(folder, port))


@pytest.mark.slow
def test_its_lines_work_while_others_are_answered(folder, port):
    """Models and states come and go under load: each stream ends well, or says why it cannot."""
    address = f"http://127.0.0.1:{port}"
    body = {"model": "base", "prompt": "Hello", "max_tokens": 200, "stream": True}
    body |= {"temperature": 1.0, "ignore_eos": True}
    ends, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            headers = ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
            command = ["curl", "--silent", f"{address}/v1/completions", *headers]
            done = subprocess.run(command, capture_output=True, text=True, timeout=100)
            ends.append((done.returncode, done.stdout))

    # Something is loaded again first: the script ends with nothing.
    order = json.dumps({"model_filename": MODEL, "model_viewname": "x"})
    headers = ["-H", "Content-Type: application/json", "-d", order]
    subprocess.run(["curl", "--silent", f"{address}/loadmodel", *headers], check=True, timeout=60)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            check(replay(folder, port))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert any(out.endswith("data: [DONE]\n\n") for _, out in ends)
    for code, out in ends:
        assert code == 0
        assert out.endswith("data: [DONE]\n\n") or '"error"' in out, out[-300:]
    files = sorted(path.name for path in (folder / "states").iterdir())
    assert files == sorted(f"{name}.pth" for name in STATES)
