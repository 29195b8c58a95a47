"""A file's next content in the place of the last one, whole or not at all. A leaf."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

# Where a file can be written, but no other made beside it or named as it: a folder of somebody
# else's, a file system that is read only, a file that is mounted by itself.
_NO_SECOND_FILE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY})


def replace_file(path: Path, data: bytes | memoryview, *, mode: int = 0o666) -> None:
    """Write a file so that a crash at any moment, also of the machine, leaves the old or the new.

    What a killed process leaves beside it is called `.NAME.*.partial`.

    Args:
        path: of the file, whose folder is there.
        data: all of it.
        mode: who may read and write it, before the umask.

    Raises:
        OSError: it cannot be written; the old one is as it was. `path` is named.
    """
    with _named(path):
        _replace(path, data, mode, None)


def write_output(path: Path, data: bytes) -> None:
    """Write what somebody named as the output of a command, as `replace_file` where that can be.

    A link leads to the file that is replaced, which keeps its owner and its mode. What is no
    regular file, such as a pipe or `/dev/stdout`, is written into, and so is a file that no other
    can take the place of: the only one that its folder lets us write, or one mounted by itself.

    Args:
        path: of the output, whose folder is there.
        data: all of it.

    Raises:
        OSError: it cannot be written, or is a folder. `path` is named.
    """
    with _named(path):
        try:
            found = path.stat()
        except FileNotFoundError:
            _replace(path.resolve(), data, 0o666, None)
            return
        # What `/dev/stdout` leads to has a name only where it is a file.
        target = path.resolve()
        # Its folder would let us replace what we may not write.
        if target.is_file() and os.access(target, os.W_OK):
            try:
                _replace(target, data, 0o600, found)
                return
            except OSError as exc:
                if exc.errno not in _NO_SECOND_FILE:
                    raise
        with path.open("wb") as file:
            file.write(data)


def _replace(path: Path, data: bytes | memoryview, mode: int, like: os.stat_result | None) -> None:
    """Replace a file; `like` is that of which owner and mode are kept."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            if like is not None:
                os.fchown(descriptor, like.st_uid, like.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(like.st_mode))
            file.write(data)
            file.flush()
            # A name may reach the disk before the bytes do.
            os.fsync(descriptor)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_names(path.parent)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an error name the file, whatever the step that failed was called with."""
    try:
        yield
    except OSError as exc:
        exc.filename = str(path)
        del exc.filename2
        raise


def _sync_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some network file systems cannot; the file is whole there all the same.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
