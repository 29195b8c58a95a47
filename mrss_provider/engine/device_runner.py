"""DeviceRunner: steps that stay on the device, from token ids to token ids, one step ahead.

A decode step is one replay of a CUDA graph: model, head, gate, merge, penalties, draw, and the
drawn tokens where the next step reads them. The host launches step n + 1 and then looks at the
tokens of step n, which have been copied to pinned memory. A step that also reads prompts is one
pass over the weights for all its rows, and the same tail.

What a grammar leaves of an answer depends on its last token. A step with such an answer has two
halves: the model's is launched like any other; the head and the tail are when the host has seen the
tokens before and has found the masks, while the device is busy with the first half.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from mrss_kernels.tail_tensors import TailOutputs
from torch import Tensor

from mrss_provider.config import EngineConfig
from mrss_provider.engine.batch import Batch, Choice, Running
from mrss_provider.engine.constraint import AllowedTokens, MaskWorkers
from mrss_provider.engine.model_runner import ModelRunner
from mrss_provider.engine.pending_step import (
    PendingStep,
    Received,
    TopTokens,
    WaitingStep,
    Wanted,
    to_host,
)
from mrss_provider.engine.sampler import rank_tokens
from mrss_provider.engine.step_graphs import StepGraphs
from mrss_provider.engine.step_runner import PendingTokens, ReadyTokens, run_step
from mrss_provider.engine.tail_lane import Seat, TailFlags, is_fused
from mrss_provider.engine.tail_layout import TailLayout
from mrss_provider.errors import MRSSError
from mrss_provider.model.cuda_graphs import BUCKETS, row_bucket

if TYPE_CHECKING:
    from mrss_provider.model import Model, StatePool

log = logging.getLogger(__name__)

Tail = Callable[..., None]
"""`mrss_kernels.tail.launch_tail`, or a stand-in with its signature."""

MAX_SINGLE_ROWS = 9
"""Rows up to which a step with one mixture alone is prepared: eight states and the base."""

Part = Callable[[int], tuple[Hashable, Callable[[], None]]]
"""Of a decode step, by how many rows it has: the key of its graph, and what launches it."""


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
        self._fused = model.fused
        self._rows = ModelRunner(model, config.max_rows, banned_ids)
        self._layout = TailLayout(
            config.max_rows, config.max_states + 1, model.config.vocab_size, banned_ids
        )
        self._masks = MaskWorkers()
        self._graphs = StepGraphs(model.device, self._layout.all_padding)
        # The answers of the last step, if another one of them is the same but for the tokens.
        self._steady: list[Choice] = []
        self._wanted = Wanted([], [])
        # What the first half of the last step left, if it was launched in halves: fp32 [R, C].
        self._hidden: Tensor | None = None
        # One a step under way, and one that is being read.
        self._received = itertools.cycle(
            [
                Received(
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
        is_known = not batch.catching_up and all(map(self._layout.knows, batch.decoding))
        return not (is_known and self._is_fused(batch))

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingTokens:
        """Begin a step; it is queued behind those under way, which have gone on."""
        if self._is_repeated(batch):
            return self._end(batch, self._decode(self._layout.num_rows, self._layout.flags))
        self._steady = []
        if not self._is_fused(batch):
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
        rest: Callable[[], None] | None = None
        if batch.chunks:
            hidden = self._read(batch, scored)
            if seats:
                count = max(num_rows, len(seats))
                rest = self._after(hidden, count, is_urgent=bool(batch.decoding))
        elif seats:
            rest = self._decode(num_rows, flags)
        self._wanted = Wanted.of(batch)
        if not batch.chunks and all(choice.is_steady for choice in batch.decoding):
            self._steady = batch.decoding
        return self._end(batch, rest)

    def forget(self) -> None:
        """Know nothing of the answers any more: the next step uploads what it needs of them."""
        self._steady = []
        self._layout.forget()

    def _is_fused(self, batch: Batch) -> bool:
        """Tell whether the tail's kernels know every merge rule and gate of a batch."""
        # Whose place is known has been looked at before, and is as it was if it is steady.
        knows = self._layout.knows
        return all((c.is_steady and knows(c)) or is_fused(c) for c in batch.sampling)

    def _is_repeated(self, batch: Batch) -> bool:
        """Tell whether a batch is the last one again, so that nothing need be arranged."""
        is_more = bool(batch.chunks or batch.catching_up or batch.rereading)
        is_decoding = bool(batch.decoding) and not is_more
        return is_decoding and batch.decoding == self._steady

    def _decode(self, num_rows: int, flags: TailFlags) -> Callable[[], None] | None:
        """Advance every row by its next token, and pick each answer's next one.

        Returns:
            What does the picking, where it must wait for masks.
        """
        if not flags.constrained:
            self._run(functools.partial(self._step, flags), num_rows)
            return None
        self._run(self._reading, num_rows)
        return functools.partial(self._run, functools.partial(self._picking, flags), num_rows)

    def _run(self, part: Part, num_rows: int) -> None:
        """Launch a part of a decode step: by a replay, unless it has more rows than any graph."""
        if not self._is_cuda or num_rows > BUCKETS[-1]:
            _, step = part(num_rows)
            step()
            return
        bucket = min(row_bucket(num_rows), len(self._layout.slots))
        self._graphs.run(*part(bucket))

    def _step(self, flags: TailFlags, bucket: int) -> tuple[Hashable, Callable[[], None]]:
        """Return a whole decode step of `bucket` rows, and the key of its graph."""

        def step() -> None:
            self._pick(self._logits_of_rows(bucket), flags, bucket)

        return ("step", bucket, flags, self._rows.pool.has_offsets), step

    def _reading(self, bucket: int) -> tuple[Hashable, Callable[[], None]]:
        """Return the first half of a step, which leaves what the head reads in `_hidden`."""

        def step() -> None:
            self._leave(self._advance_rows(bucket))

        return ("reading", bucket, self._rows.pool.has_offsets), step

    def _leave(self, hidden: Tensor) -> None:
        """Leave hidden states [n, C] in `_hidden`, where the graphs of second halves read them."""
        if self._hidden is None:
            # Not in a graph's own memory: a step runs once before it is captured.
            self._hidden = hidden.new_zeros(len(self._layout.slots), hidden.shape[1])
        self._hidden[: len(hidden)] = hidden

    def _after(self, hidden: Tensor, count: int, *, is_urgent: bool) -> Callable[[], None]:
        """Return what picks tokens from the hidden states of a step that reads prompts.

        Args:
            hidden: [n, C], of the rows that tokens are picked from.
            count: rows and answers, whichever are more.
            is_urgent: whether somebody decodes beside: a replay takes the host a fraction of what
                the launches do, but a graph's first use captures it.
        """
        flags = self._layout.flags
        if not is_urgent:
            return functools.partial(self._head_and_pick, hidden, flags, count)
        self._leave(hidden)
        return functools.partial(self._run, functools.partial(self._picking, flags), count)

    def _picking(self, flags: TailFlags, bucket: int) -> tuple[Hashable, Callable[[], None]]:
        """Return the second half of a step."""
        assert self._hidden is not None
        hidden = self._hidden[:bucket]
        step = functools.partial(self._head_and_pick, hidden, flags, bucket)
        return ("picking", bucket, flags), step

    def _advance_rows(self, bucket: int) -> Tensor:
        token_ids, slots = self._layout.token_ids[:bucket], self._layout.slots[:bucket]
        # Not `Model.decode` where there is another, as it replays graphs of its own.
        decoder = self._fused or self._model
        return decoder.decode(token_ids, slots, self._rows.pool)

    def _logits_of_rows(self, bucket: int) -> Tensor:
        if self._fused is None:
            return self._model.head(self._advance_rows(bucket))
        token_ids, slots = self._layout.token_ids[:bucket], self._layout.slots[:bucket]
        return self._fused.decode_logits(token_ids, slots, self._rows.pool)

    def _end(self, batch: Batch, rest: Callable[[], None] | None) -> PendingTokens:
        """Launch what is left of a step, or let it wait for the masks of its answers."""
        if rest is not None and self._layout.flags.constrained:
            pick = functools.partial(self._pick_allowed, batch, self._wanted, rest)
            return WaitingStep(pick)
        if rest is not None:
            rest()
        return self._receive(batch, self._wanted)

    @torch.inference_mode()
    def _pick_allowed(
        self, batch: Batch, wanted: Wanted, rest: Callable[[], None]
    ) -> PendingTokens:
        """Launch what is left of a step, all before it being committed."""
        allowed = [choice.allowed for choice in batch.sampling]
        AllowedTokens.look_together([own for own in allowed if own is not None])
        self._layout.write_masks()
        rest()
        return self._receive(batch, wanted, _errors(allowed))

    @torch.inference_mode()
    def prepare(self, max_rows: int) -> None:
        """Compile and capture the steps of up to `max_rows` rows, before anybody waits for them.

        Others are captured when they are first met, which takes seconds where their kernels are not
        in Triton's cache yet.
        """
        wanted = [rows for rows in BUCKETS if rows <= min(max_rows, len(self._layout.slots))]
        if wanted:
            # The kernels of steps in halves; the first half leaves what second ones read.
            self._graphs.prepare(*self._reading(wanted[0]))
            flags = replace(_flags_prepared(1)[0], constrained=True)
            self._graphs.prepare(*self._picking(flags, wanted[0]))
        for done, rows in enumerate(wanted):
            log.info("preparing decode steps: %d of %d", done, len(wanted))
            for flags in _flags_prepared(rows):
                self._graphs.prepare(*self._step(flags, rows))
                # What is left of such a step where it reads prompts too.
                self._graphs.prepare(*self._picking(flags, rows))

    @torch.inference_mode()
    def replay(self) -> None:
        """Do the last decode step again, for measurements: its answers get one more token."""
        self._run(functools.partial(self._step, self._layout.flags), self._layout.num_rows)

    def _head_and_pick(self, hidden: Tensor, flags: TailFlags, num_groups: int) -> None:
        self._pick(self._model.head(hidden), flags, num_groups)

    def _pick(self, logits: Tensor, flags: TailFlags, num_groups: int) -> None:
        self._tail(
            logits,
            self._layout.inputs,
            self._layout.outputs,
            truncate=flags.truncate,
            mixed=flags.mixed,
            gated=flags.gated,
            constrained=flags.constrained,
            num_groups=1 if flags.single else num_groups,
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

    def _receive(
        self, batch: Batch, wanted: Wanted, errors: Mapping[int, MRSSError] | None = None
    ) -> PendingTokens:
        """Ask for the step's tokens, and mark the moment when they have arrived."""
        count = len(batch.sampling)
        outputs = self._layout.outputs
        # First, as it may fail: a step that does takes no memory from those under way.
        top = self._likeliest(batch, wanted, outputs)
        received = next(self._received)
        received.ids[:count].copy_(outputs.ids[:count], non_blocking=True)
        if wanted.log_probs:
            received.log_probs[:count].copy_(outputs.log_probs[:count], non_blocking=True)
        arrived = None
        if self._is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return PendingStep(batch, received, wanted, top, arrived, errors or {})

    def _likeliest(self, batch: Batch, wanted: Wanted, outputs: TailOutputs) -> TopTokens | None:
        """Rank the tokens of the answers that want the likeliest ones reported."""
        places = wanted.top
        if not places:
            return None
        samplings = [batch.sampling[g].owner.request.sampling for g in places]
        most = max(sampling.top_logprobs or 0 for sampling in samplings)
        index = torch.tensor(places, pin_memory=self._is_cuda).to(self._device, non_blocking=True)
        log_probs = outputs.merged.index_select(0, index).log_softmax(-1)
        values, ids = rank_tokens(log_probs, most)
        return TopTokens(places, to_host(values), to_host(ids))


def _flags_prepared(rows: int) -> tuple[TailFlags, ...]:
    """Return for which answers a step of so many rows is prepared: single states, and mixtures."""
    states = TailFlags(truncate=True, mixed=False, gated=False, constrained=False, single=rows == 1)
    mixtures = replace(states, mixed=True, gated=True)
    if rows == 1:
        return (states,)
    if rows <= MAX_SINGLE_ROWS:
        return states, mixtures, replace(mixtures, single=True)
    return states, mixtures


def _errors(allowed: Sequence[AllowedTokens | None]) -> dict[int, MRSSError]:
    """Return by their places what ends answers that a grammar leaves no token."""
    errors = {g: own.error for g, own in enumerate(allowed) if own is not None}
    return {g: error for g, error in errors.items() if error is not None}


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
