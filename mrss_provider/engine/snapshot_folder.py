"""SnapshotFolder: single rows' snapshots as files, for the cache's slowest tier.

A file is complete or not there at all, and nothing that is read is believed before its checksum
and shapes were. Every file has its name from what it holds, so a second write changes nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mrss_provider.engine.radix_tree import Ids
from mrss_provider.errors import ConfigError, StateFileError
from mrss_provider.model.packed_tensors import read_file
from mrss_provider.model.snapshot_file import (
    SnapshotBlob,
    load_snapshots,
    pack_snapshots,
    read_header,
)

if TYPE_CHECKING:
    from mrss_provider.model import ModelConfig, StateSnapshot

log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_STATE = "state"


@dataclass(frozen=True)
class SnapshotFile:
    """A file of the folder: `num_bytes` long, for the state `key` after `tokens`."""

    path: Path
    num_bytes: int
    key: str
    tokens: Ids


class SnapshotFolder:
    """The files of one model in one precision, in a folder of their own.

    Args:
        folder: where; made if it is not there.
        config: of the loaded model, whose files have a folder of their own below `folder`.
        state_dtype: of the pool's wkv.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path, config: ModelConfig, state_dtype: torch.dtype) -> None:
        kind = str(state_dtype).removeprefix("torch.")
        model = config.fingerprint[:8] + config.content[:16]
        self.folder = folder / f"{model}-{config.precision}-{kind}"
        self._config = config
        self._state_dtype = state_dtype
        self._given_up: deque[Path] = deque()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise ConfigError(
                f"cache_dir {folder} cannot be used: {exc}", param="cache_dir"
            ) from exc

    def scan(self) -> list[SnapshotFile]:
        """Return what is there, the longest unused first; what is no snapshot is removed."""
        found: list[tuple[float, SnapshotFile]] = []
        for path in self._files():
            try:
                stat = path.stat()
                strings, tokens = read_header(path)
                name = self._name(strings[_STATE], tokens.numpy())
                if path.name != name:
                    raise StateFileError(f"{path.name} should be called {name}")
            except (OSError, StateFileError, KeyError) as exc:
                self._discard(path, exc)
            else:
                file = SnapshotFile(path, stat.st_size, strings[_STATE], tokens.numpy())
                found.append((stat.st_mtime, file))
        return [file for _, file in sorted(found, key=lambda pair: pair[0])]

    def write(self, key: str, tokens: Ids, snapshot: StateSnapshot) -> SnapshotFile:
        """Write a snapshot on the CPU.

        Raises:
            OSError: the disk is full, or the folder is gone.
        """
        blob = SnapshotBlob((snapshot,), torch.from_numpy(tokens), {_STATE: key})
        data = pack_snapshots(blob, self._config)
        path = self.folder / self._name(key, tokens)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return SnapshotFile(path, len(data), key, tokens)

    def read(self, file: SnapshotFile) -> StateSnapshot | None:
        """Read a file and note that it was used; None, and it is gone, if it is not whole.

        It may be gone already: what uses the folder, perhaps another engine, drops files meanwhile.
        """
        try:
            blob = load_snapshots(read_file(file.path), self._config, self._state_dtype)
            is_it = np.array_equal(blob.tokens.numpy(), file.tokens)
            if blob.strings.get(_STATE) != file.key or not is_it:
                raise StateFileError("it holds another snapshot than its name says")
            (snapshot,) = blob.rows
            os.utime(file.path)
        except FileNotFoundError:
            return None
        except (OSError, StateFileError, ValueError) as exc:
            self._discard(file.path, exc)
            return None
        return snapshot

    def give_up(self, path: Path) -> None:
        """Let a file be removed by whoever calls `remove_given_up` next: a disk takes its time."""
        self._given_up.append(path)

    def remove_given_up(self) -> None:
        """Remove what was given up; nothing writes these files meanwhile."""
        while self._given_up:
            self.remove(self._given_up.popleft())

    def remove(self, path: Path) -> None:
        """Remove a file; one that is gone already is no error."""
        try:
            path.unlink(missing_ok=True)
        except OSError as exc:
            log.warning("the cache file %s cannot be removed: %s", path, exc)

    def _files(self) -> list[Path]:
        try:
            return [p for p in sorted(self.folder.iterdir()) if p.is_file()]
        except OSError as exc:
            log.warning("the cache folder %s cannot be read: %s", self.folder, exc)
            return []

    def _discard(self, path: Path, exc: Exception) -> None:
        log.warning("the cache file %s is not used and is removed: %s", path.name, exc)
        self.remove(path)

    def _name(self, key: str, tokens: Ids) -> str:
        digest = hashlib.sha256(key.encode() + b"\0" + tokens.tobytes())
        return digest.hexdigest()[:40] + _SUFFIX
