"""The state cache between two memories, over a device whose copies arrive when somebody waits."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mrss_provider.engine.copy_stream import Arrival
from mrss_provider.engine.prefix_cache import PrefixCache
from mrss_provider.engine.radix_tree import as_ids
from mrss_provider.engine.snapshot_folder import SnapshotFolder
from mrss_provider.model import ModelConfig, StateSnapshot

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    version=7,
    num_layers=1,
    hidden_size=4,
    num_heads=1,
    head_size=4,
    vocab_size=50,
    ffn_size=8,
    dtype="fp32",
    fingerprint="ab" * 32,
)
DEVICE_BYTES = 4 * (16 + 4 + 4)
# The stand-in's blocks are larger than what is in them, as those of pinned memory are.
RAM_BYTES = DEVICE_BYTES + 32
TOKEN = 4


class FakeArrival:
    """Copies when it is waited for, as late as a device may."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs

    def synchronize(self) -> None:
        for source, target in self.pairs:
            target.copy_(source)


class FakeCopies:
    """Both memories are the host's; what has not arrived yet is no number."""

    def __init__(self) -> None:
        self.is_full = False
        self.num_prepared = 0
        self.is_closed = False
        self.while_pinning = lambda: None

    def to_host(self, snapshot: StateSnapshot) -> tuple[StateSnapshot, Arrival]:
        if self.is_full:
            raise RuntimeError("CUDA error: out of memory")
        parts = (snapshot.wkv, snapshot.shift_att, snapshot.shift_ffn)
        copies = [torch.full_like(part, torch.nan) for part in parts]
        return StateSnapshot(*copies), FakeArrival(list(zip(parts, copies, strict=True)))

    def to_device(self, snapshot: StateSnapshot, arrived: Arrival | None) -> StateSnapshot:
        if arrived is not None:
            arrived.synchronize()
        return StateSnapshot(
            *(part.clone() for part in vars(snapshot).values() if part is not None)
        )

    def pinned(self, snapshot: StateSnapshot) -> StateSnapshot:
        if self.is_full:
            raise RuntimeError("CUDA error: out of memory")
        self.while_pinning()
        return snapshot

    def host_bytes(self, snapshot: StateSnapshot) -> int:
        return snapshot.num_bytes + 32

    def prepare(self, snapshot: StateSnapshot, num_rows: int) -> None:
        if self.is_full:
            raise RuntimeError("CUDA error: out of memory")
        self.num_prepared += num_rows

    def close(self) -> None:
        self.is_closed = True


def row(value: float) -> StateSnapshot:
    shift = torch.full((1, 4), float(value))
    return StateSnapshot(torch.full((1, 1, 4, 4), float(value)), shift, shift.clone())


def value_of(found: StateSnapshot) -> float:
    assert found.wkv.unique().numel() == 1
    assert torch.equal(found.shift_att, found.shift_ffn)
    assert float(found.shift_att[0, 0]) == float(found.wkv[0, 0, 0, 0])
    return float(found.shift_att[0, 0])


def cache_of(
    device_rows: int,
    ram_rows: int,
    folder: Path | None = None,
    copies: FakeCopies | None = None,
) -> PrefixCache:
    """A cache with room for so many rows of one token in each memory."""
    return PrefixCache(
        CPU,
        device_bytes=device_rows * (DEVICE_BYTES + TOKEN),
        ram_bytes=ram_rows * (RAM_BYTES + TOKEN),
        folder=None if folder is None else SnapshotFolder(folder, CONFIG, torch.float32),
        disk_bytes=0 if folder is None else 1 << 20,
        copies=copies or FakeCopies(),
    )


class Expected:
    """What is where, the longest unused first."""

    def __init__(self, device_rows: int, ram_rows: int) -> None:
        self.limits = device_rows, ram_rows
        self.device: OrderedDict[str, float] = OrderedDict()
        self.ram: OrderedDict[str, float] = OrderedDict()

    def insert(self, key: str, value: float) -> None:
        self.device[key] = value
        self.device.move_to_end(key)
        self.trim()

    def restore(self, keys: list[str]) -> list[float] | None:
        if not all(key in self.device or key in self.ram for key in keys):
            return None
        found = [self.device.get(key, self.ram.get(key, 0.0)) for key in keys]
        for key, value in zip(keys, found, strict=True):
            self.device[key] = value
            self.device.move_to_end(key)
            if key in self.ram:
                self.ram.move_to_end(key)
        self.trim()
        return found

    def trim(self) -> None:
        most, most_in_ram = self.limits
        while len(self.device) > most:
            key, value = self.device.popitem(last=False)
            if key not in self.ram:
                self.ram[key] = value
            # Also what is on the device, too, and may come back from there next.
            if len(self.ram) > most_in_ram:
                self.ram.popitem(last=False)


