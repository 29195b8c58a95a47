"""`mrss states from-prompt`. Oracle: the same text in front of the prompt."""

import json
from pathlib import Path

import pytest
from command import mrss
from safetensors import safe_open
from tiny_model import write_model_folder, write_state

TEXT = "the red cat and the blue dog say hello world\n\n"
PROMPT = "hello the"


@pytest.fixture
def where(tmp_path: Path) -> list[str]:
    states = tmp_path / "states"
    states.mkdir()
    write_state(states / "calm.pth", seed=1, offset=True)
    (tmp_path / "text.txt").write_text(TEXT)
    return ["--model", str(write_model_folder(tmp_path / "tiny")), "--states", str(states)]


def spoken(where: list[str], name: str, prompt: str) -> str:
    options = ["--temperature", 0, "--max-tokens", 24, "--in-process"]
    result = mrss("generate", name, "-p", prompt, *options, *where)
    assert result.code == 0, result.err
    return result.out


@pytest.mark.parametrize("start", ["base", "calm"])
def test_the_state_stands_for_the_text(where: list[str], tmp_path: Path, start: str) -> None:
    text = tmp_path / "text.txt"
    made = mrss("states", "from-prompt", "--text", text, "--name", "read", "--from", start, *where)
    assert made.code == 0, made.err
    assert spoken(where, "read", PROMPT) == spoken(where, start, TEXT + PROMPT)
    assert spoken(where, "read", PROMPT) != spoken(where, start, PROMPT)


def test_the_file_says_where_it_comes_from(where: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    options = ["--text", text, "--name", "read", "--group", "knowledge", "--licence", "CC0-1.0"]
    assert mrss("states", "from-prompt", *options, *where).code == 0
    with safe_open(tmp_path / "states/read.safetensors", framework="pt") as file:
        told = file.metadata()
    origin = json.loads(told["training"])["from_prompt"]
    assert (told["group"], told["licence"], told["bos"]) == ("knowledge", "CC0-1.0", "false")
    assert origin["num_tokens"] > 10
    assert json.loads(told["base_model"])["name"] == "tiny"
    assert TEXT not in json.dumps(told)


def test_what_cannot_be_made_is_told(where: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for options, words in (
        (["--text", text, "--name", "calm"], "exists"),
        (["--text", text, "--name", "two words"], "letters"),
        (["--text", empty, "--name", "read"], "empty"),
        (["--text", tmp_path / "none", "--name", "read"], "cannot be read"),
        (["--text", text, "--name", "read", "--from", "absent"], "absent"),
    ):
        result = mrss("states", "from-prompt", *options, *where)
        assert (result.code, result.out) == (1, "")
        assert words in result.err
