"""`mrss tune`: from lines to a state that the engine loads, over kills and refusals."""

import importlib.util
import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from command import mrss
from safetensors.torch import load_file
from tiny_model import write_model_folder, write_state

from mrss_provider.cli.states import read_config
from mrss_provider.engine.state_library import StateLibrary


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "states"
    folder.mkdir()
    write_state(folder / "calm.pth", seed=1)
    write_state(folder / "loud.pth", seed=2)
    return folder


@pytest.fixture
def data(tmp_path):
    lines = [{"prompt": f"the cat {i}?", "response": f"yes, red dog {i * 7}"} for i in range(12)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def where(model, folder):
    told = ["--device", "cpu", "--threads", "1", "--no-curve"]
    return ["--model", str(model), "--states", str(folder), *told]


def tune(where, data, out, *more):
    told = ["--data", data, "--out", out, "--steps", "3", "--batch-size", "4", "--lr", "0.3"]
    return mrss("tune", *told, *where, *more)


def test_a_state_is_tuned_and_loads_with_its_provenance(where, model, folder, data):
    out = folder / "mine.safetensors"
    told = ["--group", "tone", "--title", "My own", "--licence", "MIT", "--offsets", "--json"]
    result = tune(where, data, out, *told)
    assert result.code == 0, result.err
    assert "11 examples" in result.err
    summary = json.loads(result.out)
    assert summary["steps"] == 3
    assert summary["held_out"]["best"] <= summary["held_out"]["base"]

    library = StateLibrary(folder, read_config(model), strict=True)
    about = library.get("mine").metadata
    assert library.get("mine").time_offset is not None
    assert (about.group, about.display_name, about.licence) == ("tone", "My own", "MIT")
    training = about.training
    assert training["data"]["files"] == {"data": "pairs.jsonl"}
    assert len(training["data"]["sha256"]["data"]) == 64
    assert training["learning_rate"] == 0.3
    assert str(data.parent) not in json.dumps(dict(training))
    assert not (folder / "mine.safetensors.unfinished").exists()


def test_a_state_is_not_written_over_unless_told_to(where, folder, data):
    result = tune(where, data, folder / "calm.pth")
    assert result.code == 1
    assert "calm.pth exists; choose another --out, or give --force" in result.err
    before = (folder / "calm.pth").read_bytes()
    assert tune(where, data, folder / "calm.pth", "--force").code == 0
    assert (folder / "calm.pth").read_bytes() != before
    assert json.loads((folder / "calm.pth.json").read_text())["loss_on"] == "answer"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--lr", "fast"], "--lr must be auto or a number, got 'fast'"),
        (["--steps", "0"], "steps must be above 0, got 0"),
        (["--lr", "auto", "--held-out-share", "0"], "--lr auto chooses by held-out loss"),
        (["--held-out-share", "1"], r"--held-out-share must be in \[0, 1\), got 1"),
        (["--beside", "nobody"], "nobody"),
        (
            ["--beside", "calm", "--merge", "route"],
            "under linear, geometric, product",
        ),
        (["--beside", "calm", "--gate", "posterior"], "gate 'posterior'"),
        (["--distill", "calm"], "give --data, or --distill with --prompts"),
        (["--format", "pth"], "--format pth and --out new.safetensors do not fit"),
        (["--distance", "2"], "no turn of a chat fits into a distance of 2 tokens"),
        (["--distance-data", "x.jsonl"], "--distance-data needs --distance"),
        (["--epochs", "0"], "--epochs must be above 0, got 0"),
        (["--surprise", "2"], "--surprise must be above 0 and at most 1, got 2"),
        (["--lr", "0"], "learning_rate must be above 0, got 0"),
        (["--resume"], "there is no unfinished run to resume"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_writes_nothing(where, folder, data, more, says):
    before = sorted(folder.iterdir())
    result = tune(where, data, folder / "new.safetensors", *more)
    assert result.code in (1, 2)
    # A usage error is drawn in a box.
    assert re.search(says, " ".join(result.err.replace("│", " ").split()))
    assert sorted(folder.iterdir()) == before


def test_a_state_is_tuned_beside_others(where, model, folder, data):
    told = ["--beside", "calm:0.5", "--beside", "loud", "--gate", "novelty"]
    result = tune(where, data, folder / "third.safetensors", *told)
    assert result.code == 0, result.err
    library = StateLibrary(folder, read_config(model))
    assert library.get("third").metadata.training["beside"] == ["calm:0.5", "loud"]
    assert library.resolve("calm+loud+third").rows == 4


@pytest.mark.slow
def test_locality_learns_facts_and_keeps_the_rest_closer_to_the_base(where, folder, tmp_path):
    lines = [
        {"prompt": f"the cat {i}?", "response": f"yes red dog {i}", "facts": ["red"]}
        for i in range(12)
    ]
    data = tmp_path / "facts.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    norms = {}
    for name, more in (("free", []), ("near", ["--locality", "20"])):
        out = folder / f"{name}.safetensors"
        result = tune(where, data, out, "--steps", "20", *more, "--json")
        assert result.code == 0, result.err
        norms[name] = sum(json.loads(result.out)["norms"])
    assert norms["near"] < norms["free"]


@pytest.mark.slow
def test_rates_are_swept_and_the_table_is_shown(where, folder, data):
    result = tune(where, data, folder / "swept.safetensors", "--lr", "auto", "--json")
    assert result.code == 0, result.err
    assert "RATE" in result.err
    summary = json.loads(result.out)
    losses = {trial["rate"]: trial["loss"] for trial in summary["rates"]}
    assert len(losses) == 5
    assert summary["learning_rate"] == min(losses, key=losses.get)


def test_what_a_named_mixture_asks_for_at_turns_is_not_imitated(where, folder, tmp_path):
    (folder / "mixtures.toml").write_text('[both]\nterms = "calm+loud"\nreinject = "turn"\n')
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"cat {i}?"}) for i in range(5)))
    told = ["--distill", "both", "--prompts", prompts, "--out", folder / "x.safetensors"]
    result = mrss("tune", *told, *where)
    assert result.code != 0
    assert "a state imitates mixtures without reinject, got 'both'" in result.err
    assert not (folder / "x.safetensors").exists()


