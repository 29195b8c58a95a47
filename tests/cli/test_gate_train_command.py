"""`mrss gate train`: from lines of text to a gate that the engine resolves, or a reason why not."""

import json

import pytest
from command import mrss
from safetensors import safe_open
from tiny_model import write_model_folder, write_state

from mrss_provider.cli.states import read_config
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.errors import FileFormatError, InvalidRequestError


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
def where(model, folder):
    return ["--model", str(model), "--states-folder", str(folder), "--device", "cpu"]


@pytest.fixture
def data(tmp_path):
    lines = [
        {"prompt": f"the cat {i}?", "response": f"yes, red dog {i * 7}"} for i in range(10)
    ] + [{"text": f"a blue world {i}"} for i in range(10)]
    return write(tmp_path / "mixed.jsonl", lines)


def write(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def train(where, data, *more, mixture="calm+loud", out="mine"):
    told = ["--mixture", mixture, "--data", str(data), "--out", out, "--epochs", "5"]
    return mrss("gate", "train", *told, *where, *more)


def test_a_gate_is_trained_reported_and_resolved(where, model, folder, data):
    result = train(where, data, "--force", "--licence", "MIT")
    assert result.code == 0, result.err
    assert result.out.startswith("held-out text: 4 texts, ")
    for title in ("learned", "novelty", "best fixed weights", "named weights"):
        assert f"  {title}  " in result.out
    assert "calm 0." in result.out
    assert result.out.endswith("use it: mrss chat calm+loud~linear~learned:mine\n")
    path = folder / "gates/mine.safetensors"
    assert result.err == f"wrote {path}\n"

    library = StateLibrary(folder, read_config(model))
    assert not library.problems
    resolved = library.resolve("calm+loud~linear~learned:mine")
    assert resolved.trained_gate is library.gates["mine"]
    other = library.resolve("calm+loud~linear~novelty")
    assert resolved.fingerprint != other.fingerprint
    about = library.gates["mine"].metadata
    assert set(about.states) == {"calm", "loud"}
    assert about.states["calm"] == library.states["calm"].sha256
    assert about.training["documents"] == 16
    assert about.licence == "MIT"


def test_the_same_seed_gives_the_same_gate_and_a_changed_gate_another_fingerprint(
    where, model, folder, data
):
    found = []
    for seed in ("3", "3", "4"):
        assert train(where, data, "--force", "--seed", seed).code == 0
        with safe_open(folder / "gates/mine.safetensors", "pt") as file:
            weights = file.get_tensor("hidden.weight").tolist()
        library = StateLibrary(folder, read_config(model))
        found.append((weights, library.resolve("calm+loud~learned:mine").fingerprint))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    assert found[0][1] != found[2][1]


def test_other_text_may_judge_it(where, tmp_path, data):
    judge = write(tmp_path / "judge.jsonl", [{"text": "hello world"}, {"text": "no"}])
    result = train(where, data, "--held-out", str(judge), "--force")
    assert result.out.startswith("held-out text: ")
    assert result.code == 0, result.err


def test_a_gate_that_gains_nothing_is_not_written_without_force(where, folder, data, monkeypatch):
    from mrss_provider.cli import gate_train

    real = gate_train.report_gate

    def hopeless(*given, **named):
        report = real(*given, **named)
        report.nll["learned"] = report.nll["fixed"]
        return report

    monkeypatch.setattr(gate_train, "report_gate", hopeless)
    result = train(where, data)
    assert result.code == 1
    assert "no better on held-out text than the best fixed weights" in result.err
    assert "held-out text:" in result.out
    assert not (folder / "gates").exists()


def test_a_name_that_is_taken_is_kept_unless_forced(where, data):
    assert train(where, data, "--force").code == 0
    result = train(where, data)
    assert result.code == 1
    assert "there is a gate 'mine'" in result.err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mixture": "calm"}, "two states or more"),
        ({"mixture": "calm+louder"}, "unknown state or mixture 'louder'"),
        ({"mixture": "calm+loud~delta"}, "give states and weights only"),
        ({"out": "base"}, "no gate may take that name"),
        ({"out": "../mine"}, "a gate name is a letter"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_work(where, data, change, says):
    result = train(where, data, **change)
    assert result.code == 1
    assert says in result.err


def test_bad_data_is_refused_with_its_line(where, tmp_path):
    good = [{"text": "the cat"}] * 12
    bad = write(tmp_path / "bad.jsonl", [*good, {"prompt": "a"}])
    assert "line 13: 'prompt' and 'response' go together" in train(where, bad).err
    few = write(tmp_path / "few.jsonl", good[:5])
    assert "holds 5 texts, 11 are needed" in train(where, few).err
    assert "cannot read" in train(where, tmp_path / "none.jsonl").err
    short = write(tmp_path / "short.jsonl", [{"text": "a"}])
    told = train(where, write(tmp_path / "good.jsonl", good), "--held-out", str(short)).err
    assert "held-out texts have no token to judge by" in told


def test_unknown_and_bad_gates_are_refused_by_name_and_nothing_else_is(where, model, folder, data):
    assert train(where, data, "--force").code == 0
    (folder / "gates/broken.safetensors").write_bytes(b"x")
    library = StateLibrary(folder, read_config(model))
    (problem,) = library.problems
    assert problem.name == "gates/broken"
    with pytest.raises(InvalidRequestError, match="no trained gate 'other'; known are mine"):
        library.resolve("calm+loud~learned:other")
    with pytest.raises(FileFormatError, match=r"learned:broken.*not a safetensors file"):
        library.resolve("calm+loud~learned:broken")
    assert library.resolve("calm+loud~learned:mine").rows == 3
    result = mrss("doctor", "--json", "--model", str(model), "--states", str(folder))
    found = [json.loads(line) for line in result.out.splitlines()]
    told = [f for f in found if f["part"] == "states" and "gates/broken" in f["found"]]
    assert told[0]["verdict"] == "warn"
    assert any("mine" in f["found"] for f in found if f["part"] == "gates")