KEY = st.sampled_from("abcdef")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(KEY | st.lists(KEY, min_size=1, max_size=3, unique=True), min_size=12, max_size=40),
)
def test_rows_move_between_memories_as_they_are_used(
    device_rows: int, ram_rows: int, steps: list[str | list[str]]
) -> None:
    cache, expected = cache_of(device_rows, ram_rows), Expected(device_rows, ram_rows)
    inserted: dict[str, float] = {}
    for number, step in enumerate(steps):
        if isinstance(step, str):
            # As whoever keeps rows: not again while it is there.
            if not cache.holds([step], as_ids([1])):
                inserted[step] = float(number)
                cache.insert(step, as_ids([1]), row(number))
                expected.insert(step, number)
        else:
            restored = cache.restore(step, as_ids([1, 2]), 2)
            found = expected.restore(step)
            assert (restored and [value_of(one) for one in restored.rows]) == found
        stats = cache.stats()
        assert stats.device_bytes == len(expected.device) * (DEVICE_BYTES + TOKEN)
        assert stats.ram_bytes == len(expected.ram) * (RAM_BYTES + TOKEN)
        assert stats.num_entries == len({*expected.device, *expected.ram})


def test_a_hit_on_the_rows_longest_unused_in_both_memories_is_whole() -> None:
    cache = cache_of(device_rows=2, ram_rows=2)
    for number, key in enumerate("abcd"):
        cache.insert(key, as_ids([1]), row(number))
    # Each that comes back to the device sends another one to RAM, whose oldest are just these.
    restored = cache.restore(["a", "b"], as_ids([1]), 1)
    assert restored is not None
    assert [value_of(one) for one in restored.rows] == [0, 1]


def test_a_state_that_ram_has_no_memory_for_is_dropped_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    copies = FakeCopies()
    cache = cache_of(device_rows=1, ram_rows=3, copies=copies)
    copies.is_full = True
    with caplog.at_level(logging.WARNING):
        for number, key in enumerate("abc"):
            cache.insert(key, as_ids([1]), row(number))
    assert len(caplog.records) == 1
    stats = cache.stats()
    assert (stats.num_entries, stats.ram_bytes) == (1, 0)
    copies.is_full = False
    cache.insert("d", as_ids([1]), row(3))
    restored = cache.restore(["c", "d"], as_ids([1]), 1)
    assert restored is not None
    assert [value_of(one) for one in restored.rows] == [2, 3]
    copies.is_full = True
    with caplog.at_level(logging.WARNING):
        cache.insert("e", as_ids([1]), row(4))
        cache.insert("f", as_ids([1]), row(5))
    assert len(caplog.records) == 2


def test_a_file_has_what_has_arrived(tmp_path: Path) -> None:
    cache = cache_of(device_rows=1, ram_rows=9, folder=tmp_path)
    for number, key in enumerate("abc"):
        cache.insert(key, as_ids([1]), row(number))
    cache.close()
    again = cache_of(device_rows=1, ram_rows=9, folder=tmp_path)
    again.wait_for_files()
    for number, key in enumerate("abc"):
        again.load_files([key], as_ids([1]), 1)
        restored = again.restore([key], as_ids([1]), 1)
        assert restored is not None
        assert value_of(restored.rows[0]) == number
    again.close()


def test_memory_is_taken_for_the_rows_that_fit_in_ram(caplog: pytest.LogCaptureFixture) -> None:
    copies = FakeCopies()
    cache = cache_of(device_rows=1, ram_rows=5, copies=copies)
    cache.prepare(row(0))
    assert copies.num_prepared == 5 + 4
    cache_of(device_rows=9, ram_rows=0, copies=copies).prepare(row(0))
    assert copies.num_prepared == 5 + 4
    cache.close()
    assert copies.is_closed
    copies.is_full = True
    with caplog.at_level(logging.WARNING):
        cache_of(device_rows=1, ram_rows=5, copies=copies).prepare(row(0))
    assert len(caplog.records) == 1


