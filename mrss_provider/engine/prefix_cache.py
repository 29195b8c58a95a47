"""PrefixCache: what rows were after tokens that have been read before.

One radix tree over tokens for each tuned state (its content, not its name), so that every mixture
of the same states shares it, whatever its weights, merge rule and gate. A mixture's hit is the
longest beginning of which *every* row has a snapshot. Snapshots live in memory of the device, in
RAM or in files, the least recently used move on to the next tier and then out; the bytes of each
tier are bounded. `match` looks, `insert` and `restore` change. Any thread.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence

import torch

from mrss_provider.backend import CacheStats
from mrss_provider.engine.cache_tiers import Entry, Restored, Tier
from mrss_provider.engine.copy_stream import Arrival, Copies, CopyStream, prepare_memory
from mrss_provider.engine.file_writer import FileWriter
from mrss_provider.engine.radix_tree import Ids, RadixTree
from mrss_provider.engine.snapshot_folder import SnapshotFile, SnapshotFolder
from mrss_provider.model.state import StateSnapshot

log = logging.getLogger(__name__)

_CLOSE_WAIT_S = 4.0
_TOKEN_BYTES = 4


class PrefixCache:
    """Snapshots of rows by state and tokens, in three bounded tiers.

    Args:
        device: that rows are computed on.
        ram_bytes: bound of the RAM tier; 0 is none.
        device_bytes: bound of the tier in a GPU's memory; 0 is none. A CPU has none.
        folder: of the files; None is none.
        disk_bytes: bound of the files.
        copies: ways between the memories; None chooses by the device. A CPU has but one memory.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        ram_bytes: int,
        device_bytes: int = 0,
        folder: SnapshotFolder | None = None,
        disk_bytes: int = 0,
        copies: Copies | None = None,
    ) -> None:
        self._copies = copies or (CopyStream(device) if device.type == "cuda" else None)
        self._lock = threading.RLock()
        self._trees: dict[str, RadixTree[Entry]] = {}
        self._device = Tier(device_bytes if self._copies is not None else 0)
        self._ram = Tier(ram_bytes)
        # What waits for its file holds memory beyond the RAM tier's; no more than this.
        self._leaving = Tier(ram_bytes // 4)
        self._disk = Tier(disk_bytes if folder else 0)
        self._folder = folder
        self._hits = self._misses = self._hit_tokens = 0
        self._has_complained = self._has_no_ram = False
        self._writer: FileWriter[Entry] | None = None
        if folder is not None and disk_bytes:
            self._writer = FileWriter(
                functools.partial(self._find_files, folder),
                functools.partial(self._write_file, folder),
            )

    @property
    def is_on(self) -> bool:
        """Whether anything can be kept."""
        return self._device.max_bytes > 0 or self._ram.max_bytes > 0

    def match(self, keys: Sequence[str], tokens: Ids, limit: int, *, files: bool = False) -> int:
        """Return the length of the longest beginning that every row has a snapshot of; 0 is none.

        Args:
            keys: of the rows' states, as `keys_after` gives them.
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
            rows = tuple([self._use(entry) for entry in entries])
            # Not before: what makes room for one may be another.
            self._trim()
            return Restored(length, rows)

    def insert(self, key: str, tokens: Ids, snapshot: StateSnapshot) -> None:
        """Keep what a row was after `tokens`, in place of what is there.

        Args:
            key: of the row's state.
            tokens: int32 [T], T > 0, not modified by anyone after this.
            snapshot: finite, on the model's device, nobody else's.
        """
        with self._lock:
            tree = self._trees.setdefault(key, RadixTree())
            entry = tree.get(tokens)
            if entry is None:
                entry = Entry(key, tokens)
                tree.insert(tokens, entry)
            if self._copies is None:
                self._put_in_ram(entry, snapshot)
            elif not self._put_on_device(entry, snapshot):
                self._spill(entry, snapshot)
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
            try:
                loaded = [self._load_file(self._folder, entry) for entry in missing]
            except RuntimeError as exc:
                log.warning("no RAM is left for a state from a file, which is not used: %s", exc)
                return
            if all(loaded):
                return

    def prepare(self, snapshot: StateSnapshot) -> None:
        """Take memory of the RAM tier for what leaves a device; all are as large as `snapshot`."""
        if self._copies is not None:
            prepare_memory(self._copies, snapshot, self._ram.max_bytes)

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
            self._writer.wait()

    def close(self) -> None:
        """Write what has no file yet, the last used first, for some seconds; drop the rest."""
        if self._writer is not None:
            with self._lock:
                try:
                    self._leave_device()
                except RuntimeError as exc:
                    log.warning("what the state cache has on the device is lost: %s", exc)
                for entry in reversed(self._ram.entries):
                    if entry.file is None:
                        self._writer.put(entry)
            self._writer.close(_CLOSE_WAIT_S)
        with self._lock:
            self._trees.clear()
            self._device, self._ram, self._leaving, self._disk = (Tier(0) for _ in range(4))
        if self._copies is not None:
            self._copies.close()

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
        if self._copies is None or entry.device is not None:
            return snapshot
        snapshot = self._copies.to_device(snapshot, entry.arrived)
        self._put_on_device(entry, snapshot)
        return snapshot

    def _put_on_device(self, entry: Entry, snapshot: StateSnapshot) -> bool:
        """Take a snapshot on the device in, and tell whether it may ever fit."""
        num_bytes = snapshot.num_bytes + _TOKEN_BYTES * len(entry.tokens)
        if num_bytes > self._device.max_bytes:
            return False
        entry.device = snapshot
        self._device.add(entry, num_bytes)
        return True

    def _spill(self, entry: Entry, snapshot: StateSnapshot) -> None:
        """Copy a snapshot from the device to RAM, if there is room; nobody waits."""
        assert self._copies is not None
        if self._bytes_in_ram(entry, snapshot) > self._ram.max_bytes:
            return
        try:
            copy, arrived = self._copies.to_host(snapshot)
        except RuntimeError as exc:
            # It harms no request that another one's state cannot be kept.
            if not self._has_no_ram:
                log.warning("the state cache has no RAM for a state, which is dropped: %s", exc)
            self._has_no_ram = True
        else:
            self._has_no_ram = False
            self._put_in_ram(entry, copy, arrived)

    def _put_in_ram(
        self, entry: Entry, snapshot: StateSnapshot, arrived: Arrival | None = None
    ) -> None:
        """Take a snapshot on the host in, which is there when it has arrived."""
        num_bytes = self._bytes_in_ram(entry, snapshot)
        if num_bytes > self._ram.max_bytes:
            return
        # This takes the place of what waits for its file.
        self._drop_leaving(entry)
        entry.ram, entry.arrived = snapshot, arrived
        self._ram.add(entry, num_bytes)
        if entry.file is None and self._writer is not None:
            self._writer.put(entry)

    def _bytes_in_ram(self, entry: Entry, snapshot: StateSnapshot) -> int:
        held = snapshot.num_bytes if self._copies is None else self._copies.host_bytes(snapshot)
        return held + _TOKEN_BYTES * len(entry.tokens)

    def _trim(self) -> None:
        """Move what does not fit to the next tier, and out of the last."""
        for entry in self._device.surplus():
            snapshot, entry.device = entry.device, None
            if entry.ram is None and snapshot is not None:
                self._spill(entry, snapshot)
                # What leaves now leaves its memory to the next that comes.
                self._trim_ram()
            self._forget_if_gone(entry)
        self._trim_ram()
        for entry in self._disk.surplus():
            self._drop_file(entry)
            self._forget_if_gone(entry)

    def _trim_ram(self) -> None:
        for entry in self._ram.surplus():
            snapshot, entry.ram = entry.ram, None
            if entry.file is None and snapshot is not None:
                self._leave(entry, snapshot)
            self._forget_if_gone(entry)

    def _leave(self, entry: Entry, snapshot: StateSnapshot) -> None:
        """Let what has left the RAM tier wait for its file, if not too much does."""
        num_bytes = self._bytes_in_ram(entry, snapshot)
        is_room = self._leaving.num_bytes + num_bytes <= self._leaving.max_bytes
        if self._writer is not None and is_room:
            entry.leaving = snapshot
            self._leaving.add(entry, num_bytes)
            self._writer.put(entry)

    def _leave_device(self) -> None:
        """Bring to RAM, whatever its bound is, what is nowhere but on the device."""
        for entry in list(self._device.entries):
            if entry.ram is None and entry.device is not None and entry.file is None:
                entry.ram, entry.arrived = entry.device.to_host(), None
                self._ram.add(entry, 0)

    def _drop_leaving(self, entry: Entry) -> None:
        entry.leaving = None
        self._leaving.discard(entry)

    def _drop_file(self, entry: Entry) -> None:
        self._disk.discard(entry)
        if entry.file is not None and self._folder is not None:
            self._folder.give_up(entry.file.path)
        entry.file = None

    def _is_known(self, entry: Entry) -> bool:
        tree = self._trees.get(entry.key)
        return tree is not None and tree.get(entry.tokens) is entry

    def _forget_if_gone(self, entry: Entry) -> None:
        if entry.snapshot is None and entry.file is None and self._is_known(entry):
            tree = self._trees[entry.key]
            tree.remove(entry.tokens)
            if not len(tree):
                del self._trees[entry.key]

    def _find_files(self, folder: SnapshotFolder) -> None:
        for file in folder.scan():
            with self._lock:
                self._add_file(file)
        folder.remove_given_up()

    def _add_file(self, file: SnapshotFile) -> None:
        tree = self._trees.setdefault(file.key, RadixTree())
        entry = tree.get(file.tokens)
        if entry is None:
            entry = Entry(file.key, file.tokens)
            tree.insert(file.tokens, entry)
        entry.file = file
        self._disk.add(entry, file.num_bytes)
        self._trim()

    def _write_file(self, folder: SnapshotFolder, entry: Entry) -> None:
        file = None
        try:
            file = self._new_file(folder, entry)
            self._has_complained &= file is None
        except (OSError, RuntimeError, MemoryError) as exc:
            if not self._has_complained:
                log.warning("the state cache cannot write files, and goes on without: %s", exc)
            self._has_complained = True
        finally:
            with self._lock:
                self._drop_leaving(entry)
                if file is not None and self._is_known(entry):
                    self._add_file(file)
                elif file is not None:
                    folder.give_up(file.path)
                self._forget_if_gone(entry)
        folder.remove_given_up()

    def _new_file(self, folder: SnapshotFolder, entry: Entry) -> SnapshotFile | None:
        with self._lock:
            # Together: both change when a newer one leaves the device.
            snapshot, arrived = entry.ram or entry.leaving, entry.arrived
            if snapshot is None or entry.file is not None:
                return None
        if arrived is not None:
            arrived.synchronize()
        return folder.write(entry.key, entry.tokens, snapshot)

    def _load_file(self, folder: SnapshotFolder, entry: Entry) -> bool:
        """Bring one snapshot to RAM; tell whether it was whole, and still wanted."""
        file = entry.file
        snapshot = folder.read(file) if file is not None else None
        if snapshot is not None and self._copies is not None:
            # Not under the lock, which the engine's thread may want.
            snapshot = self._copies.pinned(snapshot)
        with self._lock:
            if snapshot is None:
                self._disk.discard(entry)
                entry.file = None
                self._forget_if_gone(entry)
            elif self._is_known(entry):
                self._put_in_ram(entry, snapshot)
                self._trim()
                return True
        return False
