"""States and mixtures changed while a library is in use. Oracle: a fresh library of the folder."""

import os
import threading
from pathlib import Path

import pytest
import tiny_model

from mrss_provider.administration import Defaults, MixtureSpec
from mrss_provider.engine import library_files
from mrss_provider.engine.library_admin import LibraryAdmin
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.errors import (
    ConflictError,
    InvalidRequestError,
    MRSSError,
    NotFoundError,
    PayloadTooLargeError,
    StateFileError,
    StorageError,
    UnknownNameError,
)

NONE = Defaults()


def restarted(library: StateLibrary, folder: Path) -> StateLibrary:
    return StateLibrary(folder, library.model_config, model_name="tiny", max_states=4)


def test_an_added_state_is_there_after_a_restart(admin, library, folder):
    info = admin.add_state("more/a.pth", "poetry")
    assert (info.name, info.file, info.added) == ("poetry", "poetry.safetensors", True)
    again = restarted(library, folder)
    assert again.problems == ()
    assert again.get("poetry").sha256 == library.get("poetry").sha256 == info.sha256
    assert [card.id for card in library.cards()] == ["base", "knowledge", "poetry", "tone", "story"]


def test_an_uploaded_state_is_kept_and_its_file_stays(admin, library, folder, tmp_path):
    file = tiny_model.write_state(tmp_path / "upload.pth", seed=9)
    admin.upload_state(file, "sent")
    assert file.exists()
    assert restarted(library, folder).get("sent").sha256 == library.get("sent").sha256


def test_removing_a_state_deletes_only_what_the_server_wrote(admin, library, folder):
    admin.add_state("more/a.pth", "poetry")
    admin.remove_state("poetry")
    assert not list((folder / "added").iterdir())
    assert (folder / "more/a.pth").exists()
    admin.remove_mixture("story")
    kept = admin.remove_state("tone")
    assert (kept.file, kept.added) == ("tone.pth", False)
    assert (folder / "tone.pth").exists()
    with pytest.raises(UnknownNameError):
        library.resolve("tone")
    # Its file is where a start looks, so nothing is copied.
    assert admin.add_state("tone.pth").added is False
    assert library.resolve("tone").names == ("tone",)


def test_a_state_in_use_by_a_mixture_stays(admin, library):
    with pytest.raises(ConflictError, match="story"):
        admin.remove_state("tone")
    assert library.get("tone")


def test_a_resolved_name_keeps_its_states(admin, library):
    before = library.resolve("story")
    admin.remove_all_states()
    assert [state.name for state in before.states if state] == ["knowledge", "tone"]
    assert [card.id for card in library.cards()] == ["base"]


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("../outside.pth", InvalidRequestError),
        ("/etc/passwd", InvalidRequestError),
        ("more/../../outside.pth", InvalidRequestError),
        ("link.pth", InvalidRequestError),
        ("linked/outside.pth", InvalidRequestError),
        ("", InvalidRequestError),
        ("\0", InvalidRequestError),
        ("x" * 3000, InvalidRequestError),
        ("absent.pth", NotFoundError),
        ("states/absent.pth", NotFoundError),
        ("more", StateFileError),
        ("mixtures.toml", StateFileError),
        ("pipe.pth", StateFileError),
        ("garbage.pth", StateFileError),
        ("huge.pth", PayloadTooLargeError),
    ],
)
def test_a_path_that_may_not_be_loaded(admin, library, folder, path, error):
    tiny_model.write_state(folder.parent / "outside.pth")
    (folder / "link.pth").symlink_to("../outside.pth")
    (folder / "linked").symlink_to("..")
    os.mkfifo(folder / "pipe.pth")
    (folder / "garbage.pth").write_bytes(b"PK\x03\x04 no")
    with (folder / "huge.pth").open("wb") as file:
        file.truncate((1 << 20) + 1)
    before = library.entries
    with pytest.raises(error):
        admin.add_state(path, "poetry")
    assert library.entries is before
    assert not (folder / "added").exists()


def test_inside_and_outside_sound_alike_whether_a_file_exists_or_not(admin, folder):
    tiny_model.write_state(folder.parent / "outside.pth")
    said = []
    for path in ("../outside.pth", "../absent.pth"):
        with pytest.raises(InvalidRequestError) as caught:
            admin.add_state(path, "poetry")
        said.append(caught.value.message.replace(path, ""))
    assert said[0] == said[1]


@pytest.mark.parametrize("path", ["more/a.pth", "states/more/a.pth", "{}/more/a.pth"])
def test_a_path_may_begin_with_the_folder(admin, folder, path):
    assert admin.add_state(path.format(folder), "poetry").name == "poetry"


