"""The hand overs of the persistent decode step, as a model of its kernel by hand.

Cuts are those of `find_cuts`. By hand, and so to be changed with the kernel, are from `compute`,
`product`, `norm_unit` and `time_mix_unit`:

- which program takes which unit of each phase, and the order of a program's units;
- which numbers a unit reads: of a product all columns, or those of its blocks where they come in
  chunks; of time mixing a head's r, k, v and the first halves of LoRAs that `up` has columns for;
  of a norm a whole row, of all parts;
- when it marks numbers as not written, and which, and that the last layer's programs mark what no
  next layer does;
- the two waits of programs that have no part in what they read next, and the fence of each unit of
  the FFN's value.

Not modelled: what only one program touches (states, shift states, the first layer's v), the ring
of weights, and threads of a program, whose barriers are taken to hold.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

import numpy as np
from mrss_kernels.linear_cuts import HOPPER_SHARED
from mrss_kernels.persistent7_cuts import FFN_FACTOR, find_cuts
from program_order import NONE, Buffer, Order, Places

NUM_LAYERS = 4
"""The fewest in which a buffer is marked, written, read and marked again, an even number."""

BLOCK = 256
"""Columns of a block of weights."""

NUM_PHASES = 7
PROJECT, MIX, OUTPUT, NORM_FFN, KEY, VALUE, NORM = range(NUM_PHASES)


class Guard(Enum):
    """What keeps programs without a part in a phase from being too early."""

    WAIT_FOR_INPUTS = auto()
    WAIT_FOR_FFN_INPUTS = auto()
    LAST_MARKS_BY_READERS = auto()


class Sizes(NamedTuple):
    """Rows, channels, ranks of the LoRAs' halves, and programs."""

    rows: int
    channels: int
    ranks: tuple[int, int, int, int]
    up_ranks: tuple[int, int, int, int]
    num_programs: int = 132


