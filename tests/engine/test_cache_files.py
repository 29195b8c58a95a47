"""What waits for its file in the state cache gives its memory back, whatever becomes of that."""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path

import pytest
import torch
from test_cache_copies import CONFIG, CPU, DEVICE_BYTES, TOKEN, FakeCopies, row

from mrss_provider.engine.prefix_cache import PrefixCache
from mrss_provider.engine.radix_tree import as_ids
from mrss_provider.engine.snapshot_folder import SnapshotFile, SnapshotFolder
from mrss_provider.model import StateSnapshot

SIZE = DEVICE_BYTES + TOKEN


class HeldFolder(SnapshotFolder):
    """A folder on a disk that is busy until it is told otherwise."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, CONFIG, torch.float32)
        self.is_writing = threading.Event()
        self.may_write = threading.Event()
        self.num_written = 0

    def write(self, key: str, tokens: object, snapshot: StateSnapshot) -> SnapshotFile:
        self.is_writing.set()
        assert self.may_write.wait(10)
        self.num_written += 1
        return super().write(key, tokens, snapshot)  # type: ignore[arg-type]


def cache_of(folder: HeldFolder) -> PrefixCache:
    """A cache of four rows, beside which one may wait for its file."""
    return PrefixCache(CPU, ram_bytes=4 * SIZE, folder=folder, disk_bytes=1 << 20)


class FullFolder(HeldFolder):
    """A folder for whose files the host has no memory."""

    def write(self, key: str, tokens: object, snapshot: StateSnapshot) -> SnapshotFile:
        super().write(key, tokens, snapshot).path.unlink()
        raise MemoryError


def test_a_row_that_cannot_be_written_is_let_go_of(tmp_path: Path) -> None:
    folder = FullFolder(tmp_path)
    cache = cache_of(folder)
    for number in range(5):
        cache.insert("base", as_ids([number]), row(number))
    assert cache.stats().num_entries == 5
    folder.may_write.set()
    cache.wait_for_files()
    assert cache.stats().num_entries == 4
    cache.close()


class SlowFolder(HeldFolder):
    """A folder with so many files that it takes a while to find them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may_scan = threading.Event()

    def scan(self) -> list[SnapshotFile]:
        assert self.may_scan.wait(10)
        return super().scan()


def test_a_row_whose_file_was_there_all_along_is_let_go_of(tmp_path: Path) -> None:
    before = HeldFolder(tmp_path)
    before.may_write.set()
    cache = cache_of(before)
    cache.insert("base", as_ids([0]), row(0))
    cache.close()

    folder = SlowFolder(tmp_path)
    cache = cache_of(folder)
    for number in range(5):
        cache.insert("base", as_ids([number]), row(number))
    folder.may_scan.set()
    folder.may_write.set()
    cache.wait_for_files()
    folder.may_write.clear()
    # The last of these is one more than memory has room for.
    for number in range(5):
        cache.insert("later", as_ids([number]), row(number))
    assert cache.match(["later"], as_ids([0]), 1) == 1
    folder.may_write.set()
    cache.close()


def test_no_more_waits_than_a_quarter_and_what_comes_back_makes_room(tmp_path: Path) -> None:
    folder = HeldFolder(tmp_path)
    cache = cache_of(folder)
    for number in range(6):
        cache.insert("base", as_ids([number]), row(number))
    assert [cache.match(["base"], as_ids([number]), 1) for number in (0, 1, 2)] == [1, 0, 1]
    cache.insert("base", as_ids([0]), row(0))
    assert [cache.match(["base"], as_ids([number]), 1) for number in (0, 1, 2)] == [1, 0, 1]
    folder.may_write.set()
    cache.close()


