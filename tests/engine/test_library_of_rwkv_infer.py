"""States and mixtures loaded in RWKV-Infer's manner: called by display names, in memory only."""

import pytest

from mrss_provider.administration import Defaults
from mrss_provider.backend import MixtureOptions
from mrss_provider.engine.library_admin import LibraryAdmin
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.errors import InvalidRequestError, NotFoundError

NONE = Defaults()


def test_a_state_of_rwkv_infer_has_its_display_name_and_its_defaults(admin, library):
    admin.serve_state("more/a.pth", "State Test", Defaults(1.0, 0.3))
    for name in ("State Test", "tiny State Test", "State-Test"):
        mixture = library.resolve(name)
        assert (mixture.canonical, mixture.temperature, mixture.top_p) == ("State-Test", 1.0, 0.3)
        assert mixture.sampling_order == "rwkv"
    assert admin.request_ids() == [
        "tiny",
        "tiny State Test",
        "tiny knowledge",
        "tiny tone",
        "tiny story",
    ]
    assert library.resolve("tiny").canonical == "base"
    # The state alone has defaults; a mixture that it is a term of does not.
    assert library.resolve("State-Test+tone").temperature is None


def test_loading_the_same_name_again_replaces_it(admin, library):
    admin.serve_state("more/a.pth", "State Test", NONE)
    first = library.get("State-Test").sha256
    admin.serve_state("more/b.pth", "State Test", NONE)
    assert library.get("State-Test").sha256 != first
    admin.serve_state("more/c.pth", "State.Test", NONE)
    admin.serve_state("more/c.pth", "State/Test", NONE)
    assert library.resolve("State/Test").canonical == "State-Test-2"


def test_a_mixture_of_rwkv_infer_keeps_the_states_that_it_was_loaded_with(admin, library):
    admin.serve_state("more/a.pth", "State Test", NONE)
    admin.serve_mixture(
        ["more/a.pth", "tone.pth"], "MRSS Test", with_base=True, weights=[1, 2, 3], defaults=NONE
    )
    before = library.resolve("MRSS Test")
    first = library.get("State-Test")
    admin.serve_state("more/b.pth", "State Test", NONE)
    assert library.get("State-Test").sha256 != first.sha256
    after = library.resolve("MRSS Test")
    shares = [
        {
            state and state.sha256: ratio
            for state, ratio in zip(mixture.states, mixture.ratios, strict=True)
        }
        for mixture in (before, after)
    ]
    assert shares[0] == shares[1]
    # Its rows are in the order of the files still.
    admin.reweigh("MRSS Test", [1, 0, 0], NONE)
    (alone,) = library.resolve("MRSS Test").states
    assert alone.sha256 == first.sha256
    # The same content again, and one that no mixture holds: no more states than names.
    admin.serve_state("more/b.pth", "State Test", NONE)
    admin.serve_state("more/c.pth", "State Test", NONE)
    assert len(library.states) == 4


def test_a_mixture_that_names_its_states_follows_the_names(admin, library, folder):
    # Also one that is in all else as RWKV-Infer's are.
    likeness = 'merge = "geometric"\ngate = "fixed"\ndisplay_name = "A story"\n'
    with (folder / "mixtures.toml").open("a") as file:
        file.write(likeness)
    library = StateLibrary(folder, library.model_config, model_name="tiny", max_states=4)
    admin = LibraryAdmin(library, folder, max_state_bytes=1 << 20, strict=False)
    admin.serve_state("more/a.pth", "tone", NONE)
    assert [state.sha256 for state in library.resolve("story").states] == [
        library.get(name).sha256 for name in ("knowledge", "tone")
    ]
    assert sorted(library.states) == ["knowledge", "tone"]


PATHS = ("states/more/a.pth", "states/more/b.pth", "more/c.pth")


def test_a_mixture_of_rwkv_infer_averages_logits_with_the_base_last(admin, library, folder):
    admin.serve_mixture(
        PATHS,
        "MRSS Test",
        with_base=True,
        weights=[0.01, 0.3, 0.4, 0.03],
        defaults=Defaults(1.0, 0.8),
    )
    terms = library.mixtures["MRSS-Test"].terms
    assert [(t.name, t.weight) for t in terms] == [
        ("a", 0.01),
        ("b", 0.3),
        ("c", 0.4),
        ("base", 0.03),
    ]
    mixture = library.resolve("tiny MRSS Test")
    assert mixture.canonical == "a:0.025+b:0.75+base:0.075+c~geometric~fixed"
    assert (mixture.temperature, mixture.top_p, mixture.sampling_order) == (1.0, 0.8, "rwkv")
    # Its list is in the order of the files, the base last.
    weighed = library.resolve("MRSS Test", MixtureOptions(gating_weights=(0, 0, 0, 1)))
    assert weighed.canonical == "base"
    assert not (folder / "added").exists()
    assert "MRSS" not in (folder / "mixtures.toml").read_text()


def test_weights_are_padded_and_checked(admin, library):
    admin.serve_mixture(PATHS, "m", with_base=True, weights=[1, 3], defaults=NONE)
    assert [t.weight for t in library.mixtures["m"].terms] == [1, 3, 0, 0]
    admin.reweigh("tiny m", [0, 0, 0, 2], NONE)
    assert [t.weight for t in library.mixtures["m"].terms] == [0, 0, 0, 2]
    admin.reweigh("m", None, Defaults(top_p=0.5))
    assert [t.weight for t in library.mixtures["m"].terms] == [1, 1, 1, 1]
    assert library.resolve("m").top_p == 0.5
    before = library.entries
    for weights in ([1, 1, 1, 1, 1], [0, 0], [], [-1, 2]):
        with pytest.raises(InvalidRequestError):
            admin.reweigh("m", weights, NONE)
    with pytest.raises(NotFoundError):
        admin.reweigh("tone", [1], NONE)
    assert library.entries is before


def test_the_same_file_is_one_state(admin, library):
    admin.serve_mixture(
        ["tone.pth", "tone.pth"], "m", with_base=False, weights=[1, 2], defaults=NONE
    )
    assert [t.name for t in library.mixtures["m"].terms] == ["tone", "tone"]
    assert library.resolve("m").canonical == "tone"
    assert sorted(library.states) == ["knowledge", "tone"]


def test_another_file_of_the_same_name_is_another_state(admin, library, folder):
    (folder / "more/tone.pth").write_bytes((folder / "more/a.pth").read_bytes())
    before = library.get("tone").sha256
    admin.serve_mixture(["more/tone.pth"], "m", with_base=True, weights=None, defaults=NONE)
    assert library.get("tone").sha256 == before
    (other,) = set(library.states) - {"knowledge", "tone"}
    assert other.startswith("tone-")
    assert [t.name for t in library.mixtures["m"].terms] == [other, "base"]


def test_too_many_states_are_refused(admin):
    with pytest.raises(InvalidRequestError, match="max_states"):
        admin.serve_mixture(["more/a.pth"] * 4, "m", with_base=True, weights=None, defaults=NONE)


def test_a_display_name_takes_no_typed_meaning(admin, library):
    admin.serve_state("more/a.pth", "knowledge+tone", NONE)
    admin.serve_state("more/b.pth", "tiny", NONE)
    assert library.resolve("knowledge+tone").canonical == "knowledge+tone"
    assert library.resolve("tiny knowledge+tone").canonical == "knowledge-tone"
    assert library.resolve("tiny").canonical == "tiny"
    assert library.resolve("tone~linear").canonical == "tone"