@pytest.mark.parametrize("name", ["tone", "story", "base", "two words", "../up", "replicate-me"])
def test_a_name_that_no_new_state_may_have(admin, folder, name):
    with pytest.raises((ConflictError, InvalidRequestError)):
        admin.add_state("more/a.pth", name)
    assert not (folder / "added").exists()


def test_a_mixture_is_written_and_the_file_keeps_its_comment(admin, library, folder):
    spec = MixtureSpec("tone:2+base", merge="linear", gate="fixed", temperature=0.5)
    assert admin.put_mixture("warm", spec, is_new=True)
    assert (folder / "mixtures.toml").read_text().startswith('# ours\n[story]\nterms = "')
    again = restarted(library, folder)
    assert again.mixtures == library.mixtures
    assert again.resolve("warm") == library.resolve("warm")
    with pytest.raises(ConflictError):
        admin.put_mixture("warm", spec, is_new=True)
    assert not admin.put_mixture("warm", MixtureSpec("tone"), is_new=False)
    assert restarted(library, folder).resolve("warm").canonical == "tone"
    admin.remove_mixture("warm")
    assert "warm" not in restarted(library, folder).mixtures
    with pytest.raises(NotFoundError):
        admin.remove_mixture("warm")


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("tone", MixtureSpec("knowledge")),
        ("two words", MixtureSpec("tone")),
        ("x", MixtureSpec("story")),
        ("x", MixtureSpec("absent")),
        ("x", MixtureSpec("tone", merge="mean")),
        ("x", MixtureSpec("tone", cut=2)),
        ("x", MixtureSpec("tone", temperature=-1)),
        ("x", MixtureSpec("tone~linear")),
        ("x", MixtureSpec("tone:0")),
        ("x", MixtureSpec("tone+knowledge", gate="learned:absent")),
        ("x", MixtureSpec("tone+knowledge", gate="schedule:other=0@0,1@2")),
    ],
)
def test_a_mixture_that_means_nothing_changes_nothing(admin, library, folder, name, spec):
    before, text = library.entries, (folder / "mixtures.toml").read_text()
    with pytest.raises((InvalidRequestError, ConflictError)):
        admin.put_mixture(name, spec, is_new=False)
    assert library.entries is before
    assert (folder / "mixtures.toml").read_text() == text


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_kill_or_a_full_disk_leaves_the_old_library(admin, library, folder, monkeypatch, at):
    before, text = library.entries, (folder / "mixtures.toml").read_text()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def fdopen(descriptor, mode):
        os.close(descriptor)
        fail()

    target = {"write": (os, "fdopen"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[at]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fdopen if at == "write" else fail)
        with pytest.raises(StorageError):
            admin.put_mixture("warm", MixtureSpec("tone"), is_new=True)
        with pytest.raises(StorageError):
            admin.add_state("more/a.pth", "poetry")
    assert library.entries is before
    assert (folder / "mixtures.toml").read_text() == text
    again = restarted(library, folder)
    assert (sorted(again.states), sorted(again.mixtures)) == (["knowledge", "tone"], ["story"])
    assert not list(folder.glob("**/*.partial"))


def test_changes_from_many_threads_lose_nothing(admin, library, folder):
    errors = []

    def work(number):
        try:
            for name in (f"m{number}", f"n{number}"):
                admin.put_mixture(name, MixtureSpec("tone"), is_new=True)
            admin.remove_mixture(f"n{number}")
        except MRSSError as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    expected = sorted(["story", *(f"m{number}" for number in range(8))])
    assert sorted(library.mixtures) == expected
    assert sorted(restarted(library, folder).mixtures) == expected


def test_a_lasting_mixture_needs_lasting_states(admin, folder):
    admin.serve_state("more/a.pth", "fleeting", NONE)
    with pytest.raises(ConflictError, match="in memory"):
        admin.put_mixture("x", MixtureSpec("fleeting"), is_new=True)


def test_the_bundled_folder_is_left_alone(model_config, tmp_path):
    folder = tmp_path / "_bundled/states"
    folder.mkdir(parents=True)
    tiny_model.write_state(folder / "tone.pth")
    library = StateLibrary(folder, model_config)
    admin = LibraryAdmin(library, folder, max_state_bytes=1 << 20, strict=False)
    with pytest.raises(ConflictError, match="--states"):
        admin.put_mixture("x", MixtureSpec("tone"), is_new=True)
    assert sorted(path.name for path in folder.iterdir()) == ["tone.pth"]


def test_a_write_waits_for_another_process(folder):
    order = []
    with library_files._locked(folder):
        thread = threading.Thread(
            target=lambda: library_files.edit_mixtures(
                folder, lambda text: order.append("edit") or text
            )
        )
        thread.start()
        thread.join(0.05)
        order.append("free")
    thread.join()
    assert order == ["free", "edit"]
