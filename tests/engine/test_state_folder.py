"""Folders with bad files and bad tables: each spoils its own name, and says why."""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
import torch

from mrss_provider.engine.library_changes import with_mixture
from mrss_provider.engine.mixtures_file import parse_table
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.errors import (
    ConfigError,
    InvalidRequestError,
    MRSSError,
    StateFileError,
    UnknownNameError,
)
from mrss_provider.model import (
    ModelConfig,
    StateMetadata,
    TunedState,
    load_model,
    save_tuned_state,
)


@pytest.fixture(scope="module")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tiny_model.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.pth")
    return load_model(path, device="cpu", dtype="fp32", threads=1).config


def test_one_bad_file_spoils_only_its_own_name(
    model_config: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model.write_state(tmp_path / "tone.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a state")
    tiny_model.write_state(tmp_path / "other-shape.pth", tiny_model.Shape(num_layers=3))
    tiny_model.write_state(tmp_path / "replicate-me.pth")
    tiny_model.write_state(tmp_path / "base.pth")
    tiny_model.write_state(tmp_path / "two words.pth")
    for suffix in ("pth", "st"):
        tiny_model.write_state(tmp_path / f"twice.{suffix}")
    tiny_model.write_state(tmp_path / "shared.pth")
    (tmp_path / "sub.pth").mkdir()
    (tmp_path / "mixtures.toml").write_text(
        """
        loose = 3
        [good]
        terms = "tone+base"
        [no-terms]
        merge = "linear"
        [typo]
        terms = "tone"
        temperatur = 1
        [bad-merge]
        terms = "tone"
        merge = "mean"
        [bad-tau]
        terms = "tone"
        gate = { name = "novelty", tau = 0 }
        [no-gate]
        terms = "tone+base"
        gate = "learned:nowhere"
        [no-such-points]
        terms = "tone+base"
        gate = { name = "schedule", points = "tune=0@0,1@8" }
        [pushed]
        terms = "shared+tone:-1"
        [bad-top-p]
        terms = "tone"
        top_p = 2
        [bad-cut]
        terms = "tone"
        cut = 1
        [cut-of-linear]
        terms = "tone+base"
        merge = "linear"
        cut = 0.1
        [suffix]
        terms = "tone+base~linear"
        [bad-weight]
        terms = "tone:x"
        [number]
        terms = 3
        [of-broken]
        terms = "tone+broken"
        [of-nothing]
        terms = "tone+nothing"
        [of-mixture]
        terms = "tone+good"
        [shared]
        terms = "base"
        [of-shared]
        terms = "shared+tone"
        [my-clarifai]
        terms = "tone"
        [described]
        terms = "tone"
        description = 4
        """
    )
    with caplog.at_level(logging.WARNING):
        library = StateLibrary(tmp_path, model_config)
    assert list(library.states) == ["shared", "tone"]
    assert list(library.mixtures) == ["good", "of-shared"]
    expected = {
        "broken": "broken.pth",
        "other-shape": "layers",
        "replicate-me": "must not contain 'replicate'",
        "base": "untuned model",
        "two words": "a letter or digit",
        "twice": "more than one file, twice.pth and twice.st; keep one",
        "loose": r"\[loose\]: a mixture is a table",
        "no-terms": r"\[no-terms\]: terms must be a string, got None",
        "typo": "unknown key 'temperatur', the keys are terms, merge",
        "bad-merge": "merge must be one of linear, geometric, product, .*got 'mean'",
        "bad-tau": r"gate: tau must be a number in \[0.001, 1000\], got 0",
        "no-gate": "the trained gate 'nowhere' does not exist",
        "no-such-points": "the schedule has points for 'tune', which is none of the terms",
        "pushed": "the weight -1 of 'tone' is below 0, which only the merge rule 'contrast'",
        "bad-top-p": r"top_p must be in \(0, 1\], got 2",
        "bad-cut": r"cut must be in \[0, 1\), got 1",
        "cut-of-linear": "'linear' has no cut",
        "suffix": "names and weights only",
        "bad-weight": "at position 5: expected a weight",
        "number": "terms must be a string, got 3",
        "of-broken": "the state 'broken' cannot be loaded",
        "of-nothing": "the state 'nothing' does not exist",
        "of-mixture": "the term 'good' is a mixture",
        "shared": "a state file has the name 'shared' too, rename one of them",
        "my-clarifai": "must not contain 'clarifai'",
        "described": "description must be a string, got 4",
    }
    problems = {problem.name: problem for problem in library.problems}
    assert problems.keys() == expected.keys()
    for name, message in expected.items():
        error = problems[name].error
        assert error.status_code == 400
        assert re.search(message, str(error))
        if name not in ("base", "two words"):
            with pytest.raises(MRSSError, match=f"'{name}' cannot be used: .*{message}"):
                library.resolve(name)
        assert str(error) in caplog.text
    assert library.resolve("good").canonical == "base+tone"
    with pytest.raises(ConfigError, match="'shared' cannot be used"):
        library.resolve("of-shared")


def test_a_mixture_that_comes_later_is_judged_as_one_of_the_file(
    model_config: ModelConfig, tmp_path: Path
) -> None:
    tiny_model.write_state(tmp_path / "tone.pth")
    entries = StateLibrary(tmp_path, model_config).entries
    late = parse_table({"terms": "tone+base", "gate": "schedule:tune=1@0"})
    with pytest.raises(InvalidRequestError, match="the schedule has points for 'tune'"):
        with_mixture(entries, "late", late)


def test_a_mixtures_file_that_is_no_toml_is_told_with_unknown_names(
    model_config: ModelConfig, tmp_path: Path
) -> None:
    tiny_model.write_state(tmp_path / "tone.pth")
    (tmp_path / "mixtures.toml").write_text("[story\nterms=")
    library = StateLibrary(tmp_path, model_config)
    assert [problem.name for problem in library.problems] == ["mixtures.toml"]
    assert library.resolve("tone").rows == 1
    with pytest.raises(UnknownNameError, match=r"'story' .*\(mixtures.toml cannot be read: "):
        library.resolve("story")
    (tmp_path / "mixtures.toml").write_bytes(b"\xff\xfe")
    assert len(StateLibrary(tmp_path, model_config).problems) == 1


def test_a_file_that_may_not_be_read_is_a_problem(
    model_config: ModelConfig, tmp_path: Path
) -> None:
    (tmp_path / "gone.pth").symlink_to(tmp_path / "nowhere.pth")
    tiny_model.write_state(tmp_path / "locked.pth")
    os.chmod(tmp_path / "locked.pth", 0)
    library = StateLibrary(tmp_path, model_config)
    # A dangling link is no file; root reads whatever it likes.
    assert {problem.name for problem in library.problems} <= {"locked"}
    assert all(isinstance(problem.error, StateFileError) for problem in library.problems)


def test_a_folder_that_does_not_exist_is_an_error(
    model_config: ModelConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"folder of states .*nowhere' does not exist"):
        StateLibrary(tmp_path / "nowhere", model_config)
    assert [card.id for card in StateLibrary(tmp_path, model_config).cards()] == ["base"]


@pytest.mark.parametrize("part", [".", "added", "gates"])
def test_a_folder_that_may_not_be_read_is_an_error_that_names_it(
    model_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    closed = tmp_path / part
    closed.mkdir(exist_ok=True)
    listed = Path.iterdir

    def refused(self: Path) -> Iterator[Path]:
        # As for a user who is not root.
        if self == closed:
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(
        ConfigError, match=f"cannot be read: Permission denied: {closed}$"
    ) as caught:
        StateLibrary(tmp_path, model_config)
    assert caught.value.param == "states"


def test_strict_refuses_states_of_other_weights(tmp_path: Path, model_config: ModelConfig) -> None:
    state = TunedState(
        "tone",
        torch.zeros(model_config.state_shape),
        metadata=StateMetadata(display_name="A kind tone", group="tone"),
    )
    path = tiny_model.write_checkpoint(tmp_path / "other-model.pth", seed=9)
    other = load_model(path, device="cpu", dtype="fp32", threads=1).config
    folder = tmp_path / "states"
    folder.mkdir()
    state = replace(state, metadata=state.metadata.with_base(other))
    save_tuned_state(folder / "tone.safetensors", state, other)
    lenient = StateLibrary(folder, model_config)
    assert lenient.cards()[1].description == "A kind tone"
    assert lenient.problems == ()
    strict = StateLibrary(folder, model_config, strict=True)
    with pytest.raises(StateFileError, match="'tone' cannot be used"):
        strict.resolve("tone")
