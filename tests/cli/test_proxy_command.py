"""What `make run` does: a proxy and an engine come up, answer, and are gone after Ctrl-C."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from command import mrss
from litellm.constants import AIOHTTP_KEEPALIVE_TIMEOUT
from ports import free_port

from mrss_provider.cli import proxy
from mrss_provider.cli.output import CommandError
from mrss_provider.cli.processes import Child
from mrss_provider.config import KEEP_ALIVE_S

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(s, marks=pytest.mark.slow)
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_what_it_prints_works_and_after_the_signal_all_is_gone(number: int) -> None:
    port = free_port()
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime:
        command = subprocess.Popen(
            [sys.executable, "-m", "mrss_provider.cli", "proxy", "--port", str(port)],
            cwd=ROOT,
            env={**os.environ, "XDG_RUNTIME_DIR": runtime},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            told = _until(command, "Ctrl-C ends")
            started = psutil.Process(command.pid).children(recursive=True)
            assert any("mrss_provider.server" in " ".join(p.cmdline()) for p in started)

            url, body = re.findall(r"curl (\S+) .*\\\n  -d '(.*)'", told)[0]
            answer = httpx.post(url, json=json.loads(body), timeout=60).json()
            assert answer["choices"][0]["message"]["content"].strip()
            _check_readme(url)
            snippet = told[told.index("from openai") : told.index("\n\nnames:")]
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(snippet, {})
            assert printed.getvalue().strip()
            (page,) = re.findall(r"playground: (http://127\.0\.0\.1:\d+/)", told)
            assert "mrss playground" in httpx.get(page, timeout=60).text
            assert httpx.get(f"{page}v1/models", timeout=60).status_code == 200
            assert "mrss/knowledge+tone" in told.split("names: ")[1].splitlines()[0]
        finally:
            command.send_signal(number)
            out, _ = command.communicate(timeout=60)
        assert (command.returncode, out) == (0, "")
        assert [p for p in started if p.is_running()] == []
        assert not list(Path(runtime).rglob("*.sock"))


def test_a_port_in_use_is_told_with_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = mrss("proxy", "--port", port)
    assert (result.code, result.out) == (1, "")
    assert f"port {port} on 127.0.0.1 cannot be used" in result.err
    assert f"make run PORT={port + 1}" in result.err


@pytest.mark.parametrize(
    ("option", "value"), [("--port", 0), ("--port", 65536), ("--port", -1), ("--num-workers", 0)]
)
def test_a_number_that_cannot_be_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, option: str, value: int
) -> None:
    monkeypatch.setattr(proxy, "run_proxy", lambda *_: pytest.fail("it has begun"))
    result = mrss("proxy", option, value)
    assert (result.code, result.out) == (2, "")
    assert f"Invalid value for '{option}'" in result.err


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:4000"), ("::1", "http://[::1]:4000")]
)
def test_the_address_that_it_tells_is_one_that_clients_take(
    monkeypatch: pytest.MonkeyPatch, host: str, url: str
) -> None:
    told: list[str] = []

    async def run(flags: list[str], url: str, *_: object, **__: object) -> None:
        told.append(url)

    monkeypatch.setattr(proxy, "_run", run)
    monkeypatch.setattr(proxy, "check_port_free", lambda *_: None)
    proxy.run_proxy(None, host, 4000, 1, {})
    assert told == [url]
    assert httpx.URL(url).port == 4000


def test_a_proxy_that_wants_a_key_gives_its_engine_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LITELLM_MASTER_KEY", raising=False)
    assert not proxy._wants_key({"general_settings": {"cancel_on_disconnect": True}})
    assert proxy._wants_key({"general_settings": {"master_key": "sk-1"}})
    monkeypatch.setenv("LITELLM_MASTER_KEY", "sk-1")
    assert proxy._wants_key({})


def test_connections_rest_longer_than_those_who_ask_keep_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[list[str]] = []

    async def run(flags: list[str], *_: object, **__: object) -> None:
        told.append(flags)

    monkeypatch.setattr(proxy, "_run", run)
    proxy.run_proxy(None, "127.0.0.1", free_port(), 1, {})
    (flags,) = told
    kept_s = int(flags[flags.index("--keepalive_timeout") + 1])
    openai_s = openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry
    assert openai_s is not None
    assert kept_s == KEEP_ALIVE_S > max(openai_s, AIOHTTP_KEEPALIVE_TIMEOUT)


def test_a_missing_configuration_is_told() -> None:
    result = mrss("proxy", "--config", "/nowhere.yaml")
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: the proxy's configuration /nowhere.yaml does not exist\n"


def test_a_child_that_ends_shows_its_last_words(capsys: pytest.CaptureFixture[str]) -> None:
    code = "print('early'); print('late'); raise SystemExit(3)"
    child = Child("it", [sys.executable, "-c", code], os.environ)
    with pytest.raises(CommandError, match="it ended with status 3"):
        _watch(child)
    assert capsys.readouterr().err == "early\nlate\n"


def test_a_child_that_ignores_sigterm_is_ended_with_its_children() -> None:
    code = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "print('up', flush=True)\n"
        "signal.pause()\n"
    )
    child = Child("it", [sys.executable, "-u", "-c", code], os.environ)
    while not (family := psutil.Process(child.pid).children()):
        child.check_alive()
    child.stop(0.2)
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert (len(gone), alive) == (1, [])


def _check_readme(url: str) -> None:
    """The README's request gets an answer like the README's."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"curl .*\\\n  -d '(.*)'", readme)
    (shown,) = re.findall(r"```json\n(.*?)```", readme, re.DOTALL)
    wanted, got = json.loads(shown), httpx.post(url, json=json.loads(body), timeout=60).json()
    assert _form(got) == _form(wanted)
    assert [got[key] for key in ("model", "mrss")] == [wanted[key] for key in ("model", "mrss")]
    assert got["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]


def _form(value: object) -> object:
    """Return `value` with types in place of what it says."""
    if isinstance(value, dict):
        return {key: _form(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_form(entry) for entry in value]
    return type(value).__name__


def _watch(child: Child) -> None:
    while True:
        child.check_alive()


def _until(command: "subprocess.Popen[str]", words: str) -> str:
    """Read stderr up to the line with `words`."""
    assert command.stderr is not None
    lines = []
    for line in command.stderr:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError("".join(lines))
