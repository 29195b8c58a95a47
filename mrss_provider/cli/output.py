"""What the commands print, and how they fail.

Answers go to stdout, everything else to stderr. A command that cannot do its work raises
`CommandError` (or any `MRSSError`): `run` prints its one sentence and exits with 1.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mrss_provider.errors import MRSSError


class CommandError(Exception):
    """A command that cannot do its work; the message is one sentence for the user."""


def answer(text: str) -> None:
    """Write one line to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def answer_json(value: object) -> None:
    """Write `value` to stdout as one line of JSON."""
    answer(json.dumps(value, ensure_ascii=False))


def note(text: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay `rows` out in columns, two spaces apart, without trailing blanks."""
    lines = [tuple(header), *[tuple(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def printable(text: str) -> str:
    """Return `text` without control characters, so that an answer cannot steer a terminal.

    Half of a surrogate pair, which another's model may send and no stream takes, is a `?`.
    """
    shown = "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))
    return shown.encode(errors="replace").decode()


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        CommandError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise CommandError(f"{path} is not UTF-8 text (byte {exc.start}); convert it") from exc
    except OSError as exc:
        raise CommandError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def size(num_bytes: float) -> str:
    """Return a size for people: `382.1 MB`."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep our loggers still, where a command tells the same in its own words."""
    ours = logging.getLogger("mrss_provider")
    level = ours.level
    ours.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ours.setLevel(level)


def run(app: Callable[[], Any]) -> None:
    """Call `app`; turn what it raises into one sentence on stderr and an exit status.

    Raises:
        SystemExit: 0 done, 1 a failure, 2 a usage error, 130 Ctrl-C.
    """
    try:
        app()
    except (MRSSError, CommandError) as exc:
        _fail(str(exc))
    except BrokenPipeError:
        # The reader of stdout left (`| head`); the interpreter must not complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as exc:
        _fail(f"{exc.strerror or exc}: {exc.filename}" if exc.filename else str(exc))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _fail(message: str) -> None:
    note(f"error: {message}")
    raise SystemExit(1) from None
