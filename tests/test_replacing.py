"""What is left of a file when its replacement is cut short, by an error or by the end of power."""

import errno
import os
import stat
from pathlib import Path

import pytest

from mrss_provider.replacing import replace_file, write_output


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
        raise OSError(errno.ENOSPC, "No space left", "the other")

    monkeypatch.setattr(*((os, "fsync", full) if call == "fsync" else (Path, "replace", full)))
    for write in (replace_file, write_output):
        with pytest.raises(OSError, match="No space left") as failed:
            write(path, b"the next")
        assert str(failed.value) == f"[Errno {errno.ENOSPC}] No space left: '{path}'"
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


@pytest.mark.parametrize("write", [replace_file, write_output])
def test_an_error_names_the_file_and_not_what_stood_in_for_it(tmp_path, write):
    path = tmp_path / "none" / "file"
    with pytest.raises(FileNotFoundError) as failed:
        write(path, b"x")
    assert (failed.value.filename, failed.value.filename2) == (str(path), None)


def test_an_output_is_replaced_where_its_link_leads_and_keeps_its_mode(tmp_path):
    file, link, dangling = tmp_path / "file", tmp_path / "link", tmp_path / "dangling"
    file.write_bytes(b"old")
    if os.geteuid() == 0:
        os.chown(file, 1, 1)
    file.chmod(0o662)
    owner = file.stat().st_uid
    link.symlink_to(file)
    dangling.symlink_to(tmp_path / "new")
    with file.open("rb") as old:
        write_output(link, b"the next")
        assert old.read() == b"old", "who reads the old one reads it to its end"
    write_output(dangling, b"first")
    assert file.read_bytes() == b"the next"
    assert (stat.S_IMODE(file.stat().st_mode), file.stat().st_uid) == (0o662, owner)
    assert (tmp_path / "new").read_bytes() == b"first"
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert len(list(tmp_path.iterdir())) == 4


def test_an_output_that_is_no_regular_file_is_written_into(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    write_output(fifo, b"by name")
    assert os.read(reader, 100) == b"by name"
    os.close(reader)
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    # As `/dev/stdout` before `| cat`.
    reader, writer = os.pipe()
    write_output(Path(f"/proc/self/fd/{writer}"), b"by number")
    assert os.read(reader, 100) == b"by number"
    os.close(reader)
    os.close(writer)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_output(tmp_path / "folder", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "folder"]


def test_an_output_that_has_lost_its_name_is_written_into(tmp_path):
    path = tmp_path / "file"
    with path.open("w+b") as file:
        path.unlink()
        write_output(Path(f"/proc/self/fd/{file.fileno()}"), b"still there")
        assert file.read() == b"still there"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["open", "fchown", "replace"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY])
def test_an_output_that_nothing_can_take_the_place_of_is_written_into(
    tmp_path, monkeypatch, call, number
):
    path = tmp_path / "file"
    path.write_bytes(b"the old one")

    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(Path if call == "replace" else os, call, refuse)
        inode = path.stat().st_ino
        write_output(path, b"the next")
    assert (path.read_bytes(), path.stat().st_ino) == (b"the next", inode)
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_that_may_not_be_written_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o444)
    # A superuser may always.
    monkeypatch.setattr(os, "access", lambda *arguments: False)

    def refuse(self, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError):
        write_output(path, b"the next")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
