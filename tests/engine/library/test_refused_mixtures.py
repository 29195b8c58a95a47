"""What StateLibrary refuses: unknown names, bad options, too many states, each told as it is."""

from pathlib import Path

import pytest

from mrss_provider.backend import MixtureOptions
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.errors import InvalidRequestError, UnknownNameError
from mrss_provider.model import ModelConfig


@pytest.mark.parametrize(
    ("text", "position", "suggestions", "message"),
    [
        ("konwledge", 0, ("knowledge",), "'konwledge' at position 0 .*did you mean 'knowledge'"),
        ("tone:0.3+poetri", 9, ("poetry",), "did you mean 'poetry'"),
        (
            "xyz",
            0,
            (),
            "known are base, knowledge, poetry, tone, average, away, sharp, story, timed",
        ),
        ("tone@demo", 5, ("tiny",), "unknown model 'demo' .* has loaded 'tiny'"),
        ("Tone", 0, ("tone",), "did you mean 'tone'"),
    ],
)
def test_unknown_names_are_a_400_with_position_and_neighbours(
    library: StateLibrary, text: str, position: int, suggestions: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UnknownNameError, match=message) as caught:
        library.resolve(text)
    assert caught.value.status_code == 400
    assert caught.value.to_dict()["error"]["code"] == "model_not_found"  # type: ignore[index]
    assert caught.value.position == position
    assert set(suggestions) <= set(caught.value.suggestions)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("tone+", None, "at position 5: expected a state name, got the end"),
        ("story+tone", None, r"'story' at position 0 .* cannot be a term.*\(tone\+knowledge\)"),
        ("tone+story", None, "'story' at position 5"),
        ("story:0.5", None, "cannot be a term or have a weight"),
        ("tone", MixtureOptions(weights={"knowledge": 1.0}), "names 'knowledge', which is not"),
        ("tone", MixtureOptions(weights={"tone": 0.0}), "at least one weight must be above 0"),
        ("tone+poetry", MixtureOptions(gating_weights=(1.0,)), "each of 2 terms .*, got 1"),
        ("tone+poetry", MixtureOptions(gating_weights=(1, 2, 3)), "got 3"),
        ("tone+poetry", MixtureOptions(gating_weights=(0, 0)), "at least one weight"),
        (
            "tone+poetry",
            MixtureOptions(gating_weights=(1, -1)),
            "weight -1 of 'poetry' is below 0, which only the merge rule 'contrast'",
        ),
        (
            "tone",
            MixtureOptions(weights={"tone": 1}, gating_weights=(1.0,)),
            "mrss.weights or mrss_gatingweight, not both",
        ),
        ("tone+poetry", MixtureOptions(merge="mean"), "mrss.merge must be one of linear, geo"),
        ("tone+poetry", MixtureOptions(gate="loud"), "mrss.gate must be one of fixed, sch"),
        ("tone+poetry~linear", MixtureOptions(merge="delta"), "says '~linear' and mrss.merge says"),
        (
            "tone+poetry",
            MixtureOptions(merge="power:11"),
            r"exponent must be a number in \[-10, 10",
        ),
        ("tone+poetry~power:2", MixtureOptions(merge="power"), "says '~power:2' .* says 'power'"),
        ("tone+poetry", MixtureOptions(gate="learned:x"), "no trained gate 'x'; known are none"),
        ("tone+poetry", MixtureOptions(gate="schedule:knowledge=0@0"), "the terms are poetry, ton"),
        (
            "tone+poetry~linear",
            MixtureOptions(gate="schedule:tone=0@0+poetry=0@9"),
            "got none at 0",
        ),
        ("tone+poetry:-0.5", None, "which only the merge rule 'contrast' understands, got 'delta'"),
        ("tone+poetry:-0.5~linear", None, "got 'linear'"),
        (
            "tone+poetry",
            MixtureOptions(merge="contrast", weights={"tone": -1, "poetry": -2}),
            "at least one weight must be above 0",
        ),
        ("tone+poetry", MixtureOptions(cut=1.0), r"mrss.cut must be in \[0, 1\), got 1.0"),
        ("tone+poetry", MixtureOptions(cut=float("nan")), "mrss.cut must be in"),
        ("tone+poetry", MixtureOptions(cut="x"), "got 'x'"),  # type: ignore[arg-type]
        ("tone+poetry~linear", MixtureOptions(cut=0.2), "'linear' has no cut"),
        ("average", MixtureOptions(cut=0.2), "'geometric' has no cut"),
    ],
)
def test_bad_requests_are_a_400(
    library: StateLibrary, text: str, options: MixtureOptions | None, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        library.resolve(text, options)
    assert caught.value.status_code == 400


def test_the_number_of_states_is_limited(folder: Path, model_config: ModelConfig) -> None:
    library = StateLibrary(folder, model_config, max_states=2)
    library.resolve("tone+knowledge+tone")
    with pytest.raises(InvalidRequestError, match=r"at most 2 states \(max_states\), got 3"):
        library.resolve("tone+knowledge+base")


def test_get_refuses_what_is_no_state(library: StateLibrary) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tone'"):
        library.get("tune")
    with pytest.raises(UnknownNameError):
        library.get("story")
