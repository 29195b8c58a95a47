import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from command import mrss
from tiny_model import write_model_folder, write_state

from mrss_provider import __version__
from mrss_provider.cli.options import field_help
from mrss_provider.config import EngineConfig, ServerConfig

MAX_HELP_CPU_S = 0.3
GROUPS = ("states", "gate", "keys", "compare", "session")
ALONE = ("serve", "chat", "generate", "trace", "models", "proxy", "pull", "doctor", "tune")
COMMANDS = (*ALONE, "evaluate", "litellm-config", *GROUPS)


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import os, sys\n"
        "from mrss_provider.cli import main\n"
        "sys.argv = ['mrss', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as exc:\n    assert not exc.code, exc.code\n"
        "heavy = {'torch', 'litellm', 'httpx', 'huggingface_hub', 'starlette', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "times = os.times()\n"
        "print(times.user + times.system, file=sys.stderr)\n"
    )
    results = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    listed = re.findall(r"^  ([\w-]+) ", results[0].stdout.partition("Commands:")[2], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    assert min(float(result.stderr) for result in results) < MAX_HELP_CPU_S


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_serve_has_an_explained_option_for_every_setting(cls: type) -> None:
    shown = mrss("serve", "--help").out
    fields = [field.name for field in dataclasses.fields(cls)]
    assert list(field_help(cls)) == fields
    for name in fields:
        assert re.search(rf"^  --{name.replace('_', '-')} .*\w", shown, re.MULTILINE), name


def test_version_is_the_packages() -> None:
    assert mrss("--version").out == f"mrss {__version__}\n"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["nosuch"], 2, "No such command 'nosuch'"),
        (["serve", "--dtype", "fp33"], 2, "'fp32', 'bf16', 'fp16'"),
        (["serve", "--port", "99999"], 1, "error: port must be in [1, 65535], got 99999"),
        (["serve", "--socket", "/s", "--port", "9001"], 1, "error: --port means nothing on a Unix"),
        (["serve", "--socket", "/s", "--host", "::1"], 1, "or listen on 127.0.0.1 too with --loop"),
        (["chat", "--server", "x", "--in-process"], 2, "give one or the other"),
        (["models", "--api-key", "k", "--in-process"], 2, "--in-process wants none"),
        (["chat", "-m", "x", "--temperature", "-1"], 1, "error: temperature must be in [0, 100]"),
        (["chat", "-m", "x", "--server", "here"], 1, "error: an engine's address is http://"),
        (["models", "--server", "http://127.0.0.1:1"], 1, "error: no engine answers at http"),
        (["generate", "a+", "-p", "x", "--server", "http://127.0.0.1:1"], 1, "error: "),
        (["states", "list", "--states", "/nowhere"], 1, "error: the folder of states '/nowhere'"),
        (["states", "list", "--model", "/nowhere"], 1, "error: /nowhere does not exist"),
    ],
)
def test_a_failure_is_one_sentence_on_stderr(args: list[str], code: int, words: str) -> None:
    result = mrss(*args)
    assert (result.code, result.out) == (code, "")
    assert words in result.err
    if code == 1:
        assert result.err.count("\n") == 1


def test_serve_tells_its_address_answers_and_leaves_on_sigterm(tmp_path: Path) -> None:
    model = write_model_folder(tmp_path / "tiny")
    states = tmp_path / "states"
    states.mkdir()
    write_state(states / "calm.pth")
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        address = f"unix://{short}/s"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mrss_provider.cli", "serve", "--model", model),
                *("--states", states, "--socket", f"{short}/s", "--threads", "1"),
            ],
            env={**os.environ, "MRSS_MAX_ROWS": "8"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("names: "):
                break
        assert said[-2:] == [f"ready on {address}\n", "names: mrss/base, mrss/calm\n"]

        listed = mrss("models", "--server", address)
        assert listed.out.splitlines()[1].startswith("mrss/base")
        asked = ["-m", "hello", "--server", address, "--seed", "7", "--max-tokens", "5"]
        first, second = mrss("chat", "mrss/calm", *asked), mrss("chat", "calm", *asked)
        assert (first.code, first.err) == (0, "")
        assert first.out.strip()
        assert first.out == second.out
        prompt = mrss("generate", "calm", *asked[2:], stdin="hello")
        assert (prompt.code, prompt.err) == (0, "")

        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "")
        assert not Path(short, "s").exists()
