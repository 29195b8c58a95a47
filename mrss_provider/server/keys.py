"""API keys at rest: a file of hashes, one JSON object a line, or keys in the environment.

A key is 32 random bytes, so a plain SHA-256 cannot be undone and costs nothing to compare; a slow
hash is for passwords, which people choose.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from mrss_provider.errors import ConfigError, ConflictError, NotFoundError

Kind = Literal["user", "admin"]

# What people make up is shorter than what `new_key` makes, and could be guessed below this.
MIN_KEY_CHARS = 16
_PREFIX = "mrss-"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_FROM_ENVIRONMENT: tuple[tuple[str, str, Kind], ...] = (
    ("MRSS_API_KEY", "env", "user"),
    ("MRSS_ADMIN_KEY", "env-admin", "admin"),
)


@dataclass(frozen=True)
class Limits:
    """What a key may use; 0 is no limit of its own.

    Attributes:
        max_concurrent: requests under way.
        tokens_per_minute: of prompts and answers together.
        max_prompt_len: longest prompt, in tokens.
        max_answer_len: most tokens that a request may ask for.
    """

    max_concurrent: int = 0
    tokens_per_minute: int = 0
    max_prompt_len: int = 0
    max_answer_len: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 0:
                raise ConfigError(f"{name} must be an integer of at least 0, got {value!r}")


@dataclass(frozen=True)
class Key:
    """What is kept of a key.

    Attributes:
        id: who it belongs to; sessions and fair shares go by it, so a new key of the same id is
            the same owner.
        sha256: of the key, in hexadecimal.
        kind: "admin" may also change what is served.
        limits: what it may use.
        created: date and time, or "".
    """

    id: str
    sha256: str
    kind: Kind = "user"
    limits: Limits = field(default_factory=Limits)
    created: str = ""

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise ConfigError(
                f"a key's id must have 1 to 64 letters, digits, '.', '_' or '-', got {self.id!r}"
            )
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ConfigError(f"the sha256 of key {self.id!r} must have 64 hexadecimal digits")
        if self.kind not in get_args(Kind):
            raise ConfigError(f"the kind of key {self.id!r} must be user or admin")


def new_key() -> str:
    """Return a key that nobody can guess."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_of(text: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def find(keys: Sequence[Key], text: str) -> Key | None:
    """Return the key that `text` is, in a time that does not depend on how much of it is right."""
    digest = hash_of(text)
    found = None
    for key in keys:
        if hmac.compare_digest(digest, key.sha256):
            found = key
    return found


def keys_of_environment(env: Mapping[str, str]) -> tuple[Key, ...]:
    """Return the keys that `env` holds.

    Raises:
        ConfigError: one that can be guessed.
    """
    keys = []
    for variable, key_id, kind in _FROM_ENVIRONMENT:
        text = env.get(variable)
        if not text:
            continue
        if len(text) < MIN_KEY_CHARS:
            raise ConfigError(f"{variable} must have at least {MIN_KEY_CHARS} characters")
        keys.append(Key(key_id, hash_of(text), kind))
    return tuple(keys)


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read a file of keys; empty lines and those that begin with `#` say nothing.

    Raises:
        ConfigError: it cannot be read; the message names the line.
    """
    keys: dict[str, Key] = {}
    for number, line in enumerate(_lines_of(path), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            key = _read_key(line)
        except (ConfigError, TypeError, ValueError) as exc:
            # `exc` may quote the line, but a line holds no key.
            raise ConfigError(f"{path} line {number} is no key: {exc}") from exc
        if key.id in keys:
            raise ConfigError(f"{path} line {number}: the id {key.id!r} is there twice")
        keys[key.id] = key
    return tuple(keys.values())


def create_key(path: Path, key_id: str, kind: Kind, limits: Limits) -> str:
    """Add a key to the file, which is made if need be, and return it: it is kept nowhere.

    Raises:
        ConflictError: the id is taken.
        ConfigError: the file cannot be read or written, or the id is no id.
    """
    text = new_key()
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    key = Key(key_id, hash_of(text), kind, limits, created)
    with _changing(path) as lines:
        if any(other.id == key_id for other in (read_keys(path) if path.exists() else ())):
            raise ConflictError(f"there is a key {key_id!r}; revoke it first, or take another id")
        lines.append(_write_key(key))
    return text


def revoke_key(path: Path, key_id: str) -> None:
    """Remove a key from the file; the server refuses it within a second.

    Raises:
        NotFoundError: no key has this id.
        ConfigError: the file cannot be read or written.
    """
    with _changing(path) as lines:
        ids = {key.id for key in read_keys(path)}
        if key_id not in ids:
            raise NotFoundError(f"there is no key {key_id!r}; `mrss keys list` shows them")
        lines[:] = [line for line in lines if not _is_of(line, key_id)]


def _lines_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the keys cannot be read from {path} ({exc})") from exc


def _read_key(line: str) -> Key:
    raw = json.loads(line)
    if not isinstance(raw, dict):
        raise ConfigError("a line must be a JSON object")
    names = {f.name for f in fields(Limits)}
    limits = Limits(**{name: raw.pop(name) for name in names & raw.keys()})
    return Key(**raw, limits=limits)


def _write_key(key: Key) -> str:
    raw: dict[str, Any] = asdict(key)
    limits = {name: value for name, value in raw.pop("limits").items() if value}
    return json.dumps({**raw, **limits})


def _is_of(line: str, key_id: str) -> bool:
    return bool(line.strip()) and not line.startswith("#") and _read_key(line).id == key_id


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[list[str]]:
    """Yield the file's lines, and put what they have become in its place: all of it or nothing."""
    try:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written ({exc.strerror})") from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = _lines_of(path) if path.exists() else []
        yield lines
        _replace(path, "".join(f"{line}\n" for line in lines))
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written ({exc.strerror})") from exc
    finally:
        os.close(lock)


def _replace(path: Path, text: str) -> None:
    # mkstemp's files are for their owner only; a file that others may read stays theirs too.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        if path.exists():
            os.fchmod(descriptor, path.stat().st_mode & 0o777)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
