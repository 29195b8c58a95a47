"""Scheduler: which requests run, and what each does in the next step.

Requests are admitted strictly in order of arrival, by rows: one that needs many slots waits at the
head until they are free, and nobody overtakes it, so nobody starves. Between two decode steps all
prompts together read at most one chunk. `schedule` may run ahead of `commit`: what a step reads is
known before its tokens are. `commit` is the only place where an answer finishes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mrss_provider.backend import FinishReason
from mrss_provider.engine.logits_processors import Bias, Occurrences
from mrss_provider.engine.request import EOS_ID, EngineRequest, TokenOutput
from mrss_provider.engine.slots import SlotAllocator
from mrss_provider.engine.tail import Picked
from mrss_provider.errors import EngineError, MRSSError, QueueFullError

# The wkv kernels read a prompt in blocks of this many tokens, so a prompt that is dealt out in
# whole blocks sees the same arithmetic whoever shares the step.
PREFILL_BLOCK_LEN = 16


@dataclass(eq=False)
class Choice:
    """One answer of a running request.

    Attributes:
        slots: one a row of the mixture.
        last_token: the last one committed: what the rows read next, unless steps are under way.
        num_sampled: tokens committed.
        num_planned: tokens committed and those of steps under way.
    """

    owner: Running
    index: int
    slots: list[int]
    occurrences: Occurrences | None
    last_token: int = EOS_ID
    num_sampled: int = 0
    num_planned: int = 0

    @property
    def is_live(self) -> bool:
        """Whether the answer has neither finished nor been dropped."""
        return self in self.owner.choices

    @property
    def wants_more(self) -> bool:
        """Whether another step may be planned: a length that will be reached ends the answer."""
        return self.num_planned != self.owner.request.sampling.max_tokens


@dataclass(eq=False)
class Running:
    """A request that holds slots.

    Attributes:
        choices: the answers that have not finished.
        num_read: prompt tokens that the first answer's rows have read, or will have after the
            steps under way; the other answers' rows are copied from them when it reaches the
            prompt's length.
    """

    request: EngineRequest
    bias: Bias
    choices: list[Choice] = field(default_factory=list)
    num_read: int = 0

    @property
    def is_reading(self) -> bool:
        """Whether part of the prompt is still unread."""
        return self.num_read < len(self.request.prompt)


@dataclass(frozen=True)
class Chunk:
    """A piece of a prompt, `prompt[start : start + length]`, for the rows of `running`."""

    running: Running
    start: int
    length: int

    @property
    def is_first(self) -> bool:
        """Whether the rows must take their initial states before it."""
        return self.start == 0

    @property
    def is_last(self) -> bool:
        """Whether the first token is sampled after it."""
        return self.start + self.length == len(self.running.request.prompt)


@dataclass(frozen=True)
class Batch:
    """What one step does: a token for each answer of `decoding`, and prompt `chunks`.

    Attributes:
        sampling: the answers that get a token: those that decode, then those whose prompt ends.
    """

    decoding: list[Choice]
    chunks: list[Chunk]
    sampling: list[Choice]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.decoding or self.chunks)


class Scheduler:
    """Owns the queue, the running requests and their slots."""

    def __init__(
        self,
        *,
        max_rows: int,
        max_queued: int,
        prefill_chunk_len: int,
        prefill_alone_len: int | None = None,
    ) -> None:
        """Start empty.

        Args:
            max_rows: slots.
            max_queued: requests that may wait for them.
            prefill_chunk_len: tokens that all rows of all prompts read together in a step beside
                decoding rows; at least a block a step whatever it says.
            prefill_alone_len: tokens that each row reads in a step while nothing decodes; None is
                `prefill_chunk_len`.
        """
        self._slots = SlotAllocator(max_rows)
        self._max_queued = max_queued
        self._chunk_len = prefill_chunk_len
        self._alone_len = prefill_alone_len or prefill_chunk_len
        self._waiting: deque[EngineRequest] = deque()
        self._running: dict[str, Running] = {}
        # Whose turn it is to read: those that have just read go to the end.
        self._reading: deque[Running] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests without slots."""
        return len(self._waiting)

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
        return bool(self._waiting or self._running)

    def add(self, request: EngineRequest) -> None:
        """Queue a request, and admit it at once if its slots are free and nobody is before it.

        Raises:
            QueueFullError: it would have to wait, and as many as allowed wait already.
        """
        known = self._running.keys() | {waiting.id for waiting in self._waiting}
        assert request.id not in known, f"request id {request.id!r} is in use"
        must_wait = bool(self._waiting) or request.rows > self._slots.num_free
        if must_wait and len(self._waiting) >= self._max_queued:
            raise QueueFullError(
                f"the engine is full: {len(self._waiting)} requests wait (max_queued "
                f"{self._max_queued}) and {self._slots.num_free} rows are free of the "
                f"{request.rows} that this one needs; try again later"
            )
        self._waiting.append(request)
        self._admit()

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one of its answers; its slots are free for the next step.

        An id or index that is not (or no longer) known is no error: it may just have finished.
        """
        running = self._running.get(request_id)
        if running is None:
            self._waiting = deque(r for r in self._waiting if r.id != request_id)
        else:
            for choice in list(running.choices):
                if index is None or choice.index == index:
                    self._finish(choice)
        self._admit()

    def schedule(self) -> Batch:
        """Return what the next step does, and count on it: the step after is planned from there.

        Empty if there is nothing to do before a step under way is committed.
        """
        decoding = [
            choice
            for running in self._running.values()
            if not running.is_reading
            for choice in running.choices
            if choice.wants_more
        ]
        chunks = self._deal_chunks(alone=not decoding)
        ended = [choice for chunk in chunks if chunk.is_last for choice in chunk.running.choices]
        sampling = decoding + ended
        for choice in sampling:
            choice.num_planned += 1
        return Batch(decoding, chunks, sampling)

    def commit(self, batch: Batch, picked: Sequence[Picked]) -> list[TokenOutput]:
        """Take in a step's tokens (one each for `batch.sampling`); finish what is done."""
        outputs: list[TokenOutput] = []
        for choice, token in zip(batch.sampling, picked, strict=True):
            if not choice.is_live:
                continue
            if token.token_id is None:
                request_id = choice.owner.request.id
                error = EngineError(
                    f"the model gave numbers that are not finite after "
                    f"{choice.num_sampled} tokens of request {request_id!r}; "
                    f"check the state files with `mrss states check`"
                )
                outputs += self._fail(choice.owner, error)
            else:
                outputs.append(self._push(choice, token.token_id, token))
        self._admit()
        return outputs

    def fail(self, batch: Batch, error: MRSSError) -> list[TokenOutput]:
        """End every request that had a part in a step that could not be run."""
        owners = [choice.owner for choice in batch.decoding]
        owners += [chunk.running for chunk in batch.chunks]
        outputs: list[TokenOutput] = []
        for running in dict.fromkeys(owners):
            outputs += self._fail(running, error)
        self._admit()
        return outputs

    def _admit(self) -> None:
        while self._waiting:
            request = self._waiting[0]
            slots = self._slots.allocate(request.rows)
            if slots is None:
                return
            self._waiting.popleft()
            running = Running(request, Bias(request.sampling))
            rows = request.mixture.rows
            for index in range(request.n):
                own = slots[index * rows : (index + 1) * rows]
                running.choices.append(Choice(running, index, own, _occurrences(request)))
            self._running[request.id] = running
            self._reading.append(running)

    def _deal_chunks(self, *, alone: bool) -> list[Chunk]:
        """Deal prompt tokens to those that read: one chunk for all, or each one if `alone`."""
        unread = [len(r.request.prompt) - r.num_read for r in self._reading]
        if alone:
            lengths = [deal([left], self._alone_len)[0] for left in unread]
        else:
            rows = [running.request.mixture.rows for running in self._reading]
            lengths = deal(unread, self._chunk_len, rows)
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
        sampling = choice.owner.request.sampling
        choice.last_token = token_id
        choice.num_sampled += 1
        reason: FinishReason | None = None
        if token_id == EOS_ID and not sampling.ignore_eos:
            reason = "stop"
        elif choice.num_sampled == sampling.max_tokens:
            reason = "length"
        if reason is not None:
            self._finish(choice)
        elif choice.occurrences is not None:
            choice.occurrences.push(token_id)
        return TokenOutput(
            choice.owner.request.id, choice.index, token_id, token.logprob, token.top, reason
        )

    def _fail(self, running: Running, error: MRSSError) -> list[TokenOutput]:
        outputs = [
            TokenOutput(running.request.id, choice.index, None, error=error)
            for choice in running.choices
        ]
        for choice in list(running.choices):
            self._finish(choice)
        return outputs

    def _finish(self, choice: Choice) -> None:
        running = choice.owner
        running.choices.remove(choice)
        if running.is_reading and running.choices and choice.index < running.choices[0].index:
            # The next answer takes over the rows that have read part of the prompt.
            heir = running.choices[0]
            choice.slots, heir.slots = heir.slots, choice.slots
        self._slots.free(choice.slots)
        if not running.choices:
            del self._running[running.request.id]
            if running in self._reading:
                self._reading.remove(running)


def deal(unread: Sequence[int], budget: int, rows: Sequence[int] | None = None) -> list[int]:
    """Deal `budget` tokens to prompts with so many `unread` tokens, block by block in turn.

    A share is a whole number of blocks or all that is left, unless the budget is below a block. A
    prompt that `rows` rows read costs as many times its share; the first one gets a block even if
    that is more than the budget.
    """
    lengths = [0] * len(unread)
    block_len = min(PREFILL_BLOCK_LEN, budget)
    costs = rows or [1] * len(unread)
    dealt = True
    while dealt:
        dealt = False
        for i, left in enumerate(unread):
            share = min(left - lengths[i], block_len)
            if share > 0 and (share * costs[i] <= budget or not any(lengths)):
                lengths[i] += share
                budget -= share * costs[i]
                dealt = True
    return lengths


def _occurrences(request: EngineRequest) -> Occurrences | None:
    sampling = request.sampling
    return Occurrences(request.prompt, sampling) if sampling.has_penalties else None
