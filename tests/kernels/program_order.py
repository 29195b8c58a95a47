"""What happens before what, among programs that hand each other numbers without barriers.

A number is a cell of a buffer. It is blank, is written, is read by whoever waits for it, and is
marked as blank again before it is next written. What comes before an event is known in two ways:

- `known`: whoever has a number knows that its writer had come so far, and all that the writer knew.
  This is order in time, as on one clock. Every hand over must have it.
- `fenced`: what of that memory itself orders, since the writer passed a fence before it wrote and
  the reader one after it read. Where a mark is only known, it must have had some phases of time to
  reach memory before anybody looks for the number.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

NONE = -1


class Buffer:
    """Cells that are each written, and marked, by one program.

    Attributes:
        at: index of each cell, in the buffer's shape.
        layer: whose numbers are in each cell [n], -1 if it is blank.
        knew: by cell, the last event of each program that its writer knew of [n, P].
        released: likewise, what the writer's last fence has released.
        read_at: by cell, the last event in which each program has read it [n, P].
        marker: the program that has marked it, -1 before any has.
        marked_at: that program's event.
        marked_in: the phase of that.
    """

    def __init__(self, name: str, num_programs: int, *shape: int) -> None:
        self.name = name
        size = math.prod(shape)
        self.at = np.arange(size).reshape(shape)
        self.layer = np.full(size, NONE)
        self.knew = np.zeros((size, num_programs), np.int32)
        self.released = np.zeros((size, num_programs), np.int32)
        self.read_at = np.zeros((size, num_programs), np.int32)
        self.marker = np.full(size, NONE)
        self.marked_at = np.zeros(size, np.int32)
        self.marked_in = np.zeros(size, np.int32)


Places = Sequence[tuple[Buffer, np.ndarray]]
"""Buffers with some of their `at`."""


class Order:
    """Events of programs, in an order in which they can happen.

    Attributes:
        known: the last event of each program that comes before a program's present one [P, P].
        fenced: likewise, that memory orders before it.
        faults: what nothing orders, and how often.
        phases: by buffer, where no fence orders a mark before the next look: the fewest phases from
            the one that marks to the last one whose numbers whoever looks has had, both counted.
    """

    def __init__(self, num_programs: int) -> None:
        self.known, self.fenced, self._acquired, self._released = (
            np.zeros((num_programs, num_programs), np.int32) for _ in range(4)
        )
        self._last_phase = np.full(num_programs, NONE)
        self.faults: Counter[str] = Counter()
        self.phases: dict[str, int] = defaultdict(lambda: 1 << 20)

    def read(self, program: int, places: Places, layer: int, phase: int) -> None:
        """Look for a layer's numbers until they are there; phases count from the first layer's."""
        for buffer, cells in places:
            if (buffer.layer[cells] != layer).any():
                self.faults[f"{buffer.name} is waited for and not written"] += 1
            self._look(program, buffer, cells)
        event = self._event(program)
        for buffer, cells in places:
            for mine, theirs in ((self.known, buffer.knew), (self._acquired, buffer.released)):
                np.maximum(mine[program], theirs[cells].max(0), out=mine[program])
            buffer.read_at[cells, program] = event
        self._last_phase[program] = phase

    def _look(self, program: int, buffer: Buffer, cells: np.ndarray) -> None:
        # What was marked before the step was so at event 0, which all know.
        marker, marked_at = buffer.marker[cells], buffer.marked_at[cells]
        if (self.known[program, marker] < marked_at).any():
            self.faults[f"{buffer.name} is looked for before it is marked"] += 1
        in_time = self.fenced[program, marker] < marked_at
        if in_time.any():
            phases = self._last_phase[program] - buffer.marked_in[cells[in_time]].max() + 1
            self.phases[buffer.name] = min(self.phases[buffer.name], int(phases))

    def mark(self, program: int, places: Places, phase: int) -> None:
        """Mark cells as blank, which all have read by then."""
        event = self._event(program)
        self.expect_read(program, places)
        for buffer, cells in places:
            buffer.marker[cells], buffer.marked_at[cells] = program, event
            buffer.marked_in[cells] = phase
            buffer.layer[cells] = NONE
            buffer.read_at[cells] = 0

    def expect_read(self, program: int, places: Places) -> None:
        """Note a fault unless a program knows that cells are written and have been read."""
        for buffer, cells in places:
            if (buffer.read_at[cells] > self.known[program]).any():
                self.faults[f"{buffer.name} is marked before all have read it"] += 1
            if (buffer.knew[cells] > self.known[program]).any():
                self.faults[f"{buffer.name} is marked before it is written"] += 1

    def write(self, program: int, places: Places, layer: int) -> None:
        """Write a layer's numbers into cells that are marked."""
        self._event(program)
        for buffer, cells in places:
            if (buffer.layer[cells] != NONE).any():
                self.faults[f"{buffer.name} is written and was not marked"] += 1
            marker = buffer.marker[cells]
            if ((marker != program) & (marker != NONE)).any():
                self.faults[f"{buffer.name} is marked by another program than writes it"] += 1
            buffer.layer[cells] = layer
            buffer.knew[cells] = self.known[program]
            buffer.released[cells] = self._released[program]

    def fence(self, program: int) -> None:
        """Order what a program has read before, and has done, before what it writes next."""
        self._event(program)
        np.maximum(self.fenced[program], self._acquired[program], out=self.fenced[program])
        self._released[program] = self.fenced[program]

    def _event(self, program: int) -> int:
        self.known[program, program] += 1
        self.fenced[program, program] += 1
        return int(self.known[program, program])
