"""`mrss tune`: from lines to a state that the engine loads, over kills and refusals."""

import errno
import hashlib
import importlib.util
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from command import mrss
from safetensors.torch import load_file
from tiny_model import write_model_folder, write_state

from mrss_provider.cli import tune_finish
from mrss_provider.cli.states import read_config
from mrss_provider.config import BUNDLED_STATES
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.model import StateMetadata, load_tuned_state, save_tuned_state
from mrss_provider.tune.training import Training

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)


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


def test_a_state_is_tuned_and_loads_with_its_provenance(where, model, folder, data, monkeypatch):
    out = folder / "mine.safetensors"
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    finish = Training.finish

    def edited(training):
        # What is written into the file while it is learnt from is for the next run.
        data.write_text(data.read_text() + "\n{}")
        finish(training)

    monkeypatch.setattr(Training, "finish", edited)
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
    assert training["data"]["sha256"] == training["settings"]["sha256"] == {"data": digest}
    assert training["learning_rate"] == 0.3
    assert str(data.parent) not in json.dumps(dict(training))
    assert not (folder / "mine.safetensors.unfinished").exists()


@pytest.mark.slow
@needs_matplotlib
def test_the_curve_lies_beside_the_state(where, folder, data):
    out = folder / "mine.safetensors"
    result = tune(where, data, out, "--curve", "--json")
    assert json.loads(result.out)["curve"] == str(folder / "mine.png")
    assert (folder / "mine.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_curve_that_cannot_be_written_hides_nothing_of_what_was_learnt(
    where, folder, data, monkeypatch
):
    def draw(path, record, title):
        raise OSError(errno.EISDIR, "Is a directory", str(path))

    monkeypatch.setattr(tune_finish, "draw_curve", draw)
    result = tune(where, data, folder / "mine.safetensors", "--curve", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["curve"] is None
    assert f"no loss curve: {folder / 'mine.png'} cannot be written: Is a directory" in result.err


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
        (["--beside", "calm~linear"], "--beside takes states and weights only, .*'calm~linear'"),
        (["--beside", "calm", "--beside", "loud@x"], "states and weights only, .*'calm.loud@x'"),
        (["--beside", "calm", "--beside", "loud:-1", "--merge", "linear"], "'loud' is below 0"),
        (["--distill", "calm"], "give --data, or --distill with --prompts"),
        (["--distill", ""], "give --data, or --distill with --prompts"),
        (["--format", "pth"], "--format pth and --out new.safetensors do not fit"),
        (["--distance", "2"], "no turn of a chat fits into a distance of 2 tokens"),
        (["--distance-data", "x.jsonl"], "--distance-data needs --distance"),
        (["--locality", "1", "--surprise", "2"], "--surprise must be above 0 and at most 1, got 2"),
        (["--surprise", "0.5"], "--surprise goes with --locality, got 0.5"),
        (["--merge", "product"], "--merge goes with --beside, got 'product'"),
        (["--gate", "novelty"], "--gate goes with --beside, got 'novelty'"),
        (["--offset-rate", "0.1"], "--offset-rate goes with --offsets, got 0.1"),
        (["--samples", "3"], "--samples goes with --distill, got 3"),
        (["--epochs", "2"], "--epochs must be left out with --steps, got 2"),
        (["--held-out", "x", "--held-out-share", "0.1"], "must be left out with --held-out"),
        (["--out", "."], "--out must be a file's name, got '.'"),
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


def test_cuda_that_is_not_here_is_one_sentence(where, folder, data, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = folder / "new.safetensors"
    result = tune(where, data, out, "--device", "cuda")
    assert result.code == 1
    assert result.err.endswith("error: device is cuda, but torch sees no CUDA device; use cpu\n")
    assert not out.exists()


@pytest.mark.parametrize("name", ["", "mrss/"])
def test_a_mixture_without_a_name_is_not_imitated(where, folder, data, name):
    told = ["--distill", name, "--prompts", data, "--out", folder / "new.safetensors"]
    result = mrss("tune", *told, *where)
    assert result.code == 2
    assert "--distill must be a mixture such as knowledge+tone" in result.err


@pytest.mark.parametrize("epochs", ["0", "nan", "inf", "1e300"])
def test_passes_over_the_data_are_a_number_of_them(where, folder, data, epochs):
    out = folder / "new.safetensors"
    result = mrss("tune", "--data", data, "--out", out, "--epochs", epochs, *where)
    assert result.code == 1
    assert "error: --epochs must be above 0" in result.err
    assert not out.exists()


def test_a_folder_in_the_place_of_the_state_is_told_before_any_work(where, folder, data):
    out = folder / "new.safetensors"
    out.mkdir()
    result = tune(where, data, out, "--force")
    assert (result.code, result.err) == (1, f"error: {out} is a folder; choose another --out\n")


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
@needs_matplotlib
def test_the_losses_are_drawn(model, folder, data):
    where = ["--model", model, "--states", folder, "--device", "cpu", "--threads", "1"]
    result = tune(where, data, folder / "drawn.safetensors")
    assert result.code == 0, result.err
    assert (folder / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_a_state_is_gone_on_from_where_it_ended(where, model, folder, data):
    ends = {}
    for name, more in (("one", []), ("two", ["--from", "one"]), ("anew", [])):
        out = folder / f"{name}.safetensors"
        result = tune(where, data, out, *more, "--offsets", "--json")
        assert result.code == 0, result.err
        ends[name] = json.loads(result.out)
    start = ends["two"]["held_out"]["start"]
    assert start == pytest.approx(ends["one"]["held_out"]["best"], abs=1e-6)
    assert ends["one"]["held_out"] == ends["anew"]["held_out"]
    assert ends["two"]["held_out"]["best"] < start
    library = StateLibrary(folder, read_config(model), strict=True)
    training = library.get("two").metadata.training
    assert training["settings"]["from"] == {"name": "one", "sha256": library.get("one").sha256}
    assert "from" not in library.get("one").metadata.training["settings"]


def test_what_cannot_be_gone_on_from_is_one_sentence_and_writes_nothing(
    where, model, folder, data, tmp_path
):
    shape = read_config(model)
    config = {
        "bos": StateMetadata(bos=True),
        "elsewhere": StateMetadata(base_sha256="0" * 64, base_name="another"),
        "thinks": StateMetadata(template="g1"),
    }
    calm = load_tuned_state(folder / "calm.pth", shape, name="calm")
    made = {name: replace(calm, metadata=metadata) for name, metadata in config.items()}
    width = torch.ones(shape.num_layers, shape.hidden_size)
    made["offset"] = replace(calm, time_offset=width)
    made["shifted"] = replace(calm, shift_ffn=width)
    for name, state in made.items():
        save_tuned_state(folder / f"{name}.safetensors", state, shape)
    (folder / "mixtures.toml").write_text('[pair]\nterms = "calm+loud"\n')
    (tmp_path / "junk.safetensors").write_text("no state")
    refused = {
        "base": "'base' is where tuning begins by itself",
        "nobody": "unknown state or mixture 'nobody'",
        "": "--from takes one state, a file or a name, got ''",
        "pair": "--from takes one state, a file or a name, got 'pair'",
        "calm+loud": "--from takes one state, a file or a name, got 'calm+loud'",
        "bos": "--from bos was tuned with a leading token 0",
        "elsewhere": "was tuned on other weights (another) than the loaded ones",
        "thinks": "was tuned in the chat template 'g1'",
        "offset": "--from offset has offsets; give --offsets",
        "shifted": "--from shifted has shift states, which tuning would lose",
        str(tmp_path / "none.pth"): "none.pth does not exist or is no file",
        str(tmp_path / "junk.safetensors"): "truncated or not a safetensors file",
        str(tmp_path): "does not exist or is no file",
        str(model / "model.safetensors"): "model.safetensors is a model, not a tuned state",
        str(BUNDLED_STATES / "tone.safetensors"): "is for RWKV-7, 6 layers x 4 heads of 64",
    }
    for told, says in refused.items():
        result = tune(where, data, folder / "new.safetensors", "--from", told)
        assert result.code == 1, told
        assert says in result.err
        assert result.err.count("\n") == 1, result.err
    assert not list(folder.glob("new*"))


@pytest.mark.parametrize("told", ["g1", None])
def test_a_state_tells_the_template_that_is_not_its_models(where, model, folder, data, told):
    more = ["--template", told] if told else []
    assert tune(where, data, folder / "new.safetensors", *more).code == 0
    library = StateLibrary(folder, read_config(model))
    assert library.get("new").metadata.template == told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "start"),
    [(signal.SIGKILL, None), (signal.SIGINT, None), (signal.SIGKILL, "calm")],
)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(where, folder, data, number, start):
    def command(name, *more):
        told = ["--data", data, "--out", folder / f"{name}.safetensors", "--steps", "40"]
        told += ["--batch-size", "4", "--lr", "0.3", "--checkpoint-every", "0"]
        told += ["--from", start] if start else []
        return [sys.executable, "-m", "mrss_provider.cli", "tune", *told, *where, *more]

    def begin(*args):
        arguments = [str(arg) for arg in command(*args)]
        return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)

    def wait(process):
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said
        return said

    wait(begin("whole"))
    left = begin("left")
    for line in left.stderr:
        if line.startswith("step 8 of 40"):
            break
    left.send_signal(number)
    _, said = left.communicate(timeout=100)
    assert left.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    if number == signal.SIGINT:
        assert "go on with the same command and --resume" in said
    assert not (folder / "left.safetensors").exists()
    other = begin("left", "--resume", "--from", "loud")
    assert "from was" in other.communicate(timeout=100)[1]
    assert other.returncode == 1
    assert "goes on after step" in wait(begin("left", "--resume"))
    one, other = (load_file(folder / f"{name}.safetensors") for name in ("whole", "left"))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
