"""replace_file: what is left when it is cut short, by an error or by the end of power."""

import os
from pathlib import Path

import pytest

from mrss_provider.replacing import replace_file


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_it_returns(
    tmp_path, monkeypatch
):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = []
    sync, replace = os.fsync, Path.replace

    def recorded_sync(descriptor):
        sync(descriptor)
        found = os.fstat(descriptor)
        done.append(("synced", found.st_ino, found.st_size))

    def recorded_replace(self, target):
        done.append(("named", self.stat().st_ino, self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    replace_file(path, b"the next", mode=0o600)
    file, folder = path.stat(), tmp_path.stat()
    assert [what for what, *_ in done] == ["synced", "named", "synced"]
    assert done[0][1:] == done[1][1:] == (file.st_ino, len(b"the next"))
    assert done[2][1] == folder.st_ino
    assert file.st_mode & 0o777 == 0o600


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(*((os, "fsync", full) if call == "fsync" else (Path, "replace", full)))
    with pytest.raises(OSError, match="no space left"):
        replace_file(path, b"the next")
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == {"file": b"old"}


def test_a_disk_that_cannot_sync_names_has_the_new_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    sync = os.fsync

    def files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError("not supported")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    replace_file(path, b"the next")
    assert path.read_bytes() == b"the next"