@pytest.mark.slow
def test_a_mixture_is_imitated_and_the_gap_is_told_on_seen_and_unseen_prompts(
    where, folder, tmp_path
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"the cat {i}?"}) for i in range(5)))
    told = ["--distill", "calm+loud", "--prompts", prompts, "--max-len", "300", "--samples", "2"]
    told += ["--out", folder / "both.safetensors", "--steps", "12", "--lr", "0.3", "--json"]
    result = mrss("tune", *told, *where, "--held-out-share", "0.3", "--patience", "0")
    assert result.code == 0, result.err
    gap = json.loads(result.out)["gap"]
    assert set(gap) == {"seen", "unseen"}
    for kind in gap.values():
        assert kind["kl"] >= 0
        # Fewer than six texts have no interval.
        assert not {"low", "high"} & set(kind)
    # The state that is kept is no worse than the base on what it was judged by.
    assert gap["unseen"]["kl"] <= gap["unseen"]["base"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_losses_are_drawn(model, folder, data):
    where = ["--model", model, "--states", folder, "--device", "cpu", "--threads", "1"]
    result = tune(where, data, folder / "drawn.safetensors")
    assert result.code == 0, result.err
    assert (folder / "drawn.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(where, folder, data, number):
    def command(name, *more):
        told = ["--data", data, "--out", folder / f"{name}.safetensors", "--steps", "40"]
        told += ["--batch-size", "4", "--lr", "0.3", "--checkpoint-every", "0"]
        return [sys.executable, "-m", "mrss_provider.cli", "tune", *told, *where, *more]

    def start(*args):
        arguments = [str(arg) for arg in command(*args)]
        return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)

    def wait(process):
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said
        return said

    wait(start("whole"))
    left = start("left")
    for line in left.stderr:
        if line.startswith("step 8 of 40"):
            break
    left.send_signal(number)
    _, said = left.communicate(timeout=100)
    assert left.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    if number == signal.SIGINT:
        assert "go on with the same command and --resume" in said
    assert not (folder / "left.safetensors").exists()
    assert "goes on after step" in wait(start("left", "--resume"))
    one, other = (load_file(folder / f"{name}.safetensors") for name in ("whole", "left"))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
