"""PrefixCache: what rows were after tokens that have been read before.

One radix tree over tokens for each tuned state (its content, not its name), so that every mixture
of the same states shares it, whatever its weights, merge rule and gate. A mixture's hit is the
longest beginning of which *every* row has a snapshot. Snapshots live in memory of the device, in
RAM or in files, the least recently used move on to the next tier and then out; the bytes of each
tier are bounded. `match` looks, `insert` and `restore` change. Any thread.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mrss_provider.backend import CacheStats
from mrss_provider.engine.cache_tiers import Entry, Tier, moved, pinned, to_pinned
from mrss_provider.engine.radix_tree import Ids, RadixTree
from mrss_provider.engine.snapshot_folder import SnapshotFile, SnapshotFolder
from mrss_provider.model.state import StateSnapshot

if TYPE_CHECKING:
    from mrss_provider.model import TunedState

log = logging.getLogger(__name__)

_CLOSE_WAIT_S = 4.0
_TOKEN_BYTES = 4


@dataclass(frozen=True)
class Restored:
    """A hit: the rows after `length` tokens."""

    length: int
    rows: tuple[StateSnapshot, ...]


class PrefixCache:
    """Snapshots of rows by state and tokens, in three bounded tiers.

    Args:
        device: that rows are computed on.
        ram_bytes: bound of the RAM tier; 0 is none.
        device_bytes: bound of the tier in a GPU's memory; 0 is none. A CPU has none.
        folder: of the files; None is none.
        disk_bytes: bound of the files.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        ram_bytes: int,
        device_bytes: int = 0,
        folder: SnapshotFolder | None = None,
        disk_bytes: int = 0,
    ) -> None:
        self._target = device
        self._is_cuda = device.type == "cuda"
        self._lock = threading.RLock()
        self._trees: dict[str, RadixTree[Entry]] = {}
        self._device = Tier(device_bytes if self._is_cuda else 0)
        self._ram = Tier(ram_bytes)
        self._disk = Tier(disk_bytes if folder else 0)
        self._folder = folder
        self._hits = self._misses = self._hit_tokens = 0
        # What waits for its file holds memory beyond the RAM tier's; no more than this.
        self._leaving_left = ram_bytes // 4
        self._to_write: queue.Queue[Entry | None] = queue.Queue()
        self._writer: threading.Thread | None = None
        self._has_complained = False
        self._is_indexed = threading.Event()
        if folder is not None and disk_bytes:
            self._writer = threading.Thread(
                target=self._write_files, args=(folder,), name="mrss-cache", daemon=True
            )
            self._writer.start()

    @property
    def is_on(self) -> bool:
        """Whether anything can be kept."""
        return self._device.max_bytes > 0 or self._ram.max_bytes > 0

    def match(self, keys: Sequence[str], tokens: Ids, limit: int, *, files: bool = False) -> int:
        """Return the length of the longest beginning that every row has a snapshot of; 0 is none.

        Args:
            keys: of the rows' states, as `state_key` gives them.
            tokens: int32 [T].
            limit: hits are no longer than this.
            files: count snapshots that are in files only, which `restore` does not.
        """
        with self._lock:
            return self._match(keys, tokens, limit, files=files)[0]

    def shared_len(self, keys: Sequence[str], tokens: Ids) -> int:
        """Return how much of `tokens` the rows have read before, whether it was kept or not."""
        with self._lock:
            trees = self._trees_of(keys)
            return min((tree.shared_len(tokens) for tree in trees), default=0)

    def restore(self, keys: Sequence[str], tokens: Ids, limit: int) -> Restored | None:
        """Return the longest hit in memory, on the device; it is now the last used."""
        with self._lock:
            length, entries = self._match(keys, tokens, limit, files=False)
            if not length:
                self._misses += 1
                return None
            self._hits += 1
            self._hit_tokens += length
            return Restored(length, tuple([self._use(entry) for entry in entries]))

    def insert(self, key: str, tokens: Ids, snapshot: StateSnapshot) -> None:
        """Keep what a row was after `tokens`, in place of what is there.

        Args:
            key: of the row's state.
            tokens: int32 [T], T > 0, not modified by anyone after this.
            snapshot: finite, on the model's device, nobody else's.
        """
        with self._lock:
            num_bytes = snapshot.num_bytes + _TOKEN_BYTES * len(tokens)
            tree = self._trees.setdefault(key, RadixTree())
            entry = tree.get(tokens)
            if entry is None:
                entry = Entry(key, tokens, num_bytes)
                tree.insert(tokens, entry)
            if num_bytes <= self._device.max_bytes:
                entry.device = snapshot
                self._device.add(entry, num_bytes)
            elif num_bytes <= self._ram.max_bytes:
                self._put_in_ram(entry, snapshot)
            self._trim()
            self._forget_if_gone(entry)

    def holds(self, keys: Sequence[str], tokens: Ids) -> bool:
        """Tell whether every row has a snapshot of exactly these tokens in memory."""
        return self.match(keys, tokens, len(tokens)) == len(tokens)

    def load_files(self, keys: Sequence[str], tokens: Ids, limit: int) -> None:
        """Bring a hit's snapshots from files to RAM where that makes it longer.

        It reads files: never on the engine's thread.
        """
        if self._folder is None:
            return
        while True:
            with self._lock:
                in_memory = self._match(keys, tokens, limit, files=False)[0]
                length, entries = self._match(keys, tokens, limit, files=True)
            missing = [entry for entry in entries if entry.snapshot is None]
            if length <= in_memory or not missing:
                return
            loaded = [self._load_file(self._folder, entry) for entry in missing]
            if all(loaded):
                return

    def stats(self) -> CacheStats:
        """Return counts and sizes of this moment."""
        with self._lock:
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                hit_tokens=self._hit_tokens,
                num_entries=sum(map(len, self._trees.values())),
                device_bytes=self._device.num_bytes,
                ram_bytes=self._ram.num_bytes,
                disk_bytes=self._disk.num_bytes,
            )

    def shed(self) -> None:
        """Give back all memory of the device: somebody else has none left."""
        with self._lock:
            limit, self._device.max_bytes = self._device.max_bytes, 0
            self._trim()
            self._device.max_bytes = limit

    def wait_for_files(self) -> None:
        """Wait until what was there is known, and what was to be written is."""
        if self._writer is not None:
            self._is_indexed.wait()
            self._to_write.join()

    def close(self) -> None:
        """Write what has no file yet, the last used first, for some seconds; drop the rest."""
        if self._writer is not None:
            with self._lock:
                for entry in [*reversed(self._device.entries), *reversed(self._ram.entries)]:
                    if entry.device is not None and entry.ram is None:
                        entry.ram = entry.device.to_host()
                    if entry.file is None:
                        self._to_write.put(entry)
                self._to_write.put(None)
            self._writer.join(_CLOSE_WAIT_S)
        with self._lock:
            self._trees.clear()
            self._device, self._ram, self._disk = Tier(0), Tier(0), Tier(0)

    def _match(
        self, keys: Sequence[str], tokens: Ids, limit: int, *, files: bool
    ) -> tuple[int, list[Entry]]:
        rows = [tree.find(tokens[:limit]) for tree in self._trees_of(keys)]
        if not rows:
            return 0, []
        for length in sorted(rows[0], reverse=True):
            entries = [row[length] for row in rows if length in row]
            usable = all(files or entry.snapshot is not None for entry in entries)
            if len(entries) == len(rows) and usable:
                return length, entries
        return 0, []

    def _trees_of(self, keys: Sequence[str]) -> list[RadixTree[Entry]]:
        """Return the tree of every key; none where one of them has none, before any is read."""
        trees = [self._trees[key] for key in keys if key in self._trees]
        return trees if len(trees) == len(keys) else []

    def _use(self, entry: Entry) -> StateSnapshot:
        for tier in (self._device, self._ram, self._disk):
            tier.touch(entry)
        snapshot = entry.snapshot
        assert snapshot is not None
        if not self._is_cuda or entry.device is not None:
            return snapshot
        snapshot = moved(snapshot, self._target)
        if entry.num_bytes <= self._device.max_bytes:
            entry.device = snapshot
            self._device.add(entry, entry.num_bytes)
            self._trim()
        return snapshot

    def _put_in_ram(self, entry: Entry, snapshot: StateSnapshot) -> None:
        if self._is_cuda and snapshot.wkv.is_cuda:
            snapshot = to_pinned(snapshot)
            entry.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            entry.arrived.record()
        entry.ram = snapshot
        self._ram.add(entry, entry.num_bytes)
        if entry.file is None and self._writer is not None:
            self._to_write.put(entry)

    def _trim(self) -> None:
        """Move what does not fit to the next tier, and out of the last."""
        for entry in self._device.surplus():
            snapshot, entry.device = entry.device, None
            if entry.ram is None and snapshot is not None and self._fits_ram(entry):
                self._put_in_ram(entry, snapshot)
            self._forget_if_gone(entry)
        for entry in self._ram.surplus():
            snapshot, entry.ram = entry.ram, None
            waits = self._writer is not None and entry.file is None and snapshot is not None
            if waits and entry.num_bytes <= self._leaving_left:
                entry.leaving = snapshot
                self._leaving_left -= entry.num_bytes
                self._to_write.put(entry)
            self._forget_if_gone(entry)
        for entry in self._disk.surplus():
            self._drop_file(entry)
            self._forget_if_gone(entry)

    def _fits_ram(self, entry: Entry) -> bool:
        return entry.num_bytes <= self._ram.max_bytes

    def _drop_leaving(self, entry: Entry) -> None:
        if entry.leaving is not None:
            entry.leaving = None
            self._leaving_left += entry.num_bytes

    def _drop_file(self, entry: Entry) -> None:
        self._disk.discard(entry)
        if entry.file is not None and self._folder is not None:
            self._folder.remove(entry.file.path)
        entry.file = None

    def _forget_if_gone(self, entry: Entry) -> None:
        tree = self._trees.get(entry.key)
        if entry.snapshot is None and entry.file is None and tree is not None:
            if tree.get(entry.tokens) is entry:
                tree.remove(entry.tokens)
            if not len(tree):
                del self._trees[entry.key]

    def _write_files(self, folder: SnapshotFolder) -> None:
        """Index the files that are there, then write what comes. Runs on the writer's thread."""
        for file in folder.scan():
            with self._lock:
                self._add_file(file)
        self._is_indexed.set()
        while True:
            entry = self._to_write.get()
            try:
                if entry is None:
                    return
                self._write_file(folder, entry)
            except Exception:
                log.exception("a snapshot could not be written")
            finally:
                self._to_write.task_done()

    def _add_file(self, file: SnapshotFile) -> None:
        tree = self._trees.setdefault(file.key, RadixTree())
        entry = tree.get(file.tokens)
        if entry is None:
            entry = Entry(file.key, file.tokens, file.num_bytes)
            tree.insert(file.tokens, entry)
        entry.file = file
        self._disk.add(entry, file.num_bytes)
        self._trim()

    def _write_file(self, folder: SnapshotFolder, entry: Entry) -> None:
        with self._lock:
            snapshot = entry.ram or entry.leaving
            if snapshot is None or entry.file is not None:
                return
        if entry.arrived is not None:
            entry.arrived.synchronize()
        try:
            file = folder.write(entry.key, entry.tokens, snapshot)
        except OSError as exc:
            if not self._has_complained:
                log.warning("the state cache cannot write files, and goes on without: %s", exc)
            self._has_complained = True
            file = None
        else:
            self._has_complained = False
        with self._lock:
            self._drop_leaving(entry)
            tree = self._trees.get(entry.key)
            is_known = tree is not None and tree.get(entry.tokens) is entry
            if file is not None and is_known:
                self._add_file(file)
            elif file is not None:
                folder.remove(file.path)
            self._forget_if_gone(entry)

    def _load_file(self, folder: SnapshotFolder, entry: Entry) -> bool:
        """Bring one snapshot to RAM; tell whether it was whole."""
        file = entry.file
        snapshot = folder.read(file) if file is not None else None
        with self._lock:
            if snapshot is None:
                self._disk.discard(entry)
                entry.file = None
                self._forget_if_gone(entry)
                return False
            entry.num_bytes = snapshot.num_bytes + _TOKEN_BYTES * len(entry.tokens)
            self._put_in_ram(entry, pinned(snapshot) if self._is_cuda else snapshot)
            self._trim()
            return True


def state_key(state: TunedState | None, *, reads_bos: bool, mark: str = "") -> str:
    """Return what a row's snapshots are filed under: its state's content, and when it was given.

    Args:
        state: of the row; None is the base.
        reads_bos: whether the row reads a token 0 of its own before the prompt.
        mark: of the tokens before which the row was given its state anew (`reinjection.marks`).
    """
    if state is None:
        return "base"
    return state.sha256 + "+0" * reads_bos + (f"@{mark}" if mark else "")
