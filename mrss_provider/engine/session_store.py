"""SessionStore: saved conversations, bounded for each owner, in memory or in files."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from mrss_provider.backend import SessionInfo
from mrss_provider.engine.session import SESSION_KEY, info_of
from mrss_provider.errors import (
    ConfigError,
    ConflictError,
    NotFoundError,
    PayloadTooLargeError,
    StateFileError,
    StorageError,
)
from mrss_provider.model.packed_tensors import Buffer, read_file
from mrss_provider.model.snapshot_file import read_metadata
from mrss_provider.replacing import replace_file

log = logging.getLogger(__name__)

_ID = re.compile(r"ses_[0-9a-f]{24}")
_SUFFIX = ".safetensors"
_PARTIAL = re.compile(rf"\.{_ID.pattern}{re.escape(_SUFFIX)}\.[0-9.]+\.partial")
# Another engine that shares the folder may be writing; no write takes that long.
_STALE_S = 3600.0
_MAX_HEAD_BYTES = 100 << 20


class SessionStore:
    """Sessions as bytes, bounded for each owner. Any thread; with a folder it reads and writes.

    Args:
        max_sessions: that one owner may have.
        max_bytes: that they may take.
        folder: where they are files, and stay; None keeps them in memory.

    Raises:
        ConfigError: the folder cannot be used.
    """

    def __init__(self, *, max_sessions: int, max_bytes: int, folder: Path | None = None) -> None:
        self._max_sessions = max_sessions
        self._max_bytes = max_bytes
        self._folder = folder
        self._lock = threading.Lock()
        self._infos: dict[str, SessionInfo] = {}
        self._data: dict[str, Buffer] = {}
        self._holders: dict[str, object] = {}
        if folder is not None:
            self._read_folder(folder)

    def info(self, session_id: str, owner: str) -> SessionInfo:
        """Return what there is to know of an owner's session.

        Raises:
            NotFoundError: there is none, or it is somebody else's.
        """
        with self._lock:
            found = self._infos.get(session_id)
        if found is None or found.owner != owner:
            raise _not_found(session_id)
        return found

    def infos(self, owner: str) -> list[SessionInfo]:
        """Return an owner's sessions, the oldest first."""
        with self._lock:
            own = [info for info in self._infos.values() if info.owner == owner]
        return sorted(own, key=lambda info: (info.created, info.id))

    def get(self, session_id: str, owner: str) -> Buffer:
        """Return a session.

        Raises:
            NotFoundError: as `info`.
            StorageError: its file cannot be read.
        """
        info = self.info(session_id, owner)
        if self._folder is None:
            with self._lock:
                data = self._data.get(info.id)
            if data is None:
                raise _not_found(session_id)
            return data
        try:
            return read_file(self._path(info.id))
        except OSError as exc:
            raise StorageError(
                f"the session {info.id} cannot be read: {exc.strerror or exc}"
            ) from exc

    def put(self, info: SessionInfo, data: Buffer, *, is_new: bool = True) -> SessionInfo:
        """Store a session; return what there is to know of it.

        Args:
            info: whose `num_bytes` is not looked at.
            data: all of it.
            is_new: nothing has its id; else it takes the place of what has.

        Raises:
            NotFoundError: it is not new, and was deleted before it was stored.
            PayloadTooLargeError: it is larger than all that one owner may save.
            StorageError: the owner has too many or too large ones, or the disk is full.
        """
        info = replace(info, num_bytes=len(data))
        with self._lock:
            before = self._infos.get(info.id)
            if before is None and not is_new:
                raise _not_found(info.id)
            self._check_room(info)
            self._infos[info.id] = info
        try:
            self._write(info.id, data)
        except OSError as exc:
            with self._lock:
                if self._infos.pop(info.id, None) is not None and before is not None:
                    self._infos[info.id] = before
            raise StorageError(f"the session cannot be saved: {exc}") from exc
        with self._lock:
            is_there = info.id in self._infos
        if not is_there:
            self._remove(info.id)
            raise _not_found(info.id)
        return info

    def delete(self, session_id: str, owner: str) -> None:
        """Forget a session.

        Raises:
            NotFoundError: as `info`.
            StorageError: its file cannot be deleted; it stays.
        """
        info = self.info(session_id, owner)
        # First: whoever is writing it looks whether it is still there when all is written.
        with self._lock:
            self._infos.pop(info.id, None)
        try:
            self._remove(info.id)
        except OSError as exc:
            with self._lock:
                self._infos[info.id] = info
            raise StorageError(
                f"the session {info.id} cannot be deleted: {exc.strerror or exc}"
            ) from exc

    def check_size(self, num_bytes: int) -> None:
        """Refuse what no owner may save.

        Raises:
            PayloadTooLargeError: more than `max_bytes`.
        """
        if num_bytes > self._max_bytes:
            raise PayloadTooLargeError(
                f"a session may take {self._max_bytes} bytes (session_bytes), got {num_bytes}"
            )

    def hold(self, session_id: str, holder: object) -> None:
        """Keep a session for one answer that will be saved to it, until `holder` lets go.

        Raises:
            ConflictError: another one is under way.
        """
        with self._lock:
            if session_id in self._holders:
                raise ConflictError(
                    f"an answer that is saved to the session {session_id} is under way; wait for "
                    f"it, or fork the session",
                    param="mrss.session",
                )
            self._holders[session_id] = holder

    def release(self, session_id: str, holder: object) -> None:
        """Let others save to a session; nothing happens where `holder` does not hold it."""
        with self._lock:
            if session_id in self._holders and self._holders[session_id] is holder:
                del self._holders[session_id]

    def _check_room(self, info: SessionInfo) -> None:
        self.check_size(info.num_bytes)
        others = [
            other
            for other in self._infos.values()
            if other.owner == info.owner and other.id != info.id
        ]
        if len(others) >= self._max_sessions:
            raise StorageError(
                f"{len(others)} sessions are saved, and one owner may have {self._max_sessions} "
                f"(max_sessions); delete one"
            )
        taken = sum(other.num_bytes for other in others)
        if taken + info.num_bytes > self._max_bytes:
            raise StorageError(
                f"sessions of {taken} bytes are saved, and this one of {info.num_bytes} is more "
                f"than one owner may have ({self._max_bytes}, session_bytes); delete one"
            )

    def _write(self, session_id: str, data: Buffer) -> None:
        if self._folder is None:
            with self._lock:
                self._data[session_id] = data
            return
        replace_file(self._path(session_id), data, mode=0o600)

    def _remove(self, session_id: str) -> None:
        with self._lock:
            self._data.pop(session_id, None)
        if self._folder is not None:
            self._path(session_id).unlink(missing_ok=True)

    def _path(self, session_id: str) -> Path:
        assert self._folder is not None
        assert _ID.fullmatch(session_id)
        return self._folder / (session_id + _SUFFIX)

    def _read_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _sweep(folder)
            paths = sorted(folder.glob("ses_*" + _SUFFIX))
        except OSError as exc:
            raise ConfigError(
                f"sessions_dir {folder} cannot be used: {exc}", param="sessions_dir"
            ) from exc
        for path in paths:
            try:
                with path.open("rb") as file:
                    metadata = read_metadata(file.read(_head_len(file)))
                info = info_of(json.loads(metadata[SESSION_KEY]), path.stat().st_size)
                if path.name != info.id + _SUFFIX or not _ID.fullmatch(info.id):
                    raise StateFileError("its name is not that of its session")
            except (OSError, StateFileError, KeyError, TypeError, ValueError) as exc:
                log.warning("the session file %s is left alone: %s", path.name, exc)
            else:
                self._infos[info.id] = info


def _sweep(folder: Path) -> None:
    """Remove what engines that were killed have left of sessions that they were writing."""
    for path in folder.glob(".ses_*.partial"):
        try:
            if _PARTIAL.fullmatch(path.name) and time.time() - path.stat().st_mtime > _STALE_S:
                # Another engine that starts sweeps, too.
                path.unlink(missing_ok=True)
        except OSError as exc:
            log.warning("the unfinished session file %s stays: %s", path.name, exc)


def _not_found(session_id: str) -> NotFoundError:
    # The id may be anything that somebody typed.
    return NotFoundError(f"there is no session {session_id[:64]!r}", param="session")


def _head_len(file: BinaryIO) -> int:
    """Return how much of a safetensors file its header takes, at most what one may."""
    length = 8 + int.from_bytes(file.read(8), "little")
    file.seek(0)
    return min(length, _MAX_HEAD_BYTES)
