"""SlotAllocator: which slots of the state pool are whose.

Low slots first and runs where there are any, because rows in adjacent slots are decoded in place,
without a gather.
"""

from __future__ import annotations

from collections.abc import Sequence


class SlotAllocator:
    """Hands out slots `0 .. num_slots - 1`, each to one owner at a time."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._is_free = [True] * num_slots
        self.num_free = num_slots

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` slots, ascending: the lowest run that is long enough, else the lowest.

        None, and nothing taken, if fewer are free.
        """
        if count > self.num_free:
            return None
        run = self._lowest_run(count)
        slots = run or [slot for slot, free in enumerate(self._is_free) if free][:count]
        for slot in slots:
            self._is_free[slot] = False
        self.num_free -= count
        return slots

    def free(self, slots: Sequence[int]) -> None:
        """Give slots back."""
        for slot in slots:
            assert not self._is_free[slot], f"slot {slot} is free already"
            self._is_free[slot] = True
        self.num_free += len(slots)

    def _lowest_run(self, count: int) -> list[int] | None:
        length = 0
        for slot, free in enumerate(self._is_free):
            length = length + 1 if free else 0
            if length == count:
                return list(range(slot - count + 1, slot + 1))
        return None
