"""The state cache against a plain dictionary, in memory and over files."""

from __future__ import annotations

import errno
import logging
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mrss_provider.engine.prefix_cache import PrefixCache
from mrss_provider.engine.radix_tree import RadixTree, as_ids
from mrss_provider.engine.snapshot_folder import SnapshotFolder
from mrss_provider.errors import ConfigError
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
# One snapshot of CONFIG, without its tokens.
SNAPSHOT_BYTES = 4 * (16 + 4 + 4)
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)
KEYS = ("base", "amber", "blue")


def snapshot(value: float, *, offset: bool = False) -> StateSnapshot:
    shift = torch.full((1, 4), float(value))
    return StateSnapshot(
        torch.full((1, 1, 4, 4), float(value)), shift, shift + 1, shift + 2 if offset else None
    )


def value_of(found: StateSnapshot) -> float:
    return float(found.wkv[0, 0, 0, 0])


def size(tokens: tuple[int, ...]) -> int:
    return SNAPSHOT_BYTES + 4 * len(tokens)


class TreeMachine(RuleBasedStateMachine):
    """A radix tree, and a dictionary of whole sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.tree: RadixTree[int] = RadixTree()
        self.expected: dict[tuple[int, ...], int] = {}

    @rule(tokens=TOKENS, value=st.integers())
    def insert(self, tokens: tuple[int, ...], value: int) -> None:
        self.tree.insert(as_ids(tokens), value)
        self.expected[tokens] = value

    @rule(tokens=TOKENS)
    def remove(self, tokens: tuple[int, ...]) -> None:
        self.tree.remove(as_ids(tokens))
        self.expected.pop(tokens, None)

    @rule(tokens=TOKENS)
    def find(self, tokens: tuple[int, ...]) -> None:
        expected = {
            n: self.expected[tokens[:n]]
            for n in range(1, len(tokens) + 1)
            if tokens[:n] in self.expected
        }
        assert self.tree.find(as_ids(tokens)) == expected
        shared = max(
            n
            for n in range(len(tokens) + 1)
            if not n or any(other[:n] == tokens[:n] for other in self.expected)
        )
        assert self.tree.shared_len(as_ids(tokens)) == shared

    @invariant()
    def counts(self) -> None:
        assert len(self.tree) == len(self.expected)
        if not self.expected:
            assert not self.tree._root.children, "what is empty keeps no nodes"


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


class CacheMachine(RuleBasedStateMachine):
    """The RAM tier, and an ordered dictionary that forgets its oldest entries."""

    LIMIT = 6 * SNAPSHOT_BYTES

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(CPU, ram_bytes=self.LIMIT)
        self.expected: OrderedDict[tuple[str, tuple[int, ...]], float] = OrderedDict()
        self.count = 0.0

    @rule(key=st.sampled_from(KEYS), tokens=TOKENS)
    def insert(self, key: str, tokens: tuple[int, ...]) -> None:
        self.count += 1
        self.cache.insert(key, as_ids(tokens), snapshot(self.count))
        self.expected[key, tokens] = self.count
        self.expected.move_to_end((key, tokens))
        while sum(size(tokens) for _, tokens in self.expected) > self.LIMIT:
            self.expected.popitem(last=False)

    @rule(
        keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True),
        tokens=TOKENS,
        limit=st.integers(0, 7),
    )
    def restore(self, keys: list[str], tokens: tuple[int, ...], limit: int) -> None:
        length = max(
            (
                n
                for n in range(1, min(limit, len(tokens)) + 1)
                if all((key, tokens[:n]) in self.expected for key in keys)
            ),
            default=0,
        )
        assert self.cache.match(keys, as_ids(tokens), limit) == length
        restored = self.cache.restore(keys, as_ids(tokens), limit)
        assert (restored.length if restored else 0) == length
        if restored:
            for key, row in zip(keys, restored.rows, strict=True):
                assert value_of(row) == self.expected[key, tokens[:length]]
                self.expected.move_to_end((key, tokens[:length]))

    @invariant()
    def bytes_are_counted_and_bounded(self) -> None:
        stats = self.cache.stats()
        assert stats.ram_bytes == sum(size(tokens) for _, tokens in self.expected)
        assert stats.ram_bytes <= self.LIMIT
        assert stats.num_entries == len(self.expected)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = PrefixCache(CPU, ram_bytes=SNAPSHOT_BYTES)
    cache.insert("base", as_ids([1]), snapshot(1))
    assert cache.stats().num_entries == 0
    assert not PrefixCache(CPU, ram_bytes=0).is_on


def folder(path: Path, config: ModelConfig = CONFIG) -> SnapshotFolder:
    return SnapshotFolder(path, config, torch.float32)


def disk_cache(path: Path, *, ram: int = 100, disk: int = 1 << 20) -> PrefixCache:
    """A cache with room for `ram` snapshots in memory."""
    return PrefixCache(
        CPU, ram_bytes=ram * (SNAPSHOT_BYTES + 64), folder=folder(path), disk_bytes=disk
    )


def files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.safetensors"))


def test_snapshots_survive_a_restart(tmp_path: Path) -> None:
    cache = disk_cache(tmp_path)
    cache.insert("base", as_ids([1, 2]), snapshot(1, offset=True))
    cache.insert("amber", as_ids([1, 2]), snapshot(2))
    cache.close()
    again = disk_cache(tmp_path)
    again.wait_for_files()
    tokens = as_ids([1, 2, 3])
    assert again.restore(["base", "amber"], tokens, 3) is None, "nothing is read on the way"
    assert again.match(["base", "amber"], tokens, 3, files=True) == 2
    again.load_files(["base", "amber"], tokens, 3)
    restored = again.restore(["base", "amber"], tokens, 3)
    assert restored is not None
    assert restored.length == 2
    for row, expected in zip(restored.rows, (snapshot(1, offset=True), snapshot(2)), strict=True):
        for part in ("wkv", "shift_att", "shift_ffn", "time_offset"):
            one, other = getattr(row, part), getattr(expected, part)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    again.close()


def test_what_leaves_memory_stays_in_a_file(tmp_path: Path) -> None:
    cache = disk_cache(tmp_path, ram=4)
    for i in range(1, 9):
        cache.insert("base", as_ids([i]), snapshot(i))
        cache.wait_for_files()
    assert cache.match(["base"], as_ids([1]), 1) == 0
    cache.load_files(["base"], as_ids([1]), 1)
    restored = cache.restore(["base"], as_ids([1]), 1)
    assert restored is not None
    assert value_of(restored.rows[0]) == 1
    cache.close()


def test_files_are_bounded_and_the_longest_unused_go_first(tmp_path: Path) -> None:
    cache = disk_cache(tmp_path)
    cache.insert("base", as_ids([0]), snapshot(1))
    cache.wait_for_files()
    (first,) = files(tmp_path)
    cache.close()
    limit = 3 * first.stat().st_size + 64
    cache = disk_cache(tmp_path, disk=limit)
    for i in range(1, 6):
        cache.insert("base", as_ids([i]), snapshot(i))
        cache.wait_for_files()
    kept = files(tmp_path)
    assert len(kept) == 3
    assert first not in kept
    assert cache.stats().disk_bytes <= limit
    cache.close()


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "other name"])
def test_a_damaged_file_is_dropped_and_said_once(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = disk_cache(tmp_path)
    cache.insert("base", as_ids([1, 2]), snapshot(1))
    cache.close()
    (path,) = files(tmp_path)
    data = path.read_bytes()
    if harm == "other name":
        path = path.rename(path.with_name("0" * 40 + ".safetensors"))
    else:
        harmed = {"truncate": data[:-5], "flip": data[:-20] + b"\xff" + data[-19:], "empty": b""}
        path.write_bytes(harmed[harm])
    with caplog.at_level(logging.WARNING):
        again = disk_cache(tmp_path)
        again.insert("amber", as_ids([1]), snapshot(3))
        again.wait_for_files()
        again.load_files(["base"], as_ids([1, 2]), 2)
    assert again.restore(["base"], as_ids([1, 2]), 2) is None
    assert not path.exists()
    assert [record for record in caplog.records if path.name in record.getMessage()]
    assert len(caplog.records) == 1
    again.close()


@pytest.mark.parametrize("differs", ["fingerprint", "content"])
def test_a_snapshot_of_another_model_is_not_seen(tmp_path: Path, differs: str) -> None:
    cache = disk_cache(tmp_path)
    cache.insert("base", as_ids([1, 2]), snapshot(1))
    cache.close()
    other = ModelConfig(**{**vars(CONFIG), differs: "cd" * 32})
    assert folder(tmp_path, other).scan() == []
    assert len(folder(tmp_path).scan()) == 1


def test_a_file_with_numbers_that_are_not_finite_is_dropped(tmp_path: Path) -> None:
    where = folder(tmp_path)
    file = where.write("base", as_ids([1]), snapshot(float("nan")))
    assert where.read(file) is None
    assert not file.path.exists()


def test_a_full_disk_is_logged_once_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    cache = disk_cache(tmp_path, ram=2)
    with caplog.at_level(logging.WARNING):
        for i in range(1, 6):
            cache.insert("base", as_ids([i]), snapshot(i))
            cache.wait_for_files()
    assert [r.getMessage() for r in caplog.records if "No space left" in r.getMessage()]
    assert len(caplog.records) == 1
    restored = cache.restore(["base"], as_ids([5]), 1)
    assert restored is not None
    assert files(tmp_path) == []
    stats = cache.stats()
    assert stats.num_entries * size((1,)) == stats.ram_bytes, "what is nowhere is forgotten"
    monkeypatch.undo()
    cache.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cache_dir"):
        folder(tmp_path / "file")


@given(st.lists(st.integers(0, 49), min_size=1, max_size=40))
@settings(max_examples=20, deadline=None)
def test_tokens_come_back_from_files(tmp_path_factory: pytest.TempPathFactory, tokens) -> None:
    where = folder(tmp_path_factory.mktemp("cache"))
    where.write("amber+0", as_ids(tokens), snapshot(1))
    (found,) = where.scan()
    assert (found.key, found.tokens.tolist()) == ("amber+0", tokens)
