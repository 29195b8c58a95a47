"""`mrss litellm-config`: what it writes, what it refuses, and that LiteLLM can read it."""

import errno
import os
import subprocess
import sys

import pytest
import yaml
from command import mrss
from fakes import FakeBackend, serving

from mrss_provider.backend import ModelCard
from mrss_provider.cli import litellm_config, proxy_config
from mrss_provider.cli.litellm_config import config_text, read_group
from mrss_provider.cli.litellm_entries import Arm, Group, Wishes
from mrss_provider.cli.output import CommandError
from mrss_provider.config import BUNDLED_STATES, ServerConfig

ONE_ROW = ("tools", "embeddings")
CARDS = [
    ModelCard("base", "base", "", 0, 4096, ONE_ROW),
    ModelCard("knowledge", "state", "", 0, 4096, ONE_ROW),
    ModelCard("tone", "state", "", 0, 4096, (*ONE_ROW, "thinking")),
    ModelCard("pirate", "mixture", "", 0, 4096, ("tools",)),
]


def written(**wishes):
    return yaml.safe_load(config_text(CARDS, Wishes(**wishes)))


def entries(config, name):
    return [entry for entry in config["model_list"] if entry["model_name"] == name]


def test_every_name_has_an_entry_that_says_what_it_can_do():
    config = written()
    infos = {e["model_name"]: e["model_info"] for e in config["model_list"]}
    for card in CARDS:
        info = infos[f"mrss/{card.id}"]
        assert info["mode"] == "chat"
        assert info["max_input_tokens"] == 4096
        assert info["supports_function_calling"] is True
        assert info["supports_reasoning"] is ("thinking" in card.supports)
        assert info["supports_vision"] is False
    assert infos["mrss/*"]["health_check_model"] == "mrss/base"
    assert {name for name in infos if name.startswith("mrss-embedding/")} == {
        "mrss-embedding/base",
        "mrss-embedding/knowledge",
        "mrss-embedding/tone",
    }
    assert infos["mrss-embedding/tone"]["mode"] == "embedding"


def test_ids_are_there_once_and_the_same_at_every_run():
    groups = (read_group("x=knowledge+tone:3,tone:1"),)
    ids = [e["model_info"]["id"] for e in written(groups=groups)["model_list"]]
    assert len(set(ids)) == len(ids)
    assert ids == [e["model_info"]["id"] for e in written(groups=groups)["model_list"]]


def test_group_has_weights_that_are_not_those_of_the_mixture():
    config = written(groups=(read_group("x=knowledge:2+tone:3,tone:1"),))
    first, second = (e["litellm_params"] for e in entries(config, "x"))
    assert (first["model"], first["weight"]) == ("mrss/knowledge:2+tone", 3)
    assert (second["model"], second["weight"]) == ("mrss/tone", 1)
    assert config["router_settings"]["optional_pre_call_checks"] == ["session_affinity"]
    assert "optional_pre_call_checks" not in written()["router_settings"]


def test_prices_are_told_for_a_million_and_written_for_one():
    info = entries(written(input_cost=0.1, output_cost=30.0), "mrss/tone")[0]["model_info"]
    assert (info["input_cost_per_token"], info["output_cost_per_token"]) == (1e-7, 3e-5)
    # Said, or the oldest LiteLLM that we support counts cached tokens as free.
    assert info["cache_read_input_token_cost"] == 1e-7


def test_key_is_a_variable_and_the_address_stands_in_every_entry():
    config = written(api_base="http://127.0.0.1:9000", has_key=True, openai_route=True)
    params = [entry["litellm_params"] for entry in config["model_list"]]
    assert {each["api_key"] for each in params} == {"os.environ/MRSS_API_KEY"}
    assert {each["api_base"] for each in params} == {
        "http://127.0.0.1:9000",
        "http://127.0.0.1:9000/v1",
    }
    assert params[-1]["model"] == "openai/*"


def test_reasons_stand_in_the_file_once():
    text = config_text(CARDS, Wishes())
    assert text.count("# LiteLLM refuses these two") == 1
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("knowledge:1,tone:1", "a name"),
        ("x=tone:1", "two arms"),
        ("x=tone:1,knowledge", "above 0 after the last colon"),
        ("x=tone:1,knowledge:0", "above 0"),
        ("x=tone:1,knowledge:nan", "above 0"),
    ],
)
def test_bad_group_is_refused_with_an_example(text, told):
    with pytest.raises(CommandError, match=told) as caught:
        read_group(text)
    assert "pirates=knowledge+tone:3,tone:1" in str(caught.value)


def test_what_the_engine_has_not_is_refused():
    with pytest.raises(CommandError, match="the engine has no 'tune'"):
        written(names=("knowledge+tune",))
    with pytest.raises(CommandError, match="mrss serve --port 9000"):
        written(api_base="unix:///run/mrss.sock", openai_route=True)


