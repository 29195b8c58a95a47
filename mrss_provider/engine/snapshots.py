"""SnapshotKeeper: when the states of running rows are copied to the cache, and taken from it.

Copies are made where it is known what a slot has read: behind a launched step, in the order of the
device. They reach the cache once they are known to be finite; nobody waits for that. Used on the
engine's thread only, but for `load_files`.

Kept are, of a prompt, its state at some ends of chunks, where it parts from others, and at its end;
of an answer, its state at its end or, where a stop string ended it some tokens ago, the last two of
those every so many tokens and at tokens that may end a turn. Until then these are copies beside the
cache, bounded in bytes: no other request can use them.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mrss_provider.engine.batch import KEEP_EVERY, Choice, Chunk, Running
from mrss_provider.engine.cache_tiers import Restored
from mrss_provider.engine.continuation import Captured
from mrss_provider.engine.dealing import PREFILL_BLOCK_LEN
from mrss_provider.engine.prefix_cache import PrefixCache
from mrss_provider.engine.prompt_lookup import find_longest, keys_after, shared_len, usable_len
from mrss_provider.engine.radix_tree import Ids, as_ids
from mrss_provider.engine.request import EngineRequest
from mrss_provider.engine.snapshot_folder import SnapshotFolder
from mrss_provider.model.memory import lacked_memory
from mrss_provider.model.state import STATE_DTYPES, StateSnapshot

if TYPE_CHECKING:
    from mrss_provider.config import EngineConfig
    from mrss_provider.model import Model, StatePool

log = logging.getLogger(__name__)

MIN_KEPT_LEN = 32
"""Fewer tokens are read again sooner than they are looked up."""

_FIRST_SPACING = 128
# A prompt's end is near where so many of its longest chunks are left.
_NUM_NEAR_END = 2
_NUM_COPIES = 2
# A stop string is found so many tokens late at most.
_STOP_DELAY = 12
_AUTO_DEVICE_BYTES = 2 << 30
_AUTO_DEVICE_SHARE = 0.05


@dataclass(eq=False)
class _Kept:
    """Rows after `tokens`, on their way to the cache; `total` is the sum of all their numbers."""

    keys: tuple[str, ...]
    tokens: Ids
    rows: tuple[StateSnapshot, ...]
    total: Tensor
    arrived: torch.cuda.Event | None


@dataclass(frozen=True)
class _Copy:
    """Rows of a running answer after `num_read` of its tokens."""

    num_read: int
    rows: tuple[StateSnapshot, ...]

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        return sum(row.num_bytes for row in self.rows)


@dataclass(eq=False)
class _Progress:
    """What has been kept of a running request.

    Attributes:
        request: whose prompt and answers they are.
        prompt: int32 [T].
        kept_len: the longest beginning of the prompt that is kept.
        chunk_len: of its longest chunk so far.
        near: the rows at the last end of a chunk, for when it turns out to be near the end.
        copies: of each answer, the newest last.
    """

    request: EngineRequest
    prompt: Ids
    kept_len: int
    chunk_len: int = 0
    near: _Kept | None = None
    copies: dict[int, deque[_Copy]] = field(default_factory=dict)


class SnapshotKeeper:
    """Keeps states of a pool in a cache.

    Args:
        cache: where they are kept.
        pool: the states of the running rows.
        copy_bytes: bound of the copies beside the cache.
    """

    def __init__(self, cache: PrefixCache, pool: StatePool, copy_bytes: int) -> None:
        self.cache = cache
        self._pool = pool
        self._copy_bytes = copy_bytes
        self._num_copied_bytes = 0
        self._is_cuda = pool.wkv.is_cuda
        self._progress: weakref.WeakKeyDictionary[Running, _Progress] = weakref.WeakKeyDictionary()
        self._arriving: deque[_Kept] = deque()

    def find(self, request: EngineRequest) -> Restored | None:
        """Return where a request's rows may begin, on the device; None is at their states."""
        limit = usable_len(request)
        if not self.cache.is_on or limit < MIN_KEPT_LEN:
            return None
        self.settle()
        keys, stop = find_longest(self.cache, request, limit)
        try:
            return self.cache.restore(keys, request.prompt_ids, stop)
        except RuntimeError as exc:
            self._give_way(exc)
            return None

    def parting(self, request: EngineRequest, num_cached: int) -> int:
        """Return where a prompt parts from those before it, as a whole block; 0 is nowhere new.

        What several prompts have in common is kept when the second one is met.
        """
        limit = usable_len(request)
        if not self.cache.is_on or limit - num_cached < _FIRST_SPACING:
            return 0
        block = shared_len(self.cache, request, limit) // PREFILL_BLOCK_LEN * PREFILL_BLOCK_LEN
        return block if block - num_cached >= _FIRST_SPACING else 0

    def load_files(self, request: EngineRequest) -> None:
        """Bring what a request can use from files to RAM. Any thread but the engine's."""
        limit = usable_len(request)
        if limit >= MIN_KEPT_LEN:
            keys, stop = find_longest(self.cache, request, limit, files=True)
            self.cache.load_files(keys, request.prompt_ids, stop)

    def read(self, chunks: Sequence[Chunk]) -> None:
        """Keep what is worth it of prompts whose chunks a step reads; it has been launched."""
        for chunk in chunks:
            running = chunk.running
            if not running.choices:
                continue
            # What is embedded is hardly ever the beginning of something else.
            if self.cache.is_on and running.request.pooling is None:
                self._read(chunk)
            if chunk.is_last and running.request.capture is not None:
                self._capture(running.choices[0], 0)

    def grew(self, choice: Choice) -> None:
        """Keep what an answer's rows are: it has pauses, or as many tokens as `keep_at` says."""
        choice.keep_at = choice.num_sampled + KEEP_EVERY
        num_read = choice.num_read
        if num_read is None or not choice.is_level:
            return
        if choice.owner.request.capture is not None:
            self._capture(choice, num_read)
        progress = self._of(choice.owner)
        if not self.cache.is_on or len(progress.prompt) + num_read < MIN_KEPT_LEN:
            return
        copies = progress.copies.setdefault(choice.index, deque())
        if len(copies) == _NUM_COPIES:
            self._num_copied_bytes -= copies.popleft().num_bytes
        if self._num_copied_bytes >= self._copy_bytes:
            return
        rows = self._copy(choice.slots)
        if rows is not None:
            copies.append(_Copy(num_read, rows))
            self._num_copied_bytes += copies[-1].num_bytes

    def ended(self, choice: Choice, *, is_aborted: bool, has_failed: bool) -> None:
        """Keep what the rows of an answer are that is over; its slots are still its own.

        Args:
            choice: the answer.
            is_aborted: whether somebody dropped it, perhaps because of a stop string before its
                last tokens.
            has_failed: whether nobody knows what its rows are.
        """
        num_read = None if has_failed else choice.num_read
        capture = choice.owner.request.capture
        if capture is not None:
            if num_read is not None and choice.is_level:
                self._capture(choice, num_read)
            capture.end(choice.answer)
        progress = self._of(choice.owner)
        copies = progress.copies.pop(choice.index, deque())
        self._num_copied_bytes -= sum(copy.num_bytes for copy in copies)
        if not self.cache.is_on or num_read is None:
            return
        if is_aborted:
            for copy in copies:
                kept = self._watched(progress, self._tokens(choice, copy.num_read), copy.rows)
                if kept is not None:
                    self._keep(kept)
            if copies and num_read - copies[-1].num_read <= _STOP_DELAY:
                return
        if choice.is_level and len(progress.prompt) + num_read >= MIN_KEPT_LEN:
            kept = self._take(progress, self._tokens(choice, num_read), choice.slots)
            if kept is not None:
                self._keep(kept)

    def settle(self) -> None:
        """Hand to the cache what has arrived; does not wait."""
        while self._arriving:
            kept = self._arriving[0]
            if kept.arrived is not None and not kept.arrived.query():  # type: ignore[no-untyped-call]
                return
            self._arriving.popleft()
            if not math.isfinite(float(kept.total)):
                continue
            for key, row in zip(kept.keys, kept.rows, strict=True):
                self.cache.insert(key, kept.tokens, row)

    def shed(self) -> None:
        """Give back all memory of the device: somebody else has none left."""
        for progress in self._progress.values():
            progress.near = None
            progress.copies.clear()
        self._num_copied_bytes = 0
        self.cache.shed()

    def close(self) -> None:
        """Hand over what is on its way, write what is to be written, drop the rest."""
        try:
            if self._is_cuda:
                torch.cuda.synchronize(self._pool.wkv.device)
            self.settle()
        finally:
            self.cache.close()

    def _read(self, chunk: Chunk) -> None:
        progress = self._of(chunk.running)
        end = chunk.start + chunk.length
        slots = chunk.running.choices[0].slots
        progress.chunk_len = max(progress.chunk_len, chunk.length)
        if end < MIN_KEPT_LEN:
            return
        is_due = end - progress.kept_len >= max(_FIRST_SPACING, end // 4)
        is_due |= end == chunk.running.parting
        if chunk.is_last:
            if progress.near is not None:
                self._keep(progress.near)
                progress.near = None
            is_due = True
        elif not is_due and len(progress.prompt) - end > _NUM_NEAR_END * progress.chunk_len:
            return
        kept = self._take(progress, progress.prompt[:end].copy(), slots)
        if not is_due:
            progress.near = kept
        elif kept is not None:
            self._keep(kept)
            progress.kept_len, progress.near = end, None

    def _capture(self, choice: Choice, num_read: int) -> None:
        capture = choice.owner.request.capture
        assert capture is not None
        rows = self._copy(choice.slots)
        if rows is not None:
            capture.add(Captured(num_read, rows))
        capture.evidence = choice.evidence

    def _of(self, running: Running) -> _Progress:
        progress = self._progress.get(running)
        if progress is None:
            request = running.request
            progress = _Progress(request, request.prompt_ids, running.num_cached)
            self._progress[running] = progress
        return progress

    def _tokens(self, choice: Choice, num_read: int) -> Ids:
        prompt = self._of(choice.owner).prompt
        return np.concatenate((prompt, as_ids(choice.answer[:num_read])))

    def _take(self, progress: _Progress, tokens: Ids, slots: Sequence[int]) -> _Kept | None:
        """Copy rows behind what has been launched; None if they are kept already, or no room is."""
        keys = keys_after(progress.request, len(tokens))
        if self.cache.holds(keys, tokens):
            return None
        rows = self._copy(slots)
        return None if rows is None else self._watched(progress, tokens, rows)

    def _watched(
        self, progress: _Progress, tokens: Ids, rows: tuple[StateSnapshot, ...]
    ) -> _Kept | None:
        """Return rows after `tokens`, and what will tell if they are finite; None as `_copy`."""
        try:
            total, arrived = self._total(rows)
        except RuntimeError as exc:
            self._give_way(exc)
            return None
        keys = keys_after(progress.request, len(tokens))
        return _Kept(keys, tokens, rows, total, arrived)

    def _copy(self, slots: Sequence[int]) -> tuple[StateSnapshot, ...] | None:
        """Copy rows behind what has been launched; None if there is no room."""
        try:
            return tuple([self._pool.snapshot(slot) for slot in slots])
        except RuntimeError as exc:
            self._give_way(exc)
            return None

    def _give_way(self, error: RuntimeError) -> None:
        """Give the cache's memory of the device back, if `error` is that there is too little."""
        if not lacked_memory(error):
            raise error
        log.warning("no memory is left for a snapshot: the state cache gives its own back")
        self.shed()

    def _total(self, rows: Sequence[StateSnapshot]) -> tuple[Tensor, torch.cuda.Event | None]:
        """Return the sum of rows in the host's memory, and when it will be there.

        It is finite only if its terms are, and one pass: a look at each number would be several.
        """
        sums = [
            part.sum(dtype=torch.float32)
            for row in rows
            for part in (row.wkv, row.shift_att, row.shift_ffn)
        ]
        total = torch.stack(sums).sum()
        if not self._is_cuda:
            return total, None
        received = torch.empty((), pin_memory=True)
        received.copy_(total, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return received, arrived

    def _keep(self, kept: _Kept) -> None:
        self._arriving.append(kept)
        self.settle()


def make_keeper(model: Model, pool: StatePool, config: EngineConfig) -> SnapshotKeeper:
    """Return the keeper, with a cache as the configuration says.

    Raises:
        ConfigError: `cache_dir` cannot be used.
    """
    folder = None
    if config.cache_dir is not None and config.cache_disk_bytes:
        folder = SnapshotFolder(config.cache_dir, model.config, STATE_DTYPES[config.state_dtype])
    device_bytes = _device_bytes(model.device, config)
    cache = PrefixCache(
        model.device,
        ram_bytes=config.cache_bytes,
        device_bytes=device_bytes,
        folder=folder,
        disk_bytes=config.cache_disk_bytes,
    )
    cache.prepare(pool.snapshot(0))
    # A quarter of what the cache may have in the same memory.
    nearby = device_bytes if model.device.type == "cuda" else config.cache_bytes
    return SnapshotKeeper(cache, pool, nearby // 4)


def _device_bytes(device: torch.device, config: EngineConfig) -> int:
    """Return the bound of the tier in a GPU's memory: as said, or a small share of what is free."""
    wanted = config.cache_device_bytes
    if wanted is not None:
        return wanted
    if device.type != "cuda" or not config.cache_bytes:
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return min(_AUTO_DEVICE_BYTES, int(_AUTO_DEVICE_SHARE * free))
