"""Sessions that are deleted, held and written by several at once: nobody undoes another's work."""

import os
import time

import pytest

from mrss_provider.backend import SessionInfo
from mrss_provider.engine.session_store import SessionStore
from mrss_provider.errors import ConflictError, NotFoundError, StorageError

INFO = SessionInfo("ses_" + "0" * 24, "k1", "tone", 3, 0, 1, 1)
ROOMY = {"max_sessions": 2, "max_bytes": 1000}


@pytest.fixture(params=["memory", "files"])
def store(request, tmp_path):
    return SessionStore(**ROOMY, folder=tmp_path if request.param == "files" else None)


def test_what_was_deleted_before_it_is_saved_again_does_not_come_back(store):
    store.put(INFO, b"before")
    store.delete(INFO.id, "k1")
    with pytest.raises(NotFoundError):
        store.put(INFO, b"after", is_new=False)
    assert store.infos("k1") == []


def test_what_is_deleted_while_it_is_written_does_not_come_back(store, tmp_path, monkeypatch):
    store.put(INFO, b"before")
    write = SessionStore._write

    def late(self, session_id, data):
        store.delete(session_id, "k1")
        write(self, session_id, data)

    monkeypatch.setattr(SessionStore, "_write", late)
    with pytest.raises(NotFoundError):
        store.put(INFO, b"after", is_new=False)
    assert not list(tmp_path.iterdir())
    assert not store._data


def test_a_write_that_fails_does_not_bring_back_what_was_deleted(store, monkeypatch):
    store.put(INFO, b"before")

    def full(self, session_id, data):
        store.delete(session_id, "k1")
        raise OSError("no space left")

    monkeypatch.setattr(SessionStore, "_write", full)
    with pytest.raises(StorageError, match="no space left"):
        store.put(INFO, b"after", is_new=False)
    assert store.infos("k1") == []


def test_a_file_that_cannot_be_deleted_is_told_and_the_session_stays(tmp_path, monkeypatch):
    store = SessionStore(**ROOMY, folder=tmp_path)
    info = store.put(INFO, b"data")

    def refused(self, missing_ok=False):
        raise PermissionError(13, "Permission denied", os.fspath(self))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", refused)
        with pytest.raises(StorageError, match="Permission denied"):
            store.delete(INFO.id, "k1")
    assert store.infos("k1") == [info]
    assert store.get(INFO.id, "k1") == b"data"


def test_only_the_holder_lets_go(store):
    first, second = object(), object()
    store.hold(INFO.id, first)
    store.release(INFO.id, first)
    store.hold(INFO.id, second)
    # Who lets go twice does not let go of another's.
    store.release(INFO.id, first)
    with pytest.raises(ConflictError):
        store.hold(INFO.id, object())


def test_a_start_sweeps_what_a_killed_engine_left_and_nothing_else(tmp_path):
    old = time.time() - 2 * 3600
    partial = f".{INFO.id}.safetensors.7.9.partial"
    for name, is_old in {
        partial: True,
        # Another engine's, that shares the folder and is writing.
        partial.replace("7.9", "8.9"): False,
        # Nobody's session.
        ".ses_notes.partial": True,
        f".{INFO.id}.partial": True,
        f"{INFO.id}.txt": True,
    }.items():
        (tmp_path / name).write_bytes(b"cut")
        if is_old:
            os.utime(tmp_path / name, (old, old))
    before = {path.name for path in tmp_path.iterdir()}
    SessionStore(**ROOMY, folder=tmp_path)
    assert before - {path.name for path in tmp_path.iterdir()} == {partial}
