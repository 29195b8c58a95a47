"""DeviceRunner: steps that stay on the device, from token ids to token ids, one step ahead.

A decode step is one replay of a CUDA graph: model, head, gate, merge, penalties, draw, and the
drawn tokens where the next step reads them. The host launches step n + 1 and then looks at the
tokens of step n, which have been copied to pinned memory. A step that also reads prompts is one
pass over the weights for all its rows, and the same tail.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from mrss_kernels.tail_tensors import TailOutputs
from torch import Tensor

from mrss_provider.config import EngineConfig
from mrss_provider.engine.batch import Batch, Choice, Running
from mrss_provider.engine.constraint import MaskWorkers
from mrss_provider.engine.model_runner import ModelRunner
from mrss_provider.engine.sampler import rank_tokens
from mrss_provider.engine.step_graphs import StepGraphs
from mrss_provider.engine.step_runner import PendingTokens, ReadyTokens, run_step
from mrss_provider.engine.tail import Picked
from mrss_provider.engine.tail_lane import Seat, TailFlags, is_fused
from mrss_provider.engine.tail_layout import TailLayout
from mrss_provider.model.cuda_graphs import BUCKETS, row_bucket

if TYPE_CHECKING:
    from mrss_provider.model import Model, StatePool

log = logging.getLogger(__name__)

Tail = Callable[..., None]
"""`mrss_kernels.tail.launch_tail`, or a stand-in with its signature."""


@dataclass(frozen=True)
class _Received:
    """Host memory that a step's tokens arrive in."""

    ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class _Wanted:
    """Places of the answers that want log-probabilities, and of those that want top tokens too."""

    log_probs: list[int]
    top: list[int]

    @classmethod
    def of(cls, batch: Batch) -> _Wanted:
        """Look at the answers of a step."""
        samplings = [choice.owner.request.sampling for choice in batch.sampling]
        log_probs = [g for g, sampling in enumerate(samplings) if sampling.logprobs]
        return cls(log_probs, [g for g in log_probs if samplings[g].top_logprobs])


@dataclass(frozen=True)
class _TopTokens:
    """The likeliest tokens of the answers that want them: each [n, M], likeliest first."""

    places: list[int]
    values: Tensor
    ids: Tensor


