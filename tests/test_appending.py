"""append_line on a disk that is nearly full: the file has whole lines, whatever happens."""

import os

import pytest

from mrss_provider.appending import append_line


def test_what_the_disk_takes_in_part_only_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        append_line(file, b"first\n")
        write = os.write
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, data: write(file, data[:3]))
            with pytest.raises(OSError, match="No space left"):
                append_line(file, b"second\n")
        append_line(file, b"third\n")
    finally:
        os.close(file)
    assert path.read_bytes() == b"first\nthird\n"
