"""SlotAllocator against a dictionary of owners."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mrss_provider.engine.slots import SlotAllocator

NUM_SLOTS = 12


class Slots(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.allocator = SlotAllocator(NUM_SLOTS)
        self.owned: list[list[int]] = []

    @property
    def taken(self) -> set[int]:
        return {slot for slots in self.owned for slot in slots}

    @rule(count=st.integers(1, 3) | st.integers(1, NUM_SLOTS + 1))
    def allocate(self, count: int) -> None:
        free = [slot for slot in range(NUM_SLOTS) if slot not in self.taken]
        runs = [
            list(range(first, first + count))
            for first in free
            if set(range(first, first + count)) <= set(free)
        ]
        slots = self.allocator.allocate(count)
        if count > len(free):
            assert slots is None
        else:
            assert slots == (runs[0] if runs else free[:count])
            self.owned.append(slots)

    @rule(which=st.integers(0, 100))
    def free(self, which: int) -> None:
        if self.owned:
            self.allocator.free(self.owned.pop(which % len(self.owned)))

    @invariant()
    def every_slot_is_owned_once_or_free(self) -> None:
        assert sum(len(slots) for slots in self.owned) == len(self.taken)
        assert self.allocator.num_free == NUM_SLOTS - len(self.taken)


Slots.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_slots_are_conserved_and_owned_once = Slots.TestCase


def test_a_run_is_preferred_to_lower_slots() -> None:
    allocator = SlotAllocator(8)
    for _ in range(8):
        allocator.allocate(1)
    allocator.free([0, 2, 4, 5, 7])
    assert allocator.allocate(2) == [4, 5]
    assert allocator.allocate(2) == [0, 2]


def test_freeing_a_free_slot_is_our_own_fault() -> None:
    allocator = SlotAllocator(3)
    slots = allocator.allocate(2)
    assert slots == [0, 1]
    allocator.free(slots)
    with pytest.raises(AssertionError, match="slot 0 is free already"):
        allocator.free([0])
