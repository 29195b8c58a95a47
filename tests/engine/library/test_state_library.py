"""StateLibrary: folders good and bad, and names made concrete."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model

from mrss_provider.backend import MixtureOptions
from mrss_provider.engine.request import ResolvedMixture, resolve_sampling
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.errors import InvalidRequestError
from mrss_provider.model import ModelConfig, StateMetadata, load_tuned_state, save_tuned_state
from mrss_provider.sampling_params import DEFAULT_MAX_TOKENS, SamplingParams


def names(mixture: ResolvedMixture) -> list[str]:
    return ["base" if state is None else state.name for state in mixture.states]


def test_a_folder_becomes_states_and_mixtures(library: StateLibrary) -> None:
    assert list(library.states) == ["knowledge", "poetry", "tone"]
    assert sorted(library.mixtures) == ["average", "away", "sharp", "story", "timed"]
    assert library.problems == ()
    assert library.get("tone").name == "tone"


def test_cards_list_base_then_states_then_mixtures(library: StateLibrary, folder: Path) -> None:
    cards = library.cards()
    assert [(card.id, card.kind) for card in cards] == [
        ("base", "base"),
        ("knowledge", "state"),
        ("poetry", "state"),
        ("tone", "state"),
        ("average", "mixture"),
        ("away", "mixture"),
        ("sharp", "mixture"),
        ("story", "mixture"),
        ("timed", "mixture"),
    ]
    assert cards[-2].description == "Facts, told warmly"
    assert cards[-1].created == int((folder / "mixtures.toml").stat().st_mtime)
    assert cards[1].created == int((folder / "knowledge.pth").stat().st_mtime)
    assert {card.context_len for card in cards} == {512}


@pytest.mark.parametrize(
    ("text", "rows", "weights", "canonical", "rule"),
    [
        ("base", ["base"], (1.0,), "base", "linear~fixed"),
        ("base:3", ["base"], (1.0,), "base", "linear~fixed"),
        ("tone", ["tone"], (1.0,), "tone", "linear~fixed"),
        ("tone:3~delta", ["tone"], (1.0,), "tone", "linear~fixed"),
        ("tone+tone:2", ["tone"], (1.0,), "tone", "linear~fixed"),
        ("tone+knowledge:0", ["tone"], (1.0,), "tone", "linear~fixed"),
        (
            "tone:2+knowledge:4",
            ["base", "knowledge", "tone"],
            (0.0, 1.0, 0.5),
            "knowledge+tone:0.5",
            "delta~novelty",
        ),
        (
            "knowledge+tone@tiny~linear~fixed",
            ["knowledge", "tone"],
            (0.5, 0.5),
            "knowledge+tone~linear~fixed",
            "linear~fixed",
        ),
        (
            "knowledge+tone:0.25~linear",
            ["base", "knowledge", "tone"],
            (0.0, 0.8, 0.2),
            "knowledge+tone:0.25~linear",
            "linear~novelty",
        ),
        (
            "base:0.2+tone:0.8",
            ["base", "tone"],
            (0.2, 0.8),
            "base:0.25+tone",
            "delta~novelty",
        ),
        (
            "tone:3+base~geometric~fixed",
            ["base", "tone"],
            (0.25, 0.75),
            "base:0.3333+tone~geometric~fixed",
            "geometric~fixed",
        ),
        (
            "story",
            ["base", "knowledge", "tone"],
            (0.0, 1.0, 0.5),
            "knowledge+tone:0.5",
            "delta~novelty",
        ),
        (
            "story~linear~fixed",
            ["knowledge", "tone"],
            (2 / 3, 1 / 3),
            "knowledge+tone:0.5~linear~fixed",
            "linear~fixed",
        ),
        (
            "average",
            ["base", "knowledge", "tone"],
            (1 / 3, 1 / 3, 1 / 3),
            "base+knowledge+tone~geometric~fixed",
            "geometric~fixed",
        ),
    ],
)
def test_names_become_rows(
    library: StateLibrary,
    text: str,
    rows: list[str],
    weights: tuple[float, ...],
    canonical: str,
    rule: str,
) -> None:
    mixture = library.resolve(text)
    assert names(mixture) == rows
    assert mixture.rows == len(rows)
    assert mixture.weights == pytest.approx(weights, rel=1e-3)
    assert mixture.canonical == canonical
    assert f"{mixture.merge.text}~{mixture.gate.text}" == rule
    assert mixture.names == tuple(rows)
    assert max(mixture.ratios) == 1.0
    assert mixture.base_row == (0 if rows[0] == "base" else None)
    assert mixture.cut == (0.1 if mixture.merge.name == "delta" else 0.0)
    # The canonical name means the same thing.
    again = library.resolve(canonical)
    assert (again.fingerprint, again.weights) == (mixture.fingerprint, mixture.weights)


@pytest.mark.parametrize(
    ("text", "options", "canonical"),
    [
        ("knowledge+tone", MixtureOptions(weights={"tone": 0.5}), "knowledge+tone:0.5"),
        ("tone+knowledge", MixtureOptions(gating_weights=(1.0, 4.0)), "knowledge+tone:0.25"),
        ("tone+knowledge", MixtureOptions(gating_weights=(0.0, 4.0)), "knowledge"),
        ("tone+tone+base", MixtureOptions(gating_weights=(1.0, 1.0, 1.0)), "base:0.5+tone"),
        # The order of the terms as the file has them.
        ("story", MixtureOptions(gating_weights=(4.0, 1.0)), "knowledge:0.25+tone"),
        ("story", MixtureOptions(weights={"tone": 2.0}), "knowledge:0.5+tone"),
        (
            "knowledge+tone",
            MixtureOptions(merge="linear", gate="fixed"),
            "knowledge+tone~linear~fixed",
        ),
        ("knowledge+tone~linear", MixtureOptions(merge="linear"), "knowledge+tone~linear"),
        ("average", MixtureOptions(gate="novelty"), "base+knowledge+tone~geometric"),
        ("knowledge+tone", MixtureOptions(weights={}), "knowledge+tone"),
        ("tone", MixtureOptions(merge="delta", gate="novelty", cut=0.3), "tone"),
        (
            "knowledge+tone",
            MixtureOptions(merge="contrast", weights={"tone": -0.5}),
            "knowledge+tone:-0.5~contrast",
        ),
        ("base+tone:-0.5", MixtureOptions(merge="contrast"), "base+tone:-0.5~contrast"),
        ("knowledge+tone~power:2", MixtureOptions(merge="power:2.0"), "knowledge+tone~power:2"),
        (
            "knowledge+tone@tiny",
            MixtureOptions(gate="schedule:tone=1@9,0@0"),
            "knowledge+tone~schedule:tone=0@0,1@9",
        ),
        ("timed", None, "knowledge+tone~power~schedule:tone=0@0,1@2,turns"),
        ("timed~fixed", None, "knowledge+tone~power~fixed"),
        ("away", None, "base+tone:-0.25~contrast"),
    ],
)
def test_options_of_a_request(
    library: StateLibrary, text: str, options: MixtureOptions | None, canonical: str
) -> None:
    assert library.resolve(text, options).canonical == canonical


@pytest.mark.parametrize(
    ("text", "options", "alike"),
    [
        ("base+knowledge+tone:0~linear~schedule:tone=0@0,1@8", None, "base+knowledge~linear~fixed"),
        (
            "base+knowledge+tone~linear~schedule:knowledge=1@0,0@4+tone=0@0,1@8,turns",
            MixtureOptions(weights={"tone": 0.0}),
            "base+knowledge~linear~schedule:knowledge=1@0,0@4,turns",
        ),
        ("timed", MixtureOptions(weights={"tone": 0.0}), "knowledge"),
    ],
)
def test_what_a_schedule_says_of_a_term_without_weight_goes_with_the_term(
    library: StateLibrary, text: str, options: MixtureOptions | None, alike: str
) -> None:
    assert library.resolve(text, options) == library.resolve(alike)


def test_reinject_comes_from_the_request_then_the_mixture_and_is_never_by_itself(
    library: StateLibrary,
) -> None:
    story = library.mixtures["story"]
    said = {how: replace(story, reinject=how) for how in ("turn", "never")}
    entries = replace(library.entries, mixtures={**library.mixtures, **said})
    turn, never = MixtureOptions(reinject="turn"), MixtureOptions(reinject="never")
    for name, own in (("turn", "turn"), ("never", "never"), ("story", "never")):
        found = [library.resolve_in(entries, name, options) for options in (None, turn, never)]
        assert [mixture.reinject for mixture in found] == [own, "turn", "never"]
        assert found[0].fingerprint == found[2 if own == "never" else 1].fingerprint
        assert found[1].fingerprint != found[2].fingerprint
        # What a request asks for is not left out.
        assert [mixture.without_reinject is None for mixture in found[1:]] == [True, True]
        assert found[0].without_reinject == (found[2] if own == "turn" else None)
    single = library.resolve("tone", turn)
    assert (single.names, single.weights, single.base_row) == (("base", "tone"), (0.0, 1.0), 0)
    assert library.resolve("knowledge+tone~linear~fixed", turn).rows == 3
    assert library.resolve("base", turn) == library.resolve("base")


def test_cut_comes_from_the_request_then_the_mixture_then_the_default(
    library: StateLibrary,
) -> None:
    assert library.resolve("sharp").cut == 0.4
    assert library.resolve("sharp", MixtureOptions(cut=0)).cut == 0.0
    assert library.resolve("sharp~linear").cut == 0.0
    assert library.resolve("knowledge+tone", MixtureOptions(cut=0.2)).cut == 0.2
    assert library.resolve("knowledge+tone~linear", MixtureOptions(cut=0)).cut == 0.0


def test_defaults_of_a_named_mixture_reach_the_sampling(library: StateLibrary) -> None:
    story = library.resolve("story")
    assert (story.temperature, story.top_p, story.sampling_order) == (0.8, 0.9, "rwkv")
    card = {"temperature": 0.6, "top_p": 0.5}
    filled = resolve_sampling(SamplingParams(), story, **card)
    assert (filled.temperature, filled.top_p, filled.sampling_order) == (0.8, 0.9, "rwkv")
    said = SamplingParams(temperature=0.0, top_p=1.0, sampling_order="openai", seed=5, max_tokens=9)
    assert resolve_sampling(said, story, **card) == said
    tone = library.resolve("tone")
    filled = resolve_sampling(SamplingParams(), tone, **card)
    assert (filled.temperature, filled.top_p, filled.sampling_order) == (0.6, 0.5, "openai")
    filled = resolve_sampling(SamplingParams(), tone)
    assert (filled.temperature, filled.top_p) == (1.0, 0.7)
    assert filled.max_tokens == DEFAULT_MAX_TOKENS
    assert filled.seed is not None
    assert filled.seed != resolve_sampling(SamplingParams(), tone).seed
    assert resolve_sampling(SamplingParams(), tone, room=100).max_tokens == 100
    assert resolve_sampling(SamplingParams(), tone, room=-5).max_tokens == 1
    assert resolve_sampling(said, tone, room=3).max_tokens == 9


def test_the_fingerprint_changes_with_all_that_changes_an_answer(
    folder: Path, library: StateLibrary, tmp_path: Path, model_config: ModelConfig
) -> None:
    texts = ["tone", "knowledge", "base", "tone+knowledge", "tone:2+knowledge", "average"]
    texts += ["tone+knowledge~linear", "tone+knowledge~fixed", "sharp", "timed"]
    texts += ["tone+knowledge~power", "tone+knowledge~power:2", "tone+knowledge~novelty:0.1"]
    texts += ["tone+knowledge~contrast", "tone+knowledge:-1~contrast", "tone+knowledge~posterior"]
    prints = [library.resolve(text).fingerprint for text in texts]
    assert len(set(prints)) == len(texts)
    assert all(p.startswith("fp_") and len(p) == 19 for p in prints)
    # A row that reads a token more.
    with_bos = tmp_path / "with-bos"
    with_bos.mkdir()
    bos = replace(library.get("tone"), metadata=StateMetadata(bos=True))
    save_tuned_state(with_bos / "tone.safetensors", bos, model_config)
    assert StateLibrary(with_bos, model_config).resolve("tone").fingerprint != prints[0]
    # Another file under the same name; the same bytes under another name.
    shutil.copy(folder / "tone.pth", tmp_path / "other.pth")
    shutil.copy(folder / "poetry.pth", tmp_path / "tone.pth")
    moved = StateLibrary(tmp_path, model_config)
    assert moved.resolve("other").fingerprint == prints[0]
    assert moved.resolve("tone").fingerprint != prints[0]


def test_the_fingerprint_says_which_state_a_schedule_names(
    folder: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    """The same two states under names whose scheduled one is the other."""
    prints = []
    for number, names in enumerate((("a", "b"), ("b", "c"))):
        states = tmp_path / str(number)
        states.mkdir()
        for source, name in zip(("tone", "poetry"), names, strict=True):
            shutil.copy(folder / f"{source}.pth", states / f"{name}.pth")
        text = f"{'+'.join(names)}~linear~schedule:b=0@0"
        prints.append(StateLibrary(states, model_config).resolve(text).fingerprint)
    assert prints[0] != prints[1]


def test_a_mixture_is_told_in_the_template_that_it_or_its_states_ask_for(
    tmp_path: Path, model_config: ModelConfig
) -> None:
    wanted = {"knowledge": "g1", "tone": None, "poetry": "world"}
    for seed, (name, template) in enumerate(wanted.items()):
        path = tiny_model.write_state(tmp_path / f"{name}.pth", seed=seed)
        state = load_tuned_state(path, model_config, name=name)
        metadata = replace(state.metadata, template=template)
        file = tmp_path / f"{name}.safetensors"
        save_tuned_state(file, replace(state, metadata=metadata), model_config)
        path.unlink()
    (tmp_path / "mixtures.toml").write_text(
        '[both]\nterms = "knowledge+poetry"\ntemplate = "plain"\n'
        '[fight]\nterms = "knowledge+poetry"\n'
        '[odd]\nterms = "tone"\ntemplate = "none"\n'
    )
    library = StateLibrary(tmp_path, model_config)
    found = {
        name: library.resolve(name).template
        for name in ("base", "tone", "knowledge", "poetry+tone", "base+knowledge", "both")
    }
    assert found == {
        "base": None,
        "tone": None,
        "knowledge": "g1",
        "poetry+tone": "world",
        "base+knowledge": "g1",
        "both": "plain",
    }
    for name in ("knowledge+poetry", "fight"):
        with pytest.raises(InvalidRequestError, match="different chat templates") as caught:
            library.resolve(name)
        assert caught.value.param == "model"
    (problem,) = library.problems
    assert "template must be one of world, g1" in problem.error.message


def test_a_posterior_warns_once_of_states_that_were_tuned_on_answers_only(
    tmp_path: Path, model_config: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, (name, loss_on) in enumerate((("deaf", "answer"), ("open", "all"))):
        state = tiny_model.write_state(tmp_path / "from.pth", seed=seed)
        loaded = load_tuned_state(state, model_config, name=name)
        metadata = StateMetadata(group="facts", loss_on=loss_on)  # type: ignore[arg-type]
        loaded = replace(loaded, metadata=metadata)
        save_tuned_state(tmp_path / f"{name}.safetensors", loaded, model_config)
        state.unlink()
    library = StateLibrary(tmp_path, model_config)
    for _ in range(2):
        mixture = library.resolve("deaf+open~posterior-novelty")
    assert mixture.groups == ("", "facts", "facts")
    library.resolve("deaf+open~novelty")
    warned = [record.getMessage() for record in caplog.records]
    assert [text for text in warned if "'deaf'" in text] == [
        "the state 'deaf' was tuned with a loss on answers only: a posterior learns next to "
        "nothing from it"
    ]
    assert not [text for text in warned if "'open'" in text]
