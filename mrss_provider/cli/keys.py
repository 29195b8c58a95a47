"""`mrss keys`: the file of API keys, seen and changed from the terminal."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from mrss_provider.cli.output import answer, answer_json, note, table
from mrss_provider.server.keys import Kind, Limits, create_key, read_keys, revoke_key

_HEADER = ("ID", "KIND", "CREATED", "LIMITS")


def create(file: Path, key_id: str, kind: Kind, limits: Limits) -> None:
    """Add a key to the file and print it.

    Raises:
        MRSSError: the id is taken, or the file cannot be written.
    """
    text = create_key(file, key_id, kind, limits)
    note(f"{file} has its hash; this is the only time that the key is shown:")
    answer(text)


def list_keys(file: Path, as_json: bool) -> None:
    """Print what is known of each key.

    Raises:
        MRSSError: the file cannot be read.
    """
    rows = []
    for key in read_keys(file):
        limits = {name: value for name, value in asdict(key.limits).items() if value}
        if as_json:
            answer_json({"id": key.id, "kind": key.kind, "created": key.created, **limits})
        shown = " ".join(f"{name}={value}" for name, value in limits.items()) or "-"
        rows.append((key.id, key.kind, key.created or "-", shown))
    if not as_json:
        answer(table(_HEADER, rows))


def revoke(file: Path, key_id: str) -> None:
    """Remove a key from the file.

    Raises:
        MRSSError: no key has this id, or the file cannot be written.
    """
    revoke_key(file, key_id)
    note(f"{key_id!r} is no key any more")
