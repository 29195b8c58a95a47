"""append_line: a line at the end of a file, whole or not at all. A leaf."""

from __future__ import annotations

import errno
import os


def append_line(file: int, line: bytes) -> None:
    """Write a line at the end of a file, or leave the file as it was.

    Args:
        file: open for appending; nobody else writes to it meanwhile.
        line: with its end.

    Raises:
        OSError: it cannot be written.
    """
    size = os.fstat(file).st_size
    if os.write(file, line) < len(line):
        # A disk that is nearly full takes a part; the next line would go on in the middle of it.
        os.ftruncate(file, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