class DeviceRunner:
    """Runs batches on the device that the model is on."""

    max_ahead = 1

    def __init__(
        self, model: Model, config: EngineConfig, banned_ids: Tensor, *, tail: Tail
    ) -> None:
        """Allocate states, rows and everything that a step reads or writes.

        Args:
            model: what computes; its decode step launches kernels only.
            config: `max_rows` and `max_states` say how much is allocated.
            banned_ids: int64 [M] on the model's device, ids that no request may get.
            tail: what turns logits into tokens.
        """
        self._model = model
        self._banned_ids = banned_ids
        self._tail = tail
        self._device = model.device
        self._is_cuda = model.device.type == "cuda"
        # Not `Model.decode`, which replays graphs of its own.
        self._advance = model.decode if model.fused is None else model.fused.decode
        self._rows = ModelRunner(model, config.max_rows, banned_ids)
        self._layout = TailLayout(
            config.max_rows, config.max_states + 1, model.config.vocab_size, banned_ids
        )
        self._masks = MaskWorkers()
        self._graphs = StepGraphs(model.device, self._layout.all_padding)
        # The answers of the last step, if another one of them is the same but for the tokens.
        self._steady: list[Choice] = []
        self._wanted = _Wanted([], [])
        # One a step under way, and one that is being read.
        self._received = itertools.cycle(
            [
                _Received(
                    torch.zeros(config.max_rows, dtype=torch.int64, pin_memory=self._is_cuda),
                    torch.zeros(config.max_rows, pin_memory=self._is_cuda),
                )
                for _ in range(self.max_ahead + 2)
            ]
        )

    @property
    def pool(self) -> StatePool:
        """The states of all rows."""
        return self._rows.pool

    def needs_tokens(self, batch: Batch) -> bool:
        """Tell whether the host must know all tokens so far.

        It must if torch picks the batch's tokens or has picked its last ones, or if rows wake.
        """
        if self._is_repeated(batch):
            return False
        is_known = not batch.catching_up and all(self._layout.knows(c) for c in batch.decoding)
        return not (is_known and _is_fused(batch))

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingTokens:
        """Begin a step; it is queued behind those under way."""
        if self._is_repeated(batch):
            self._decode(self._layout.num_rows, self._layout.flags)
            return self._receive(batch)
        self._steady = []
        if not _is_fused(batch):
            self._layout.forget()
            return ReadyTokens(run_step(self._rows, batch, self._banned_ids, self._masks))
        self._rows.catch_up(batch.catching_up)
        self._rows.begin(batch)
        scored = self._rows.score(batch.chunks)
        batch.look()
        seats, num_rows = _seats(batch)
        if self._layout.arrange(seats):
            self._graphs.clear()
        flags = self._layout.flags
        if not batch.chunks:
            if seats:
                self._decode(num_rows, flags)
        else:
            hidden = self._read(batch, scored)
            if seats:
                self._pick(self._model.head(hidden), flags, len(seats))
        self._wanted = _Wanted.of(batch)
        if not batch.chunks and all(choice.is_steady for choice in batch.decoding):
            self._steady = batch.decoding
        return self._receive(batch)

    def forget(self) -> None:
        """Know nothing of the answers any more: the next step uploads what it needs of them."""
        self._steady = []
        self._layout.forget()

    def _is_repeated(self, batch: Batch) -> bool:
        """Tell whether a batch is the last one again, so that nothing need be arranged."""
        is_more = bool(batch.chunks or batch.catching_up or batch.rereading)
        is_decoding = bool(batch.decoding) and not is_more
        return is_decoding and batch.decoding == self._steady

    def _decode(self, num_rows: int, flags: TailFlags) -> None:
        """Advance every row by its next token, and pick each answer's next one."""
        if not self._is_cuda or num_rows > BUCKETS[-1]:
            _, step = self._step(num_rows, flags)
            step()
            return
        bucket = min(row_bucket(num_rows), len(self._layout.slots))
        self._graphs.run(*self._step(bucket, flags))

    def _step(self, bucket: int, flags: TailFlags) -> tuple[Hashable, Callable[[], None]]:
        """Return a decode step of `bucket` rows, and the key of its graph."""

        def step() -> None:
            token_ids, slots = self._layout.token_ids[:bucket], self._layout.slots[:bucket]
            hidden = self._advance(token_ids, slots, self._rows.pool)
            self._pick(self._model.head(hidden), flags, bucket)

        return (bucket, flags, self._rows.pool.has_offsets), step

    @torch.inference_mode()
    def prepare(self, max_rows: int) -> None:
        """Compile and capture the steps of up to `max_rows` rows, before anybody waits for them.

        Others are captured when they are first met, which takes seconds where their kernels are not
        in Triton's cache yet.
        """
        alone = TailFlags(truncate=True, mixed=False, gated=False)
        together = TailFlags(truncate=True, mixed=True, gated=True)
        wanted = [rows for rows in BUCKETS if rows <= min(max_rows, len(self._layout.slots))]
        for done, rows in enumerate(wanted):
            log.info("preparing decode steps: %d of %d", done, len(wanted))
            for flags in (alone, together) if rows > 1 else (alone,):
                self._graphs.prepare(*self._step(rows, flags))

    @torch.inference_mode()
    def replay(self) -> None:
        """Do the last decode step again, for measurements: its answers get one more token."""
        self._decode(self._layout.num_rows, self._layout.flags)

    def _pick(self, logits: Tensor, flags: TailFlags, num_groups: int) -> None:
        self._tail(
            logits,
            self._layout.inputs,
            self._layout.outputs,
            truncate=flags.truncate,
            mixed=flags.mixed,
            gated=flags.gated,
            num_groups=num_groups,
        )

    def _read(self, batch: Batch, scored: Mapping[Running, Tensor]) -> Tensor:
        """Read prompt chunks, and the next token of each decoding row in the same pass.

        Args:
            batch: the step.
            scored: what `ModelRunner.score` has read of it.

        Returns:
            Hidden states of the rows that a token is picked from, in the order of the seats.
        """
        slots = [slot for choice in batch.decoding for slot in choice.active_slots]
        token_ids = self._layout.token_ids[: len(slots)]
        return self._rows.read_beside(batch.chunks, scored, token_ids, slots)

    def _receive(self, batch: Batch) -> PendingTokens:
        """Ask for the step's tokens, and mark the moment when they have arrived."""
        count = len(batch.sampling)
        outputs = self._layout.outputs
        # First, as it may fail: a step that does takes no memory from those under way.
        top = self._likeliest(batch, outputs)
        received = next(self._received)
        received.ids[:count].copy_(outputs.ids[:count], non_blocking=True)
        if self._wanted.log_probs:
            received.log_probs[:count].copy_(outputs.log_probs[:count], non_blocking=True)
        arrived = None
        if self._is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return _PendingStep(batch, received, self._wanted, top, arrived)

    def _likeliest(self, batch: Batch, outputs: TailOutputs) -> _TopTokens | None:
        """Rank the tokens of the answers that want the likeliest ones reported."""
        places = self._wanted.top
        if not places:
            return None
        samplings = [batch.sampling[g].owner.request.sampling for g in places]
        most = max(sampling.top_logprobs or 0 for sampling in samplings)
        index = torch.tensor(places, pin_memory=self._is_cuda).to(self._device, non_blocking=True)
        log_probs = outputs.merged.index_select(0, index).log_softmax(-1)
        values, ids = rank_tokens(log_probs, most)
        return _TopTokens(places, _to_host(values), _to_host(ids))


