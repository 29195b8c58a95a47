"""Fair shares between owners. Oracle: what each owner got, counted beside it."""

from collections import Counter
from dataclasses import replace

import pytest
from fake_model import fake_state, mixture, request
from hypothesis import given, settings
from hypothesis import strategies as st

from mrss_provider.engine.dealing import PREFILL_BLOCK_LEN, deal_beside
from mrss_provider.engine.fair import Turns, WaitingRequests, cost_of
from mrss_provider.engine.scheduler import Scheduler
from mrss_provider.engine.tail import Picked
from mrss_provider.errors import QueueFullError

ROWS = {rows: mixture(*[fake_state("x")] * rows) for rows in range(1, 9)}


def owned(owner, number, *, rows=1, prompt_len=1, max_tokens=4):
    made = request(
        f"{owner}{number}", [1] * prompt_len, ROWS[rows], max_tokens=max_tokens, ignore_eos=True
    )
    return replace(made, owner=owner)


def scheduler_of(**limits) -> Scheduler:
    return Scheduler(**{"max_rows": 8, "max_queued": 256, "prefill_chunk_len": 64, **limits})


def step(scheduler) -> dict[str, int]:
    """Run a step; return how many prompt tokens each owner's rows read."""
    batch = scheduler.schedule()
    read = Counter()
    for chunk in batch.chunks:
        asked = chunk.running.request
        read[asked.owner] += chunk.length * asked.mixture.rows
    scheduler.commit(batch, [Picked(5) for _ in batch.sampling])
    return read


@given(
    costs=st.dictionaries(
        st.sampled_from("abcd"), st.lists(st.integers(1, 100), min_size=1), min_size=2
    ),
    num_turns=st.integers(1, 200),
)
def test_owners_that_always_want_something_get_as_much_as_each_other(costs, num_turns):
    turns, had, taken = Turns(), Counter(), Counter()
    for _ in range(num_turns):
        owner = turns.first(costs)
        cost = costs[owner][taken[owner] % len(costs[owner])]
        turns.charge(owner, cost)
        taken[owner] += 1
        had[owner] += cost
    for a in costs:
        for b in costs:
            assert had[a] - had[b] <= max(costs[a]) + max(costs[b])


def test_who_was_away_saves_nothing_up():
    turns = Turns()
    for _ in range(100):
        turns.charge("busy", 10)
    order = []
    for _ in range(6):
        owner = turns.first(["busy", "new"])
        turns.charge(owner, 10)
        order.append(owner)
    assert Counter(order[:2]) == Counter(order[2:4]) == {"busy": 1, "new": 1}


def test_what_was_not_used_is_given_back():
    waiting = WaitingRequests()
    for number in range(2):
        waiting.append(owned("a", number, max_tokens=1000))
        waiting.append(owned("b", number, max_tokens=400))
    first, second = waiting.take(), waiting.take()
    assert {first.owner, second.owner} == {"a", "b"}
    assert waiting.head().owner == "b"
    # The answer of a ended after 10 tokens of 1000.
    waiting.settle(first if first.owner == "a" else second, 990)
    assert waiting.head().owner == "a"


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.integers(1, 300)),
        min_size=1,
        max_size=40,
    )
)
def test_each_owner_keeps_its_order_of_arrival(arrivals):
    waiting = WaitingRequests()
    for number, (owner, rows, prompt_len) in enumerate(arrivals):
        waiting.append(owned(owner, number, rows=rows, prompt_len=prompt_len))
    taken = [waiting.take() for _ in range(len(waiting))]
    assert not len(waiting)
    for owner in "abc":
        own = [int(r.id[1:]) for r in taken if r.owner == owner]
        assert own == sorted(own)


def test_a_flood_of_one_owner_delays_another_by_one_request_only():
    scheduler = scheduler_of(max_rows=1)
    for number in range(50):
        scheduler.add(owned("flood", number))
    assert scheduler.num_before("guest") == 1
    scheduler.add(owned("guest", 0))
    started = []
    while "guest0" not in started:
        running = list(scheduler._running)
        started += [name for name in running if name not in started]
        step(scheduler)
    # The one that ran when it came, and at most one more.
    assert len(started) <= 3


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 8)), min_size=1, max_size=30),
)
def test_everybody_is_served(arrivals):
    scheduler = scheduler_of()
    for number, (owner, rows) in enumerate(arrivals):
        scheduler.add(owned(owner, number, rows=rows))
    for _ in range(40 * len(arrivals)):
        if not scheduler.has_work:
            break
        step(scheduler)
    assert not scheduler.has_work
    assert scheduler.num_free_rows == 8


def test_a_full_queue_keeps_a_place_for_who_has_none():
    scheduler = scheduler_of(max_rows=1, max_queued=2)
    for number in range(3):
        scheduler.add(owned("flood", number))
    with pytest.raises(QueueFullError):
        scheduler.add(owned("flood", 3))
    scheduler.add(owned("guest", 0))
    with pytest.raises(QueueFullError):
        scheduler.add(owned("guest", 1))


def test_without_a_queue_nobody_has_a_place_in_it():
    scheduler = scheduler_of(max_rows=1, max_queued=0)
    scheduler.add(owned("flood", 0))
    with pytest.raises(QueueFullError):
        scheduler.add(owned("guest", 0))


@pytest.mark.parametrize("rows", [1, 2])
def test_prompts_of_two_owners_are_read_equally_fast_however_many_each_has(rows):
    scheduler = scheduler_of(max_rows=64)
    # Somebody decodes, so a step reads one chunk for all.
    scheduler.add(owned("other", 0, max_tokens=1000))
    step(scheduler)
    for number in range(9):
        scheduler.add(owned("flood", number, prompt_len=2000))
    scheduler.add(owned("guest", 0, rows=rows, prompt_len=2000))
    read = Counter()
    for _ in range(20):
        read.update(step(scheduler))
    assert abs(read["guest"] - read["flood"]) <= 2 * PREFILL_BLOCK_LEN * rows
    assert sum(read.values()) >= 20 * (64 - PREFILL_BLOCK_LEN)


def test_alone_each_owner_reads_as_much():
    scheduler = scheduler_of(max_rows=64, prefill_alone_len=256)
    for number in range(5):
        scheduler.add(owned("flood", number, prompt_len=2000))
    scheduler.add(owned("guest", 0, prompt_len=2000))
    assert step(scheduler) == {"flood": 256, "guest": 256}


@given(
    prompts=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 100), st.integers(1, 4)), min_size=1
    ),
    budget=st.integers(16, 256),
)
def test_a_dealing_stays_within_the_budget_and_the_prompts(prompts, budget):
    owners, unread, rows = zip(*prompts, strict=True)
    lengths = deal_beside(Turns(), owners, unread, rows, budget)
    cost = sum(length * k for length, k in zip(lengths, rows, strict=True))
    first = max(16 * k for k in rows)
    assert cost <= max(budget, first)
    for length, left in zip(lengths, unread, strict=True):
        assert 0 <= length <= left
        assert length == left or length % 16 == 0
    assert any(lengths) or not any(unread)


def test_the_cost_of_a_request_counts_its_prompt_once_and_each_answer():
    two_answers = replace(owned("a", 0, rows=3, prompt_len=10, max_tokens=5), n=2)
    assert cost_of(two_answers) == 3 * 10 + 2 * 3 * 5
