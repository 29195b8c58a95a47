import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import mrss
from tiny_model import write_model_folder, write_state

from mrss_provider.cli import proxy_config
from mrss_provider.cli.output import CommandError
from mrss_provider.cli.proxy_config import examine

HANDLER = "{provider: mrss, custom_handler: mrss_provider.handler}"
PARTS = ["python", "litellm", "torch", "device", "triton", "model", "vocabulary", "states"]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("doctor")
    states = folder / "states"
    states.mkdir()
    write_state(states / "calm.pth")
    model = write_model_folder(folder / "tiny")
    return ["--model", model, "--states", states, "--device", "cpu", "--threads", "1"]


@pytest.fixture
def _litellm_unimported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_config, "_import_problems", list)


def write_config(path: Path, model: str = "mrss/calm", handlers: str = HANDLER) -> Path:
    path.write_text(
        f"model_list:\n  - model_name: x\n    litellm_params: {{model: '{model}'}}\n"
        f"litellm_settings:\n  custom_provider_map: [{handlers}]\n"
    )
    return path


def test_a_sound_installation_ends_with_a_sentence_that_was_generated(
    where: list[object], tmp_path: Path
) -> None:
    # In a process of its own: it imports LiteLLM, whose import warns.
    config = write_config(tmp_path / "proxy_config.yaml")
    command = [sys.executable, "-m", "mrss_provider.cli", "doctor", "--json", "--config", config]
    result = subprocess.run([*command, *where], capture_output=True, text=True, check=False)
    findings = [json.loads(line) for line in result.stdout.splitlines()]
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert [finding["part"] for finding in findings] == [*PARTS, "proxy config", "engine"]
    assert {finding["verdict"] for finding in findings} == {"ok"}
    assert "tokens" in findings[-1]["found"]


@pytest.mark.usefixtures("_litellm_unimported")
def test_a_missing_model_fails_with_the_reason_and_the_rest_is_told(where: list[object]) -> None:
    result = mrss("doctor", *where[2:], "--model", "/nowhere")
    assert result.code == 1
    assert "FAIL  model: /nowhere does not exist" in result.out
    assert "ok    torch: " in result.out


@pytest.mark.usefixtures("_litellm_unimported")
def test_a_bad_state_is_a_warning(where: list[object], tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    config = write_config(tmp_path / "proxy_config.yaml")
    rest = ["--config", config, "--device", "cpu", "--threads", "1"]
    result = mrss("doctor", "--model", where[1], "--states", tmp_path, *rest)
    assert result.code == 0, result.out
    (line,) = [line for line in result.out.splitlines() if line.startswith("warn")]
    assert line.startswith("warn  states: bad: ")
    assert "bad.pth is not a checkpoint" in line


@pytest.mark.usefixtures("_litellm_unimported")
def test_cuda_that_is_not_here_fails(where: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = mrss("doctor", *where[:4], "--device", "cuda")
    assert result.code == 1
    assert "FAIL  device: cuda, asked for by device=cuda, is not here" in result.out


@pytest.mark.usefixtures("_litellm_unimported")
@pytest.mark.parametrize(
    ("model", "handlers", "words"),
    [
        ("mrss/*", HANDLER, None),
        ("openai/gpt-4o", HANDLER, None),
        ("mrss/a+b:0.5~linear", HANDLER, None),
        ("mrss/a", "", "has no provider mrss"),
        ("mrss/a", "{provider: mrss, custom_handler: mrss_provider.provider.handler}", "must be"),
        ("mrss/a+", HANDLER, "bad mixture name 'a+' at position 2"),
        ("mrss/replicated", HANDLER, "LiteLLM would send such requests"),
    ],
)
def test_the_proxys_configuration_is_examined_as_litellm_reads_it(
    tmp_path: Path, model: str, handlers: str, words: str | None
) -> None:
    problems = examine(write_config(tmp_path / "c.yaml", model, handlers))
    assert len(problems) == (words is not None)
    assert words is None or words in problems[0]


@pytest.mark.usefixtures("_litellm_unimported")
def test_a_file_that_would_shadow_the_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "mrss_provider.py").touch()
    (problem,) = examine(write_config(tmp_path / "c.yaml"))
    assert "stands beside the configuration" in problem


@pytest.mark.parametrize("text", ["a: [", "just words", ""])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(CommandError, match=r"is no YAML|no table at its top"):
        examine(path)
