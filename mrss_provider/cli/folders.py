"""Folders that commands write into: made, or refused before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from mrss_provider.cli.output import CommandError


def make_folder(out: Path) -> None:
    """Make the folder that `--out` names, with those above it, unless it is there.

    Raises:
        CommandError: it is no folder, cannot be made, or nothing can be written into it.
    """
    if out.exists() and not out.is_dir():
        raise CommandError(f"--out must be a folder, and {out} is a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise CommandError(f"--out {out}: no folder can be made there ({exc.strerror})") from exc
    if not os.access(out, os.W_OK | os.X_OK):
        raise CommandError(f"--out {out}: nothing can be written into this folder")