@dataclass(frozen=True)
class _PendingStep:
    """A step whose tokens are on their way to the host."""

    batch: Batch
    received: _Received
    wanted: _Wanted
    top: _TopTokens | None
    arrived: torch.cuda.Event | None

    def picked(self) -> list[Picked]:
        """Wait for the step; return one for each answer of `Batch.sampling`."""
        if self.arrived is not None:
            self.arrived.synchronize()
        count = len(self.batch.sampling)
        ids: list[int] = self.received.ids[:count].tolist()
        picked = [Picked(token if token >= 0 else None) for token in ids]
        if not self.wanted.log_probs:
            return picked
        log_probs: list[float] = self.received.log_probs[:count].tolist()
        for g in self.wanted.log_probs:
            if ids[g] >= 0:
                picked[g] = Picked(ids[g], log_probs[g])
        if self.top is not None:
            for n, g in enumerate(self.top.places):
                if ids[g] >= 0:
                    picked[g] = Picked(ids[g], log_probs[g], self._top_of(n, g))
        return picked

    def _top_of(self, n: int, g: int) -> tuple[tuple[int, float], ...]:
        assert self.top is not None
        count = self.batch.sampling[g].owner.request.sampling.top_logprobs or 0
        best = zip(self.top.ids[n].tolist(), self.top.values[n].tolist(), strict=True)
        return tuple((i, value) for i, value in best if value > -torch.inf)[:count]


def _is_fused(batch: Batch) -> bool:
    """Tell whether the tail's kernels know every merge rule and gate of a batch."""
    return all(is_fused(choice) for choice in batch.sampling)


def _seats(batch: Batch) -> tuple[list[Seat], int]:
    """Return the answers' places in the step, and its rows of logits."""
    seats: list[Seat] = []
    row = 0
    for choice in batch.decoding:
        slots = tuple(choice.active_slots)
        seats.append(Seat(choice, row, slots))
        row += len(slots)
    for chunk in batch.chunks:
        if chunk.gives_token:
            choices = [c for c in batch.sampling if c.owner is chunk.running]
            seats += [Seat(choice, row, tuple(choice.slots)) for choice in choices]
            row += chunk.running.request.mixture.rows
    return seats, row


def _to_host(tensor: Tensor) -> Tensor:
    """Copy to host memory, not waiting for it on CUDA."""
    if tensor.device.type == "cpu":
        return tensor
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return out.copy_(tensor, non_blocking=True)