@pytest.mark.parametrize(
    "wish",
    [
        {"names": ("knowledge+tone~novelty:0.3,2",)},
        {"groups": (Group("a,b", (Arm("knowledge", 1.0), Arm("tone", 1.0))),)},
    ],
)
def test_what_nobody_could_ask_a_proxy_for_is_refused(wish):
    with pytest.raises(CommandError, match="splits them at commas; make it a named mixture"):
        written(**wish)


def test_shipped_configuration_and_a_written_one_agree():
    shipped = yaml.safe_load(proxy_config.BUNDLED_PROXY_CONFIG.read_text())
    cards = [ModelCard(name, "state", supports=ONE_ROW) for name in ("base", "knowledge", "tone")]
    config = yaml.safe_load(config_text(cards, Wishes(names=("knowledge+tone",))))
    for name in ("mrss/*", "mrss/base", "mrss/knowledge", "mrss/tone", "mrss/knowledge+tone"):
        (theirs,), (ours,) = entries(shipped, name), entries(config, name)
        assert ours["litellm_params"] == theirs["litellm_params"]
        assert theirs["model_info"].items() <= ours["model_info"].items()
    for section in ("litellm_settings", "router_settings", "general_settings"):
        assert config[section] == shipped[section]


def test_file_is_written_once_and_again_only_by_force(tmp_path):
    out = tmp_path / "config.yaml"
    folder = tmp_path / "s"
    with serving(FakeBackend(cards=CARDS), ServerConfig(socket=folder)):
        asked = ("litellm-config", "--api-base", f"unix://{folder}", "--out", out)
        first = mrss(*asked)
        assert (first.code, first.out) == (0, "")
        text = out.read_text()
        refused = mrss(*asked, "--output-cost", 1)
        assert refused.code == 1
        assert "--force overwrites it" in refused.err
        assert "--force goes with --out" in mrss(*asked[:3], "--force").err
        assert out.read_text() == text
        assert mrss(*asked, "--output-cost", 1, "--force").code == 0
        assert out.read_text() != text
        on_stdout = mrss(*asked[:3])
    assert on_stdout.out == text


def test_a_configuration_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left")

    out = tmp_path / "config.yaml"
    out.write_text("the last one")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CommandError, match=r"config.yaml cannot be written: No space left"):
        litellm_config.write("the next", out, force=True)
    assert out.read_text() == "the last one"
    assert list(tmp_path.iterdir()) == [out]


def test_what_came_between_the_question_and_the_answer_is_not_written_over(tmp_path):
    out, nowhere = tmp_path / "config.yaml", tmp_path / "link"
    out.write_text("somebody else's")
    nowhere.symlink_to(tmp_path / "target")
    for path in (out, nowhere):
        with pytest.raises(CommandError, match="--force overwrites it"):
            litellm_config.write("the next", path, force=False)
    assert out.read_text() == "somebody else's"
    assert not (tmp_path / "target").exists()


def test_a_litellm_that_takes_too_long_is_one_sentence(monkeypatch):
    monkeypatch.setattr(litellm_config, "examine", lambda path: [])
    monkeypatch.setattr(litellm_config, "_CHECK_TIMEOUT_S", 0.01)
    with pytest.raises(CommandError, match="has not read the configuration"):
        litellm_config.check("model_list: []")


def test_check_finds_what_litellm_would_not_notice(monkeypatch):
    monkeypatch.setattr(litellm_config, "examine", lambda path: ["a name with a comma"])
    with pytest.raises(CommandError, match="a name with a comma"):
        litellm_config.check("model_list: []")


@pytest.mark.slow
def test_litellm_validates_what_is_written(tmp_path):
    out = tmp_path / "config.yaml"
    command = [sys.executable, "-m", "mrss_provider.cli", "litellm-config", "--check"]
    wishes = ["--ab", "pirates=knowledge+tone:3,tone:1", "--name", "knowledge+tone"]
    result = subprocess.run([*command, *wishes, "--out", out], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    entries = yaml.safe_load(out.read_text())["model_list"]
    assert f"config OK ({len(entries)} models)" in result.stderr
    assert proxy_config.examine(out) == []
    infos = {entry["model_name"]: entry["model_info"] for entry in entries}
    # What the bundled model's template can do, and which names stand for one state.
    assert infos["mrss/tone"]["supports_function_calling"] is True
    assert infos["mrss/tone"]["supports_reasoning"] is False
    embedders = {name for name, info in infos.items() if info["mode"] == "embedding"}
    states = [path.stem for path in BUNDLED_STATES.glob("*.safetensors")]
    assert embedders == {f"mrss-embedding/{name}" for name in ("base", *states)}
