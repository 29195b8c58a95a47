"""JsonLines: an append-only file that a kill leaves readable, and that one process writes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mrss_provider.appending import append_line
from mrss_provider.errors import ConflictError, FileFormatError, StorageError


class JsonLines:
    """A file of JSON objects, one a line, open for appending.

    A last line without its end is what a kill left: it is dropped when the file is opened.

    Args:
        path: made if it is not there.

    Raises:
        ConflictError: another process has it open.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(self._file)
            raise ConflictError(f"{path} is being written by another mrss compare") from exc
        os.ftruncate(self._file, _end_of_whole_lines(self._file))

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line, which is on the disk when this returns.

        Raises:
            StorageError: it cannot be written; what was there stays whole.
        """
        # ASCII, since a model may send half of a surrogate pair.
        data = json.dumps(line).encode() + b"\n"
        try:
            append_line(self._file, data)
            os.fsync(self._file)
        except OSError as exc:
            raise StorageError(f"{self.path} cannot be written: {exc.strerror or exc}") from exc

    def close(self) -> None:
        """Let others write."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each whole line of a file, with its number; nothing where there is no file.

    Raises:
        FileFormatError: a line that is no JSON object; the message names it.
        OSError: the file cannot be read.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    yield from lines_of(file, path)


def lines_of(file: BinaryIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the same of an open file, which is closed then; `path` is for messages."""
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as exc:
                raise FileFormatError(f"{path}, line {number}: no JSON: {exc}") from exc
            if not isinstance(value, dict):
                raise FileFormatError(f"{path}, line {number}: a line must be a JSON object")
            yield number, value


def _end_of_whole_lines(file: int) -> int:
    size = os.fstat(file).st_size
    end, step = size, 1 << 16
    while end > 0:
        start = max(0, end - step)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
