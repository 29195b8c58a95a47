"""Files of a running library: found inside their folder, written whole or not at all.

State files that the server writes are in a folder of their own, so that it is known after a
restart too which ones it may delete.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mrss_provider.engine.mixtures_file import MIXTURES_FILE
from mrss_provider.engine.state_folder import ADDED_FOLDER, STATE_SUFFIXES
from mrss_provider.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    StateFileError,
    StorageError,
)
from mrss_provider.model import ModelConfig, TunedState, save_tuned_state
from mrss_provider.replacing import replace_file


def find_inside(folder: Path, text: str, param: str) -> Path:
    """Return the file or folder that `text` means, which is inside `folder`, links followed.

    A relative path starts in `folder`, or beside it if it begins with the folder's own name:
    `states/a.pth` and `a.pth` are the same file of a folder `states`.

    Raises:
        InvalidRequestError: it leads outside the folder.
        NotFoundError: nothing is there.
    """
    root = folder.resolve()
    asked = Path(text)
    tried = [root / asked]
    if asked.parts and not asked.is_absolute() and asked.parts[0] in (folder.name, root.name):
        tried.append(root / Path(*asked.parts[1:]))
    try:
        found = [Path(os.path.realpath(path)) for path in tried]
        inside = [path for path in found if path.is_relative_to(root)]
        there = [path for path in inside if path.exists()]
    except (OSError, ValueError) as exc:
        # A name that no file can have: too long, or with a zero byte.
        raise InvalidRequestError(f"{param}: {text!r:.200} is no path", param=param) from exc
    # One answer for all that is outside, whether it exists or not.
    if not inside or not text:
        raise InvalidRequestError(
            f"{param} must be inside the folder {folder.name!r} that this server was started "
            f"with, got {text!r:.200}",
            param=param,
        )
    if not there:
        raise NotFoundError(f"there is no {text!r:.200} in the folder {folder.name!r}", param=param)
    return there[0]


def check_size(path: Path, max_bytes: int) -> None:
    """Refuse a file that is too large to be a state.

    Raises:
        PayloadTooLargeError: as said.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise PayloadTooLargeError(
            f"a state file may have {max_bytes} bytes (max_state_bytes), {path.name} has {size}"
        )


def state_file(folder: Path, name: str) -> Path | None:
    """Return the file of a state: one that the server wrote, or one that somebody put there."""
    for place in (folder / ADDED_FOLDER, folder):
        for suffix in STATE_SUFFIXES:
            # Not `Path.is_file`, which raises at a name that is too long for a file.
            if os.path.isfile(path := place / f"{name}{suffix}"):
                return path
    return None


def is_added(folder: Path, path: Path) -> bool:
    """Tell whether the server wrote the file."""
    return path.parent == folder / ADDED_FOLDER


def write_state(folder: Path, state: TunedState, config: ModelConfig) -> Path:
    """Keep a state as the server's own file.

    Raises:
        StorageError: it cannot be written.
    """
    path = folder / ADDED_FOLDER / f"{state.name}.safetensors"
    _check_writable(folder)
    try:
        path.parent.mkdir(exist_ok=True)
        with _locked(folder):
            _sweep(path.parent)
            save_tuned_state(path, state, config)
    except OSError as exc:
        raise StorageError(f"{path.name} cannot be written: {exc.strerror or exc}") from exc
    except StateFileError as exc:
        raise StorageError(exc.message) from exc
    return path


def remove_state_file(path: Path) -> None:
    """Delete a file that the server wrote; one that is gone is no error.

    Raises:
        StorageError: it cannot be deleted.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise StorageError(f"{path.name} cannot be deleted: {exc.strerror or exc}") from exc


def edit_mixtures(folder: Path, edit: Callable[[str], str]) -> None:
    """Replace `mixtures.toml` by `edit` of its text, whole or not at all.

    Raises:
        ConflictError: the text cannot be changed.
        StorageError: it cannot be written.
    """
    path = folder / MIXTURES_FILE
    _check_writable(folder)
    try:
        with _locked(folder):
            text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
            changed = edit(text)
            if changed != text:
                _sweep(folder, path.name)
                replace_file(path, changed.encode())
    except UnicodeDecodeError as exc:
        raise ConflictError(f"{path.name} is no UTF-8; mend it by hand") from exc
    except OSError as exc:
        raise StorageError(f"{path.name} cannot be written: {exc.strerror or exc}") from exc


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change the folder: several engines may share it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some network file systems have no locks; then it is as safe as one process can make it.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(folder: Path, name: str = "") -> None:
    """Remove what a write that was killed has left; nobody else writes while we hold the lock."""
    for partial in folder.glob(f".{name}*.partial"):
        partial.unlink(missing_ok=True)


def _check_writable(folder: Path) -> None:
    if "_bundled" in folder.resolve().parts:
        raise ConflictError(
            "the bundled states are part of the installation and stay as they are; start the "
            "server with a folder of your own: --states DIR"
        )
