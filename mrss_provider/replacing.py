"""replace_file: a file's next content in the place of the last one, whole or not at all. A leaf."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path


def replace_file(path: Path, data: bytes | memoryview, *, mode: int = 0o666) -> None:
    """Write a file so that a crash at any moment, also of the machine, leaves the old or the new.

    What a killed process leaves beside it is called `.NAME.*.partial`.

    Args:
        path: of the file, whose folder is there.
        data: all of it.
        mode: who may read and write it, before the umask.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            # A name may reach the disk before the bytes do.
            os.fsync(descriptor)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_names(path.parent)


def _sync_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some network file systems cannot; the file is whole there all the same.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