class Counted(FakeCopies):
    """Notes how many copies were in RAM at once; each is there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.num_held = self.most_held = 0

    def to_host(self, snapshot: StateSnapshot) -> tuple[StateSnapshot, Arrival]:
        copy, arrival = super().to_host(snapshot)
        arrival.synchronize()
        self.num_held += 1
        self.most_held = max(self.most_held, self.num_held)
        weakref.finalize(copy, self._let_go)
        return copy, FakeArrival([])

    def _let_go(self) -> None:
        self.num_held -= 1


def test_ram_does_not_hold_more_when_the_device_gives_all_of_its_memory_back() -> None:
    copies = Counted()
    cache = cache_of(device_rows=9, ram_rows=3, copies=copies)
    for number in range(9):
        cache.insert("a", as_ids([number]), row(number))
    cache.shed()
    # One comes before the one in whose place it does has left.
    assert (copies.most_held, copies.num_held) == (3 + 1, 3)
    for number in (6, 7, 8):
        restored = cache.restore(["a"], as_ids([number]), 1)
        assert restored is not None
        assert value_of(restored.rows[0]) == number


def written(folder: Path) -> None:
    cache = cache_of(device_rows=1, ram_rows=9, folder=folder)
    cache.insert("a", as_ids([1]), row(7))
    cache.close()


def look(cache: PrefixCache) -> None:
    """Fail if the engine's thread would wait."""
    other = threading.Thread(target=cache.stats)
    other.start()
    other.join(5)
    assert not other.is_alive(), "the cache is locked"


def test_nobody_waits_for_memory_that_a_file_is_read_to(tmp_path: Path) -> None:
    written(tmp_path)
    copies = FakeCopies()
    cache = cache_of(device_rows=1, ram_rows=9, folder=tmp_path, copies=copies)
    cache.wait_for_files()

    copies.while_pinning = lambda: look(cache)
    cache.load_files(["a"], as_ids([1]), 1)
    assert cache.match(["a"], as_ids([1]), 1) == 1
    cache.close()


def test_nobody_waits_for_a_file_to_be_removed(tmp_path: Path) -> None:
    removed: list[str] = []

    class Slow(SnapshotFolder):
        def remove(self, path: Path) -> None:
            look(cache)
            removed.append(path.name)
            super().remove(path)

    size = DEVICE_BYTES + TOKEN
    folder = Slow(tmp_path, CONFIG, torch.float32)
    cache = PrefixCache(CPU, ram_bytes=9 * size, folder=folder, disk_bytes=2000)
    for number in range(9):
        cache.insert("base", as_ids([number]), row(number))
    cache.wait_for_files()
    left = {path.name for path in folder.folder.iterdir()}
    assert len(removed) + len(left) == 9
    assert len(removed) > 4
    assert not left & set(removed)
    cache.close()


def test_no_memory_for_a_file_is_a_miss(tmp_path: Path) -> None:
    written(tmp_path)
    copies = FakeCopies()
    cache = cache_of(device_rows=1, ram_rows=9, folder=tmp_path, copies=copies)
    cache.wait_for_files()
    copies.is_full = True
    cache.load_files(["a"], as_ids([1]), 1)
    assert cache.restore(["a"], as_ids([1]), 1) is None
    copies.is_full = False
    cache.load_files(["a"], as_ids([1]), 1)
    assert cache.restore(["a"], as_ids([1]), 1) is not None
    cache.close()


def test_a_file_that_goes_while_it_is_read_leaves_nothing_in_ram(tmp_path: Path) -> None:
    written(tmp_path)
    copies = FakeCopies()
    cache = cache_of(device_rows=1, ram_rows=9, folder=tmp_path, copies=copies)
    cache.wait_for_files()

    def forget() -> None:
        with cache._lock:
            cache._disk.max_bytes = 0
            cache._trim()

    copies.while_pinning = forget
    cache.load_files(["a"], as_ids([1]), 1)
    stats = cache.stats()
    assert (stats.num_entries, stats.ram_bytes, stats.disk_bytes) == (0, 0, 0)
    cache.close()
