"""Scheduler: which requests run, and what each does in the next step.

Requests are admitted by rows, in order of arrival, the requests of several owners in turns: one
that needs many slots waits at the head until they are free, and nobody else of its owner overtakes
it, so nobody starves. Between two decode steps all prompts, and the rows that wake, read at most
one chunk together. `schedule` may run ahead of
`commit`: what a step reads is known before its tokens are. `commit` is the only place where an
answer finishes.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Collection, Sequence

from mrss_provider.engine.batch import Batch, CatchUp, Choice, Chunk, Running
from mrss_provider.engine.dealing import PREFILL_BLOCK_LEN, deal, deal_alone, deal_beside
from mrss_provider.engine.fair import Turns, WaitingRequests
from mrss_provider.engine.lazy_rows import LazyPolicy, make_lazy_rows
from mrss_provider.engine.logits_processors import Bias, Occurrences
from mrss_provider.engine.prompt_reader import PromptNotes
from mrss_provider.engine.recovery import LostAnswers, not_begun, not_finite, parties, split
from mrss_provider.engine.request import EngineRequest, TokenOutput
from mrss_provider.engine.slots import SlotAllocator
from mrss_provider.engine.snapshots import SnapshotKeeper
from mrss_provider.engine.tail import Picked
from mrss_provider.errors import MRSSError, QueueFullError


class Scheduler:
    """Owns the queue, the running requests and their slots.

    Attributes:
        num_started: requests that got slots, since the start.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_queued: int,
        prefill_chunk_len: int,
        prefill_alone_len: int | None = None,
        lazy: LazyPolicy | None = None,
        keeper: SnapshotKeeper | None = None,
    ) -> None:
        """Start empty.

        Args:
            max_rows: slots.
            max_queued: requests that may wait for them.
            prefill_chunk_len: tokens that all rows of all prompts read together in a step beside
                decoding rows; at least a block a step whatever it says.
            prefill_alone_len: tokens that each row reads in a step while nothing decodes; None is
                `prefill_chunk_len`.
            lazy: when rows may sleep; None is never.
            keeper: of states, from which prompts begin where they have been read before.
        """
        self._slots = SlotAllocator(max_rows)
        self._lazy = lazy
        self._keeper = keeper
        self._max_queued = max_queued
        self._chunk_len = prefill_chunk_len
        self._alone_len = prefill_alone_len or prefill_chunk_len
        self._waiting = WaitingRequests()
        self._running: dict[str, Running] = {}
        # Whose turn it is to read: those that have just read go to the end.
        self._reading: deque[Running] = deque()
        # Whose rows take the states of before in the next step.
        self._resumed: list[Choice] = []
        self._lost = LostAnswers()
        # Those that have waited for rows and could not begin, and why.
        self._unbegun: list[tuple[EngineRequest, Exception]] = []
        self._turns = Turns()
        self.num_started = 0

    @property
    def num_waiting(self) -> int:
        """Requests without slots."""
        return len(self._waiting)

    def num_before(self, owner: str) -> int:
        """Return about how many requests will get slots before one that `owner` adds now."""
        return self._waiting.num_before(owner)

    @property
    def num_running(self) -> int:
        """Requests with slots."""
        return len(self._running)

    @property
    def num_free_rows(self) -> int:
        """Slots that nobody holds."""
        return self._slots.num_free

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running or self._unbegun)

    def add(self, request: EngineRequest) -> None:
        """Queue a request, and admit it at once if its slots are free and nobody is before it.

        Raises:
            QueueFullError: it would have to wait, and as many as allowed wait already.
            Exception: it cannot begin.
        """
        is_known = request.id in self._running or request.id in self._waiting
        assert not is_known, f"request id {request.id!r} is in use"
        must_wait = bool(self._waiting) or request.rows > self._slots.num_free
        is_full = len(self._waiting) >= self._max_queued
        # Whoever fills the queue does not keep others out of it.
        has_place = bool(self._waiting) and not self._waiting.num_of(request.owner)
        if must_wait and is_full and not has_place:
            raise QueueFullError(
                f"the engine is full: {len(self._waiting)} requests wait (max_queued "
                f"{self._max_queued}) and {self._slots.num_free} rows are free of the "
                f"{request.rows} that this one needs; try again later"
            )
        self._waiting.append(request)
        self._admit()
        if self._unbegun and self._unbegun[-1][0] is request:
            raise self._unbegun.pop()[1]

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one of its answers; its slots are free for the next step.

        An id or index that is not (or no longer) known is no error: it may just have finished.
        """
        running = self._running.get(request_id)
        if running is None:
            self._waiting.remove(request_id)
        else:
            for choice in list(running.choices):
                if index is None or choice.index == index:
                    self._finish(choice, is_aborted=True)
        self._admit()

    def schedule(self) -> Batch:
        """Return what the next step does, and count on it: the step after is planned from there.

        Empty if there is nothing to do before a step under way is committed.
        """
        settled: Collection[Running] = self._running.values()
        if self._reading:
            settled = [running for running in settled if not running.is_reading]
        wanting = [choice for each in settled for choice in each.choices if choice.wants_more]
        for choice in wanting:
            # What is heard is known when the step is launched.
            if not (choice.is_steady or choice.is_heard):
                choice.look(choice.num_planned)
        decoding, catching_up = self._deal_catch_ups(wanting)
        spent = sum(piece.stop - piece.start for piece in catching_up)
        chunks = self._deal_chunks(alone=not wanting, spent=spent)
        rereading = self._lost.deal(self._chunk_len if wanting else self._alone_len)
        begun = [c for chunk in chunks if chunk.gives_token for c in chunk.running.choices]
        sampling = decoding + begun
        for choice in sampling:
            choice.num_planned += 1
        resumed = [choice for choice in self._resumed if choice.is_live]
        self._resumed = []
        return Batch(decoding, chunks, sampling, catching_up, resumed, rereading)

    def commit(self, batch: Batch, picked: Sequence[Picked]) -> list[TokenOutput]:
        """Take in a step's tokens (one each for `batch.sampling`); finish what is done."""
        outputs: list[TokenOutput] = []
        for choice, token in zip(batch.sampling, picked, strict=True):
            if not choice.is_live:
                continue
            if token.token_id is None or not choice.owner.notes.is_finite:
                outputs += self._fail(choice.owner, token.error or not_finite(choice))
            else:
                outputs.append(self._push(choice, token.token_id, token))
        for chunk in batch.chunks:
            if chunk.is_last and not chunk.gives_token:
                outputs += self._end_reading(chunk.running)
        self._admit()
        return outputs

    def fail(self, batch: Batch, error: MRSSError) -> list[TokenOutput]:
        """End every request that had a part in a step that could not be run."""
        outputs = [out for running in parties(batch) for out in self._fail(running, error)]
        self._admit()
        return outputs

    def shed(self, batch: Batch, error: MRSSError) -> list[TokenOutput]:
        """End the newer half of the requests of a step that failed; the others begin anew.

        Nothing else is under way.
        """
        kept, shed = split(self._running.values(), parties(batch))
        outputs = [out for running in shed for out in self._fail(running, error)]
        for running in kept:
            self._begin_anew(running)
        self._admit()
        return outputs

    def take_unbegun(self) -> list[TokenOutput]:
        """Return the errors of requests that had waited for slots and could not begin, once."""
        unbegun, self._unbegun = self._unbegun, []
        return [output for request, exc in unbegun for output in not_begun(request, exc)]

    def _admit(self) -> None:
        while self._waiting:
            request = self._waiting.head()
            slots = self._slots.allocate(request.rows)
            if slots is None:
                return
            self._waiting.take()
            try:
                running = self._with_slots(request, slots)
            except Exception as exc:
                # Whoever has just made room for it has nothing to do with that.
                self._slots.free(slots)
                self._unbegun.append((request, exc))
                continue
            self.num_started += 1
            self._running[request.id] = running
            if running.is_reading:
                self._reading.append(running)
            else:
                self._resume(running)

    def _with_slots(self, request: EngineRequest, slots: Sequence[int]) -> Running:
        running = Running(request, Bias(request.sampling))
        self._begin(running)
        rows = request.mixture.rows
        for index in range(request.n):
            own = list(slots[index * rows : (index + 1) * rows])
            lazy = make_lazy_rows(request, self._lazy)
            running.choices.append(Choice(running, index, own, _occurrences(request), lazy))
        return running

    def _begin(self, running: Running) -> None:
        """Decide where a request's rows begin."""
        start = running.request.start
        if start is not None:
            running.rows, running.num_cached = start.rows, start.num_read
            running.evidence += [] if start.evidence is None else [start.evidence]
        elif self._keeper is not None:
            restored = self._keeper.find(running.request)
            if restored is not None:
                running.rows, running.num_cached = restored.rows, restored.length
            running.parting = self._keeper.parting(running.request, running.num_cached)
        running.num_read = running.num_cached

    def _begin_anew(self, running: Running) -> None:
        """Let a request whose rows' states are lost read what they had read."""
        if any(choice.num_sampled for choice in running.choices):
            for choice in running.choices:
                self._lost.add(choice)
            return
        for choice in running.choices:
            choice.num_planned = choice.num_launched = 0
        running.evidence.clear()
        running.notes = PromptNotes()
        running.rows, running.num_cached = None, 0
        self._begin(running)
        if running not in self._reading:
            self._reading.append(running)

    def _resume(self, running: Running) -> None:
        """Let the one answer of a request go on that has read its prompt already."""
        start = running.request.start
        assert start is not None
        (choice,) = running.choices
        choice.take_up(start.answer)
        self._resumed.append(choice)

    def _deal_catch_ups(self, wanting: Sequence[Choice]) -> tuple[list[Choice], list[CatchUp]]:
        """Deal what rows that wake have missed, within one chunk; whole blocks but for the last.

        Returns:
            The answers that can decode after it, and the pieces.
        """
        if all(choice.lazy is None for choice in wanting):
            return list(wanting), []
        ready: list[Choice] = []
        pieces: list[CatchUp] = []
        budget = self._chunk_len
        for choice in wanting:
            lazy = choice.lazy
            if lazy is None:
                ready.append(choice)
                continue
            for row, start, stop in lazy.missed(choice.num_planned):
                # Somebody gets a block whatever the budget is, and nobody less than one.
                room = budget if pieces else max(budget, PREFILL_BLOCK_LEN)
                if room >= PREFILL_BLOCK_LEN:
                    (length,) = deal([stop - start], room)
                    pieces.append(CatchUp(choice, row, start, start + length))
                    lazy.has_read(row, start + length)
                    budget -= length
            if not lazy.missed(choice.num_planned):
                lazy.decode(choice.num_planned)
                ready.append(choice)
        return ready, pieces

    def _deal_chunks(self, *, alone: bool, spent: int = 0) -> list[Chunk]:
        """Deal prompt tokens to those that read: one chunk for all, or each one if `alone`.

        At least a block is dealt, whatever was `spent` of the chunk.
        """
        unread = [running.num_unread for running in self._reading]
        owners = [running.request.owner for running in self._reading]
        if alone:
            lengths = deal_alone(owners, unread, self._alone_len)
        else:
            rows = [running.request.mixture.rows for running in self._reading]
            budget = max(self._chunk_len - spent, min(self._chunk_len, PREFILL_BLOCK_LEN))
            lengths = deal_beside(self._turns, owners, unread, rows, budget)
        chunks = [
            Chunk(running, running.num_read, length)
            for running, length in zip(self._reading, lengths, strict=True)
            if length
        ]
        for chunk in chunks:
            chunk.running.num_read += chunk.length
            self._reading.remove(chunk.running)
            if chunk.running.is_reading:
                self._reading.append(chunk.running)
        return chunks

    def _push(self, choice: Choice, token_id: int, token: Picked) -> TokenOutput:
        request = choice.owner.request
        reason = choice.append(token_id)
        if reason is not None:
            self._finish(choice)
        else:
            _remember(choice, token_id, token)
            is_due = choice.num_sampled >= choice.keep_at or token_id in request.pauses
            if is_due and self._keeper is not None:
                self._keeper.grew(choice)
        # By position, which costs less than by name: this is done for every token.
        output = TokenOutput(request.id, choice.index, token_id, token.logprob, token.top, reason)
        output.trace, output.num_cached = token.trace, choice.owner.num_cached
        if choice.num_sampled == 1 and request.is_read_whole:
            output.reading = choice.owner.notes.reading()
        return output

    def _end_reading(self, running: Running) -> list[TokenOutput]:
        """End a request that wants no token, its prompt being read."""
        request = running.request
        reading = running.notes.reading() if request.is_read_whole else None
        if running.choices and not running.notes.is_finite:
            return self._fail(running, not_finite(running.choices[0]))
        cached = running.num_cached
        ended = functools.partial(TokenOutput, finish_reason="length", num_cached=cached)
        outputs = [ended(request.id, x.index, None, reading=reading) for x in running.choices]
        for choice in list(running.choices):
            self._finish(choice)
        return outputs

    def _fail(self, running: Running, error: MRSSError) -> list[TokenOutput]:
        outputs = [
            TokenOutput(running.request.id, choice.index, None, error=error)
            for choice in running.choices
        ]
        for choice in list(running.choices):
            self._finish(choice, has_failed=True)
        return outputs

    def _finish(
        self, choice: Choice, *, is_aborted: bool = False, has_failed: bool = False
    ) -> None:
        running = choice.owner
        running.choices.remove(choice)
        choice.is_live = False
        if self._keeper is not None:
            is_lost = has_failed or choice.num_reread is not None
            self._keeper.ended(choice, is_aborted=is_aborted, has_failed=is_lost)
        max_tokens = running.request.sampling.max_tokens
        assert max_tokens is not None
        self._waiting.settle(running.request, max_tokens - choice.num_sampled)
        if running.is_reading and running.choices and choice.index < running.choices[0].index:
            # The next answer takes over the rows that have read part of the prompt.
            heir = running.choices[0]
            choice.slots, heir.slots = heir.slots, choice.slots
        self._slots.free(choice.slots)
        if not running.choices:
            del self._running[running.request.id]
            if running in self._reading:
                self._reading.remove(running)


def _remember(choice: Choice, token_id: int, token: Picked) -> None:
    """Note what the answer's next tokens depend on."""
    if choice.occurrences is not None:
        choice.occurrences.push(token_id)
    if choice.lazy is not None:
        choice.lazy.commit(token_id, token.loudest)
    if token.row_log_probs is not None:
        choice.own_evidence.append(token.row_log_probs)


def _occurrences(request: EngineRequest) -> Occurrences | None:
    sampling = request.sampling
    return Occurrences(request.prompt, sampling) if sampling.has_penalties else None
