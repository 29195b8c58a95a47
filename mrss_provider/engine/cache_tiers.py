"""What the state cache is made of: entries, tiers of bounded bytes, and ways between memories."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mrss_provider.engine.radix_tree import Ids
from mrss_provider.engine.snapshot_folder import SnapshotFile
from mrss_provider.model.state import StateSnapshot


class Entry:
    """One row's state after `tokens`, in at least one tier.

    `leaving` is what has left the RAM tier and waits for its file.
    """

    __slots__ = ("arrived", "device", "file", "key", "leaving", "num_bytes", "ram", "tokens")

    def __init__(self, key: str, tokens: Ids, num_bytes: int) -> None:
        self.key = key
        self.tokens = tokens
        self.num_bytes = num_bytes
        self.device: StateSnapshot | None = None
        self.ram: StateSnapshot | None = None
        self.leaving: StateSnapshot | None = None
        self.arrived: torch.cuda.Event | None = None
        self.file: SnapshotFile | None = None

    @property
    def snapshot(self) -> StateSnapshot | None:
        """The nearest copy in memory."""
        return self.device or self.ram or self.leaving


class Tier:
    """Entries in the order of their last use, and the bytes that they have here."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.entries: OrderedDict[Entry, int] = OrderedDict()

    def add(self, entry: Entry, num_bytes: int) -> None:
        """Take an entry in as the last used."""
        self.discard(entry)
        self.entries[entry] = num_bytes
        self.num_bytes += num_bytes

    def touch(self, entry: Entry) -> None:
        """Make an entry the last used, if it is here."""
        if entry in self.entries:
            self.entries.move_to_end(entry)

    def discard(self, entry: Entry) -> None:
        """Take an entry out, if it is here."""
        self.num_bytes -= self.entries.pop(entry, 0)

    def surplus(self) -> Iterator[Entry]:
        """Take out entries, the longest unused first, until the rest fits."""
        while self.num_bytes > self.max_bytes:
            entry = next(iter(self.entries))
            self.discard(entry)
            yield entry


def _each(snapshot: StateSnapshot, change: Callable[[Tensor], Tensor]) -> StateSnapshot:
    offset = snapshot.time_offset
    return StateSnapshot(
        change(snapshot.wkv),
        change(snapshot.shift_att),
        change(snapshot.shift_ffn),
        None if offset is None else change(offset),
    )


def moved(snapshot: StateSnapshot, device: torch.device) -> StateSnapshot:
    """Copy to a device; from pinned memory nobody waits."""
    return _each(snapshot, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(snapshot: StateSnapshot) -> StateSnapshot:
    """Copy to pinned memory from memory of the host."""
    return _each(snapshot, lambda tensor: tensor.pin_memory())


def to_pinned(snapshot: StateSnapshot) -> StateSnapshot:
    """Copy to pinned memory behind what the device has to do; nobody waits."""

    def copy(tensor: Tensor) -> Tensor:
        out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return out.copy_(tensor, non_blocking=True)

    return _each(snapshot, copy)