class Protocol:
    """The layers of one step, without one of its guards if told so.

    Attributes:
        order: of all events, once `run` has returned.
        sets: the two sets of buffers, by name.
    """

    def __init__(self, sizes: Sizes, without: Guard | None = None) -> None:
        """Take sizes that the kernel takes."""
        self.sizes, self._without = sizes, without
        sums = (sum(sizes.ranks), sum(sizes.up_ranks))
        self.cuts = find_cuts(sizes.rows, sizes.channels, *sums, sizes.num_programs, HOPPER_SHARED)
        self.heads = sizes.channels // 64
        self.inner = FFN_FACTOR * self.heads
        self.num_slices = sizes.channels // self.cuts.slice_len
        self.groups = self._groups()
        self.order = Order(sizes.num_programs)
        self.sets = [self._buffers(), self._buffers()]

    def _groups(self) -> list[int]:
        """Return which mixed input each tile of the first product reads: r, k, v, w, a, g, v."""
        lengths = (*3 * (self.heads,), *(rank // 64 for rank in self.sizes.ranks))
        inputs = (0, 1, 2, 3, 4, 5, 2)
        return [i for i, length in zip(inputs, lengths, strict=True) for _ in range(length)]

    def _buffers(self) -> dict[str, Buffer]:
        rows, cuts = self.sizes.rows, self.cuts
        row_slices = (rows, self.num_slices)
        shapes = {
            "inputs": row_slices,
            "before": row_slices,
            "projected": (2, len(self.groups)),
            "att": (-(-rows // cuts.group), self.heads),
            "att_parts": (cuts.output_parts, self.heads),
            "between": row_slices,
            "ffn_in": row_slices,
            "squared": (self.inner,),
            "ffn_parts": (cuts.value_parts, self.heads),
        }
        return {
            name: Buffer(name, self.sizes.num_programs, *shape) for name, shape in shapes.items()
        }

    def run(self) -> Protocol:
        """Let all programs go through all phases; return this."""
        for layer in range(NUM_LAYERS):
            self._project(layer)
            self._help(layer)
            self._mix(layer)
            self._multiply_output(layer)
            self._norm_ffn(layer)
            self._multiply_key(layer)
            self._multiply_value(layer)
            if layer < NUM_LAYERS - 1:
                self._norm(layer)
        self._mark_last()
        return self

    def not_blank(self) -> list[str]:
        """Return what the next step waits for and does not itself mark, and is not blank."""
        marked = [*self.sets[0].values(), self.sets[1]["inputs"], self.sets[1]["before"]]
        return [buffer.name for buffer in marked if (buffer.layer != NONE).any()]

    def _places(self, layer: int, name: str, *index: object) -> Places:
        """Return part of a layer's buffer, which is also that of the second layer behind it."""
        buffer = self.sets[layer % 2][name]
        return [(buffer, buffer.at[index].ravel())]

    def _read(self, program: int, layer: int, phase: int, places: Places) -> None:
        self.order.read(program, places, layer, NUM_PHASES * layer + phase)

    def _hand_over(self, program: int, layer: int, phase: int, name: str, *index: object) -> None:
        """Mark the next layer's numbers and write this one's, as a product and time mixing do."""
        marked = self._places(layer + 1, name, *index)
        self.order.mark(program, marked, NUM_PHASES * layer + phase)
        self.order.write(program, self._places(layer, name, *index), layer)

    def _units(self, num_units: int) -> list[tuple[int, int]]:
        """Return the programs and their units, each program's in its order."""
        return [(unit % self.sizes.num_programs, unit) for unit in range(num_units)]

    def _read_inputs(self, program: int, layer: int, first: int, end: int) -> None:
        """Read some columns of the first product's inputs; layer 0's are there."""
        if layer:
            slices = slice(first // self.cuts.slice_len, -(-end // self.cuts.slice_len))
            places = self._places(layer, "inputs", slice(None), slices)
            self._read(program, layer, PROJECT, places)

    def _help_of(self, tile: int) -> int:
        return self.cuts.help[tile - self.cuts.helped] if tile >= self.cuts.helped else 0

    def _project(self, layer: int) -> None:
        for program, tile in self._units(len(self.groups)):
            end = self.sizes.channels
            if self.cuts.chunk:
                end -= self._help_of(tile) * BLOCK
            self._read_inputs(program, layer, 0, end)
            self._hand_over(program, layer, PROJECT, "projected", 0, tile)

    def _helped(self, program: int) -> range:
        """Return the tiles that a program helps with, as `helped_units`."""
        num_helped = len(self.cuts.help)
        num_helpers = self.sizes.num_programs - num_helped
        i = program - num_helped
        if i < 0:
            return range(0)
        first, end = (-(-each * num_helped // num_helpers) for each in (i, i + 1))
        return range(self.cuts.helped + first, self.cuts.helped + end)

    def _help(self, layer: int) -> None:
        longest, channels = max(self.cuts.help), self.sizes.channels
        in_chunks = longest > self.cuts.chunk > 0
        for program in range(self.sizes.num_programs):
            staged = None
            for tile in self._helped(program):
                blocks = self._help_of(tile) if in_chunks else longest
                if in_chunks or self.groups[tile] != staged:
                    self._read_inputs(program, layer, channels - blocks * BLOCK, channels)
                staged = self.groups[tile]
                self._hand_over(program, layer, PROJECT, "projected", 1, tile)

    def _read_tiles(self) -> list[int]:
        """Return the tiles of first halves that have a rank which second halves read."""
        first, found = 3 * self.heads, []
        for rank, up in zip(self.sizes.ranks, self.sizes.up_ranks, strict=True):
            found += range(first, first + -(-up // 64))
            first += rank // 64
        return found

    def _mix(self, layer: int) -> None:
        lows = self._read_tiles()
        num_groups = -(-self.sizes.rows // self.cuts.group)
        for reverse, unit in self._units(self.heads * num_groups):
            program = self.sizes.num_programs - 1 - reverse
            if self._waits_for_inputs(program, layer):
                self._read(program, layer, PROJECT, self._places(layer, "inputs", 0, 0))
            group, head = divmod(unit, self.heads)
            tiles = [head + i * self.heads for i in range(3)] + lows
            second = [tile for tile in tiles if tile >= self.cuts.helped]
            places = [
                *self._places(layer, "projected", 0, tiles),
                *self._places(layer, "projected", 1, second),
            ]
            self._read(program, layer, MIX, places)
            self._hand_over(program, layer, MIX, "att", group, head)

    def _waits_for_inputs(self, program: int, layer: int) -> bool:
        has_no_part = program >= len(self.groups) and not self._helped(program)
        return layer > 0 and has_no_part and self._without is not Guard.WAIT_FOR_INPUTS

    def _multiply_output(self, layer: int) -> None:
        parts = self.cuts.output_parts
        size = self.heads // parts
        for program, unit in self._units(self.heads * parts):
            tile, part = divmod(unit, parts)
            heads = slice(part * size, (part + 1) * size)
            places = self._places(layer, "att", slice(None), heads)
            self._read(program, layer, OUTPUT, places)
            self._hand_over(program, layer, OUTPUT, "att_parts", part, tile)

    def _norm_ffn(self, layer: int) -> None:
        for program, unit in self._units(self.sizes.rows * self.num_slices):
            own = divmod(unit, self.num_slices)
            outputs = ("between", "ffn_in")
            marked = [place for name in outputs for place in self._places(layer + 1, name, *own)]
            self.order.mark(program, marked, NUM_PHASES * layer + NORM_FFN)
            places = list(self._places(layer, "att_parts"))
            if layer:
                places += self._places(layer, "before", own[0])
            self._read(program, layer, NORM_FFN, places)
            written = [place for name in outputs for place in self._places(layer, name, *own)]
            self.order.write(program, written, layer)

    def _multiply_key(self, layer: int) -> None:
        for program, tile in self._units(self.inner):
            self._read(program, layer, KEY, self._places(layer, "ffn_in"))
            self._hand_over(program, layer, KEY, "squared", tile)

    def _multiply_value(self, layer: int) -> None:
        parts = self.cuts.value_parts
        size = self.inner // parts
        for program, unit in self._units(self.heads * parts):
            tile, part = divmod(unit, parts)
            has_no_part = program >= self.inner
            if has_no_part and self._without is not Guard.WAIT_FOR_FFN_INPUTS:
                self._read(program, layer, KEY, self._places(layer, "ffn_in", 0, 0))
            self.order.fence(program)
            inputs = self._places(layer, "squared", slice(part * size, (part + 1) * size))
            self._read(program, layer, VALUE, inputs)
            self._hand_over(program, layer, VALUE, "ffn_parts", part, tile)

    def _norm(self, layer: int) -> None:
        """Write what the next layer reads; mark what this one has read."""
        for program, unit in self._units(self.sizes.rows * self.num_slices):
            own = divmod(unit, self.num_slices)
            outputs = ("before", "inputs")
            marked = [place for name in outputs for place in self._places(layer, name, *own)]
            self.order.mark(program, marked, NUM_PHASES * layer + NORM)
            places = [*self._places(layer, "ffn_parts"), *self._places(layer, "between", own[0])]
            self._read(program, layer, NORM, places)
            written = [place for name in outputs for place in self._places(layer + 1, name, *own)]
            self.order.write(program, written, layer + 1)

    def _mark_last(self) -> None:
        """Mark what the last layer has read of the norm before it, 128 numbers at a time."""
        num_units = self.heads * self.cuts.value_parts
        step = min(self.sizes.num_programs, num_units)
        all_mark = self._without is Guard.LAST_MARKS_BY_READERS
        done = []
        for program in range(self.sizes.num_programs if all_mark else step):
            for name, copies in (("before", 1), ("inputs", 6)):
                places = self._last_places(name, copies, program, step)
                self.order.expect_read(program, places)
                done += places
        for buffer, cells in done:
            buffer.layer[cells] = NONE

    def _last_places(self, name: str, copies: int, first: int, step: int) -> Places:
        rows, channels = self.sizes.rows, self.sizes.channels
        at = 128 * np.arange(first, copies * rows * channels // 128, step) % (rows * channels)
        row, column = np.divmod(at, channels)
        return self._places(NUM_LAYERS - 1, name, row, column // self.cuts.slice_len)