def test_the_file_of_a_row_that_is_forgotten_while_it_is_written_does_not_stay(
    tmp_path: Path,
) -> None:
    folder = HeldFolder(tmp_path)
    cache = cache_of(folder)
    for number in range(4):
        cache.insert("base", as_ids([number]), row(number))
    assert folder.is_writing.wait(10)
    # The next one takes the only place to wait in.
    assert cache.restore(["base"], as_ids([0]), 1) is not None
    for number in range(4, 8):
        cache.insert("base", as_ids([number]), row(number))
    assert cache.match(["base"], as_ids([0]), 1) == 0
    folder.may_write.set()
    cache.wait_for_files()
    there = [path.stat().st_size for path in folder.folder.iterdir()]
    assert (sum(there), len(there)) == (cache.stats().disk_bytes, 5)
    cache.close()


class Listed(HeldFolder):
    """A folder that notes the order of its files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may_write.set()
        self.keys: list[str] = []

    def write(self, key: str, tokens: object, snapshot: StateSnapshot) -> SnapshotFile:
        self.keys.append(key)
        return super().write(key, tokens, snapshot)


def test_at_the_end_what_was_used_last_is_written_first(tmp_path: Path) -> None:
    folder = Listed(tmp_path)
    copies = FakeCopies()
    cache = PrefixCache(
        CPU, ram_bytes=0, device_bytes=9 * SIZE, folder=folder, disk_bytes=1 << 20, copies=copies
    )
    for number, key in enumerate("abc"):
        cache.insert(key, as_ids([1]), row(number))
    assert cache.restore(["a"], as_ids([1]), 1) is not None
    cache.close()
    assert folder.keys == ["a", "c", "b"]


def test_a_file_that_somebody_else_has_dropped_is_a_miss_and_no_defect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Listed(tmp_path)
    cache = cache_of(folder)
    for number in range(6):
        cache.insert("base", as_ids([number]), row(number))
        cache.wait_for_files()
    assert cache.match(["base"], as_ids([0]), 1, files=True) == 1
    for path in folder.folder.iterdir():
        path.unlink()
    with caplog.at_level(logging.WARNING):
        cache.load_files(["base"], as_ids([0]), 1)
    assert cache.match(["base"], as_ids([0]), 1, files=True) == 0
    assert not caplog.records
    cache.close()


class FullAtTimes(HeldFolder):
    """A folder on a disk that has no room for odd tokens."""

    def write(self, key: str, tokens: object, snapshot: StateSnapshot) -> SnapshotFile:
        if snapshot.wkv[0, 0, 0, 0] % 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(key, tokens, snapshot)


def test_each_time_that_a_disk_fills_up_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = FullAtTimes(tmp_path)
    folder.may_write.set()
    cache = cache_of(folder)
    with caplog.at_level(logging.WARNING):
        for number in (1, 3, 4, 5, 7):
            cache.insert("base", as_ids([number]), row(number))
        cache.wait_for_files()
    assert len(caplog.records) == 2
    cache.close()


def test_what_waits_for_its_file_is_counted_once_however_often_it_comes_back(
    tmp_path: Path,
) -> None:
    folder = HeldFolder(tmp_path)
    size = DEVICE_BYTES + TOKEN
    # Three wait for their files beside the twelve in memory.
    cache = PrefixCache(CPU, ram_bytes=12 * size, folder=folder, disk_bytes=1 << 20)
    for number in (*range(13), 0, *range(2, 13), 1):
        # The first leaves twice.
        cache.insert("again", as_ids([number]), row(number))
    folder.may_write.set()
    cache.wait_for_files()
    folder.may_write.clear()
    for number in range(15):
        cache.insert("later", as_ids([number]), row(number))
    assert all(cache.match(["later"], as_ids([number]), 1) for number in range(15))
    folder.may_write.set()
    cache.close()


def test_nothing_is_written_after_the_wait_for_the_disk_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrss_provider.engine.prefix_cache._CLOSE_WAIT_S", 0.01)
    folder = HeldFolder(tmp_path)
    cache = PrefixCache(CPU, ram_bytes=1 << 20, folder=folder, disk_bytes=1 << 20)
    for number in range(5):
        cache.insert("base", as_ids([number]), row(number))
    assert folder.is_writing.wait(10)
    cache.close()
    folder.may_write.set()
    assert cache._writer is not None
    cache._writer._thread.join(10)
    assert not cache._writer._thread.is_alive()
    assert folder.num_written == 1
