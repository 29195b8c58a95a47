"""What the state cache is made of: entries, tiers of bounded bytes, and what is found there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from mrss_provider.engine.copy_stream import Arrival
from mrss_provider.engine.radix_tree import Ids
from mrss_provider.engine.snapshot_folder import SnapshotFile
from mrss_provider.model.state import StateSnapshot


@dataclass(frozen=True)
class Restored:
    """A hit: the rows after `length` tokens."""

    length: int
    rows: tuple[StateSnapshot, ...]


class Entry:
    """One row's state after `tokens`, in at least one tier.

    `leaving` is what has left the RAM tier and waits for its file. `arrived` happens when what is
    in RAM has been copied there; None if it was there at once.
    """

    __slots__ = ("arrived", "device", "file", "key", "leaving", "ram", "tokens")

    def __init__(self, key: str, tokens: Ids) -> None:
        self.key = key
        self.tokens = tokens
        self.device: StateSnapshot | None = None
        self.ram: StateSnapshot | None = None
        self.leaving: StateSnapshot | None = None
        self.arrived: Arrival | None = None
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
