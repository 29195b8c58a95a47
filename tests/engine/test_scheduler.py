"""The scheduler under any sequence of arrivals, aborts and steps, against plain bookkeeping."""

from collections import Counter

import pytest
from fake_model import fake_state, mixture, request
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mrss_provider.engine.dealing import PREFILL_BLOCK_LEN, deal
from mrss_provider.engine.scheduler import Batch, Scheduler
from mrss_provider.engine.tail import Picked
from mrss_provider.errors import QueueFullError

MAX_ROWS = 8
CHUNK_LEN = 32
MIXTURES = [mixture(*[fake_state("x")] * rows) for rows in range(1, 5)]


class Answers(RuleBasedStateMachine):
    """`expected[id][index]` is how many tokens an unfinished answer has got."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(max_rows=MAX_ROWS, max_queued=3, prefill_chunk_len=CHUNK_LEN)
        self.requests = {}
        self.expected: dict[str, dict[int, int]] = {}
        self.arrived: list[str] = []
        self.started: list[str] = []
        self.count = 0
        self.under_way: list[Batch] = []

    @rule(
        rows=st.integers(1, 4),
        n=st.integers(1, 2),
        prompt_len=st.integers(1, 80),
        max_tokens=st.integers(1, 5),
        ignore_eos=st.booleans(),
    )
    def add(self, rows: int, n: int, prompt_len: int, max_tokens: int, ignore_eos: bool) -> None:
        self.count += 1
        new = request(
            str(self.count),
            [1] * prompt_len,
            MIXTURES[rows - 1],
            n,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
        )
        must_wait = self.scheduler.num_waiting or new.rows > self.scheduler.num_free_rows
        if must_wait and self.scheduler.num_waiting >= 3:
            with pytest.raises(QueueFullError, match=r"3 requests wait \(max_queued 3\)"):
                self.scheduler.add(new)
            return
        self.scheduler.add(new)
        self.requests[new.id] = new
        self.expected[new.id] = dict.fromkeys(range(n), 0)
        self.arrived.append(new.id)

    @rule(which=st.integers(0, 100), index=st.none() | st.integers(0, 1))
    def abort(self, which: int, index: int | None) -> None:
        if not self.expected:
            self.scheduler.abort("unknown", index)
            return
        request_id = sorted(self.expected)[which % len(self.expected)]
        waits = request_id in {r.id for r in self.scheduler._waiting}
        self.scheduler.abort(request_id, index)
        if index is None or waits:
            del self.expected[request_id]
            if waits:
                self.arrived.remove(request_id)
        else:
            self.expected[request_id].pop(index, None)
            if not self.expected[request_id]:
                del self.expected[request_id]

    @precondition(lambda self: self.scheduler.has_work)
    @rule(
        tokens=st.lists(st.sampled_from([0, 5, 6, None]), min_size=16, max_size=16),
        ahead=st.integers(0, 2),
    )
    def step(self, tokens: list[int | None], ahead: int) -> None:
        """Plan a step, and commit those before it but for the last `ahead`."""
        batch = self._schedule()
        assert self.under_way or not batch.is_empty
        self.under_way.append(batch)
        while len(self.under_way) > ahead:
            self._commit(self.under_way.pop(0), tokens)

    def _commit(self, batch: Batch, tokens: list[int | None]) -> None:
        outputs = self.scheduler.commit(
            batch, [Picked(token) for token, _ in zip(tokens, batch.sampling, strict=False)]
        )
        for output in outputs:
            answers = self.expected[output.request_id]
            wanted = self.requests[output.request_id].sampling
            if output.error is None:
                answers[output.index] += 1
                stops = output.token_id == 0 and not wanted.ignore_eos
                full = answers[output.index] == wanted.max_tokens
                reason = "stop" if stops else "length" if full else None
                assert output.finish_reason == reason
            if output.error is not None or output.finish_reason is not None:
                del answers[output.index]
        self.expected = {key: value for key, value in self.expected.items() if value}

    @rule()
    def fail(self) -> None:
        batch = self._schedule()
        failed = {choice.owner.request.id for choice in batch.decoding}
        failed |= {chunk.running.request.id for chunk in batch.chunks}
        outputs = self.scheduler.fail(batch, QueueFullError("no"))
        ended = Counter(output.request_id for output in outputs)
        assert ended == {key: len(self.expected.pop(key)) for key in failed}

    def _schedule(self) -> Batch:
        running = self.scheduler._running.values()
        reading = {r for r in running if r.is_reading}
        decodes = {
            (r.request.id, choice.index)
            for r in running
            if r not in reading
            for choice in r.choices
            if choice.num_planned < r.request.sampling.max_tokens
        }
        batch = self.scheduler.schedule()
        assert {(c.owner.request.id, c.index) for c in batch.decoding} == decodes
        cost = sum(chunk.length * chunk.running.request.mixture.rows for chunk in batch.chunks)
        # Rows share the budget, but a block is always read.
        most = max(CHUNK_LEN, PREFILL_BLOCK_LEN * 4)
        assert cost <= most or not batch.decoding
        assert all(chunk.length <= CHUNK_LEN for chunk in batch.chunks)
        for chunk in batch.chunks:
            if chunk.is_first:
                self.started.append(chunk.running.request.id)
            assert chunk.length % PREFILL_BLOCK_LEN == 0 or chunk.is_last
        return batch

    @invariant()
    def every_slot_is_held_once_or_free(self) -> None:
        held = [
            slot
            for running in self.scheduler._running.values()
            for choice in running.choices
            for slot in choice.slots
        ]
        assert len(held) == len(set(held))
        assert self.scheduler.num_free_rows == MAX_ROWS - len(held)

    @invariant()
    def every_unfinished_answer_is_known_and_no_other(self) -> None:
        known = {r.id: set(range(r.n)) for r in self.scheduler._waiting}
        for key, running in self.scheduler._running.items():
            known[key] = {choice.index for choice in running.choices}
        assert known == {key: set(value) for key, value in self.expected.items()}

    @invariant()
    def admission_is_in_order_of_arrival(self) -> None:
        waiting = [r.id for r in self.scheduler._waiting]
        assert waiting == [key for key in self.arrived if key in waiting]
        if waiting:
            before = self.arrived[: self.arrived.index(waiting[0])]
            assert not (set(before) & set(waiting))
            after = self.arrived[self.arrived.index(waiting[0]) :]
            assert not (set(after) & set(self.scheduler._running))
            assert self.scheduler._waiting.head().rows > self.scheduler.num_free_rows

    def teardown(self) -> None:
        """Whatever happened, everybody is served in the end, and all slots come back."""
        for _ in range(200):
            if not self.scheduler.has_work:
                break
            batch = self.scheduler.schedule()
            self.under_way.append(batch)
            batch = self.under_way.pop(0)
            self.scheduler.commit(batch, [Picked(5)] * len(batch.sampling))
        assert not self.scheduler.has_work
        assert self.scheduler.num_free_rows == MAX_ROWS


Answers.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
test_any_sequence_of_arrivals_aborts_and_steps = Answers.TestCase


@given(st.lists(st.integers(0, 300), max_size=12), st.integers(1, 300))
def test_deal_gives_whole_blocks_within_the_budget(unread: list[int], budget: int) -> None:
    lengths = deal(unread, budget)
    assert sum(lengths) <= budget
    assert all(0 <= length <= left for length, left in zip(lengths, unread, strict=True))
    if any(unread):
        assert any(lengths)
    if budget >= PREFILL_BLOCK_LEN:
        for length, left in zip(lengths, unread, strict=True):
            assert length % PREFILL_BLOCK_LEN == 0 or length == left
    # Nobody gets two blocks more than somebody who still has some to read.
    for mine in lengths:
        for theirs, left in zip(lengths, unread, strict=True):
            assert theirs == left or mine <= theirs + 2 * PREFILL_BLOCK_LEN


def test_rows_share_the_budget_and_somebody_always_reads_a_block() -> None:
    assert deal([100, 100], 64, [1, 2]) == [32, 16]
    assert deal([100], 32, [4]) == [16]
    assert deal([100, 100], 32, [4, 1]) == [16, 0]


def test_a_length_that_will_be_reached_is_not_planned_beyond() -> None:
    scheduler = Scheduler(max_rows=8, max_queued=8, prefill_chunk_len=32)
    scheduler.add(request("a", [1], MIXTURES[0], max_tokens=2))
    ahead = [scheduler.schedule(), scheduler.schedule()]
    assert scheduler.schedule().is_empty
    reasons = [scheduler.commit(batch, [Picked(5)])[0].finish_reason for batch in ahead]
    assert reasons == [None, "length"]
    assert not scheduler.has_work


def test_a_step_planned_before_its_answer_ended_gives_nothing() -> None:
    scheduler = Scheduler(max_rows=2, max_queued=8, prefill_chunk_len=32)
    scheduler.add(request("a", [1], MIXTURES[1], max_tokens=9, ignore_eos=False))
    scheduler.add(request("b", [1], MIXTURES[1], max_tokens=9))
    first, surplus = scheduler.schedule(), scheduler.schedule()
    assert scheduler.commit(first, [Picked(0)])[0].finish_reason == "stop"
    # b has the slots; what a's surplus step gives is nobody's.
    assert [chunk.running.request.id for chunk in scheduler.schedule().chunks] == ["b"]
    assert scheduler.commit(surplus, [Picked(5)]) == []


def test_prompts_share_a_chunk_and_take_turns() -> None:
    scheduler = Scheduler(max_rows=8, max_queued=8, prefill_chunk_len=32)
    scheduler.add(request("decodes", [1], MIXTURES[0], max_tokens=100))
    batch = scheduler.schedule()
    scheduler.commit(batch, [Picked(5)])
    for name in "abc":
        scheduler.add(request(name, [1] * 64, MIXTURES[0]))
    turns = []
    for _ in range(6):
        batch = scheduler.schedule()
        turns.append([(c.running.request.id, c.length) for c in batch.chunks])
        assert len(batch.decoding) >= 1
        scheduler.commit(batch, [Picked(5)] * len(batch.sampling))
    assert turns[0] == [("a", 16), ("b", 16)]
    assert turns[1] == [("c", 16), ("a", 16)]
    read = Counter()
    for turn in turns:
        for name, length in turn:
            read[name] += length
    assert read == {"a": 64, "b": 64, "c": 64}


def test_alone_every_prompt_reads_a_whole_chunk() -> None:
    scheduler = Scheduler(max_rows=8, max_queued=8, prefill_chunk_len=40)
    for name in "ab":
        scheduler.add(request(name, [1] * 90, MIXTURES[1]))
    # Whole blocks: 32 of 40.
    assert [chunk.length for chunk in scheduler.schedule().chunks] == [32, 32]


def test_a_big_mixture_is_not_overtaken() -> None:
    """Small requests keep coming, each would fit: the big one still gets its turn."""
    scheduler = Scheduler(max_rows=4, max_queued=1000, prefill_chunk_len=16)
    scheduler.add(request("first", [1], MIXTURES[0], max_tokens=10))
    scheduler.add(request("big", [1], MIXTURES[3], max_tokens=2))
    for step in range(30):
        scheduler.add(request(f"small {step}", [1], MIXTURES[0], max_tokens=3))
        batch = scheduler.schedule()
        if any(c.running.request.id == "big" for c in batch.chunks):
            break
        scheduler.commit(batch, [Picked(5)] * len(batch.sampling))
    # As soon as the first one's ten tokens are done.
    assert step == 10
    assert scheduler.num_running == 1


def test_with_no_queue_a_request_runs_at_once_or_is_refused() -> None:
    scheduler = Scheduler(max_rows=2, max_queued=0, prefill_chunk_len=16)
    scheduler.add(request("a", [1], MIXTURES[1]))
    with pytest.raises(QueueFullError, match="0 rows are free of the 1 that this one needs"):
        scheduler.add(request("b", [1], MIXTURES[0]))
    scheduler.abort("a")
    scheduler.add(request("b", [1], MIXTURES[0]))
    assert scheduler.num_running == 1
