"""TailLayout: which answer has which rows of a step, and what the tail's kernels read of it.

Answers keep their places while nobody comes or goes, so that a steady decode uploads nothing. A
change is one copy from the host: all arrays that the step reads lie in one block of memory.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from mrss_kernels.tail_tensors import (
    FLOAT_FIELDS,
    INT_FIELDS,
    SAMPLED,
    SEEN,
    TailInputs,
    TailOutputs,
    no_masks,
)
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider.engine.batch import Choice
from mrss_provider.engine.constraint import AllowedTokens
from mrss_provider.engine.gate_table import GateTable
from mrss_provider.engine.gates import Learned
from mrss_provider.engine.logits_processors import Bias, Occurrences
from mrss_provider.engine.tail_lane import Lane, Seat, TailFlags, make_lane

_ALIGNMENT = 16
_INT_AT = {name: i for i, name in enumerate(INT_FIELDS)}
_NUM_STAGED = 3


class _Block:
    """One stretch of memory, and arrays in it by name: one copy moves all."""

    def __init__(self, fields: Sequence[tuple[str, tuple[int, ...], torch.dtype]], **where: Any):
        sizes = [int(np.prod(shape)) * dtype.itemsize for _, shape, dtype in fields]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        self.memory = torch.zeros(sum(padded), dtype=torch.uint8, **where)
        self.tensors: dict[str, Tensor] = {}
        start = 0
        for (name, shape, dtype), size, step in zip(fields, sizes, padded, strict=True):
            self.tensors[name] = self.memory[start : start + size].view(dtype).view(shape)
            start += step


class TailLayout:
    """The rows of the running answers, on the device.

    Attributes:
        token_ids: int64 [R], what each row reads next; the tail writes it.
        slots: int64 [R], each row's state, -1 for padding.
        inputs: what the tail's kernels read.
        outputs: what they write.
        num_rows: rows in use.
        flags: what the answers of the last `arrange` need.
    """

    def __init__(
        self,
        max_rows: int,
        max_rows_per_request: int,
        vocab_size: int,
        banned_ids: Tensor,
    ) -> None:
        """Allocate room for `max_rows` rows (and as many answers) on the device of `banned_ids`."""
        device = banned_ids.device
        self._max_rows = max_rows
        self._is_cuda = device.type == "cuda"
        fields = [
            ("seeds", (max_rows,), torch.int64),
            ("slots", (max_rows,), torch.int64),
            ("source", (max_rows,), torch.int64),
            ("tokens", (max_rows,), torch.int64),
            ("ints", (len(INT_FIELDS), max_rows), torch.int32),
            ("floats", (len(FLOAT_FIELDS), max_rows), torch.float32),
            ("named", (max_rows,), torch.float32),
        ]
        self._device = _Block(fields, device=device)
        self._staged = [_Block(fields, pin_memory=self._is_cuda) for _ in range(_NUM_STAGED)]
        self._turn = 0
        self.token_ids = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.slots = self._device.tensors["slots"]
        banned = torch.zeros(vocab_size, dtype=torch.uint8, device=device)
        banned[banned_ids] = 1
        empty = torch.zeros(0, vocab_size, device=device)
        self._gates = GateTable(max_rows, device)
        self.inputs = TailInputs(
            ints=self._device.tensors["ints"],
            floats=self._device.tensors["floats"],
            seeds=self._device.tensors["seeds"],
            named=self._device.tensors["named"],
            counts=empty,
            marks=empty.to(torch.uint8),
            bias=empty,
            banned=banned,
            gates=self._gates.rows,
            allowed=no_masks(max_rows, vocab_size, device=device),
        )
        # One is enough: when masks are written, the step that had the last ones is over.
        self._masks = no_masks(max_rows, vocab_size, pin_memory=self._is_cuda)
        self._constrained: list[AllowedTokens] = []
        self.outputs = TailOutputs.allocate(
            self.token_ids, max_rows, max_rows, vocab_size, max_rows=max_rows_per_request
        )
        self.num_rows = 0
        self.flags = TailFlags(False, False, False, False)
        self._seats: list[Seat] = []
        self._weights: list[tuple[float, ...]] = []
        self._lanes: dict[Choice, Lane] = {}
        self._row_of: dict[Choice, int] = {}
        self._free_count_rows: list[int] = []
        self._free_bias_rows: list[int] = []
        self._has_grown = False
        self._upload()

    def knows(self, choice: Choice) -> bool:
        """Tell whether the answer's next token is on the device."""
        return choice in self._row_of

    def forget(self) -> None:
        """Know no answer any more: their tokens are picked by other means."""
        for choice in list(self._lanes):
            self._release(choice)
        self._seats, self._weights, self._row_of = [], [], {}

    def arrange(self, seats: Sequence[Seat]) -> bool:
        """Give the answers of a step their rows, in this order.

        An answer that was there keeps its next token wherever it moves; for another one it is
        `Choice.last_token`.

        Returns:
            Whether the pools of penalties or biases were allocated: whatever holds on to the
            addresses of `inputs` must be made anew.
        """
        if seats == self._seats:
            self._rename()
            return False
        staying = {seat.choice for seat in seats}
        for choice in [choice for choice in self._lanes if choice not in staying]:
            self._release(choice)
        # Kept until it is said: what follows may fail.
        new = [seat.choice for seat in seats if seat.choice not in self._lanes]
        self._has_grown |= self._grow_pools(new)
        staged = self._next_staged()
        staged["slots"].fill(-1)
        staged["ints"].fill(0)
        lanes = [self._lane(seat) for seat in seats]
        *first_rows, row = itertools.accumulate([len(seat.slots) for seat in seats], initial=0)
        if seats:
            self._write_lanes(seats, lanes, first_rows, staged)
        self._constrained = _write_constrained(seats, lanes, staged["ints"])
        self._weights = _write_weights(seats, staged["named"])
        self._upload()
        source = self._device.tensors["source"][:row]
        moved = self.token_ids[source.clamp_min(0)]
        self.token_ids[:row] = torch.where(source < 0, self._device.tensors["tokens"][:row], moved)
        self._seats, self.num_rows = list(seats), row
        self._row_of = dict(zip([seat.choice for seat in seats], first_rows, strict=True))
        flags = [lane.flags for lane in lanes]
        self.flags = TailFlags(
            truncate=any(own.truncate for own in flags),
            mixed=any(own.mixed for own in flags),
            gated=any(own.gated for own in flags),
            constrained=bool(self._constrained),
            single=len(seats) == 1,
        )
        grown, self._has_grown = self._has_grown, False
        return grown

    def write_masks(self) -> None:
        """Upload what the grammars of the step's answers leave; they have looked for it."""
        count = len(self._constrained)
        for row, allowed in zip(self._masks[:count].numpy(), self._constrained, strict=True):
            allowed.pack(row)
        self.inputs.allowed[:count].copy_(self._masks[:count], non_blocking=True)

    @contextlib.contextmanager
    def all_padding(self) -> Iterator[None]:
        """Let every row be padding for a while: what is launched then moves no state."""
        kept = self._device.memory.clone()
        self.slots.fill_(-1)
        self.inputs.column("num_rows").zero_()
        try:
            yield
        finally:
            self._device.memory.copy_(kept)

    def _write_lanes(
        self,
        seats: Sequence[Seat],
        lanes: Sequence[Lane],
        first_rows: Sequence[int],
        staged: dict[str, NDArray[Any]],
    ) -> None:
        """Write what the kernels read of the answers of a step, and where their tokens are.

        Field after field: an array operation for each answer would be a good part of a step's time.

        Args:
            seats: of the answers, one at least.
            lanes: theirs.
            first_rows: theirs in the step that is to come.
            staged: the host's arrays.
        """
        count = len(seats)
        sizes = [len(seat.slots) for seat in seats]
        ints = staged["ints"][:, :count]
        ints[:] = np.concatenate([lane.ints for lane in lanes]).reshape(count, -1).T
        ints[_INT_AT["first_row"]] = [seat.first_row for seat in seats]
        ints[_INT_AT["next_row"]] = first_rows
        # `num_planned` counts the step to come; its random number does not.
        ints[_INT_AT["position"]] = [seat.choice.num_planned - 1 for seat in seats]
        floats = np.concatenate([lane.floats for lane in lanes])
        staged["floats"][:, :count] = floats.reshape(count, -1).T
        staged["seeds"][:count] = [lane.seed for lane in lanes]
        slots = [slot for seat in seats for slot in seat.slots]
        staged["slots"][: len(slots)] = slots
        tokens = [seat.choice.last_token for seat in seats]
        staged["tokens"][: len(slots)] = np.repeat(tokens, sizes)
        before = [self._row_of.get(seat.choice, -1) for seat in seats]
        staged["source"][: len(slots)] = np.repeat(before, sizes)

    def _rename(self) -> None:
        """Upload the named weights if the gate of an answer that stays has moved them."""
        if self._weights != [seat.choice.mixture.weights for seat in self._seats]:
            self._weights = _write_weights(self._seats, self._next_staged()["named"])
            named = self._staged[self._turn].tensors["named"]
            self._device.tensors["named"].copy_(named, non_blocking=True)

    def _lane(self, seat: Seat) -> Lane:
        """Return what is known of an answer; anew where other rows of it are awake."""
        lane = self._lanes.get(seat.choice)
        if lane is None:
            return self._add_lane(seat)
        if lane.slots != seat.slots:
            pooled = lane.count_row, lane.bias_row, lane.gate_row
            lane = self._lanes[seat.choice] = make_lane(seat, *pooled)
        return lane

    def _add_lane(self, seat: Seat) -> Lane:
        choice = seat.choice
        gate_row = self._gate_row(choice.mixture.trained_gate)
        count_row = bias_row = -1
        if choice.occurrences is not None:
            count_row = self._free_count_rows.pop()
        if choice.owner.bias.is_used:
            bias_row = self._free_bias_rows.pop()
        # Before they are written, which may fail: the rows come back with the lane.
        lane = self._lanes[choice] = make_lane(seat, count_row, bias_row, gate_row)
        if choice.occurrences is not None:
            self._write_counts(count_row, choice.occurrences)
        if choice.owner.bias.is_used:
            self._write_bias(bias_row, choice.owner.bias)
        return lane

    def _gate_row(self, gate: Learned | None) -> int:
        if gate is None:
            return 0
        others = (choice.mixture.trained_gate for choice in self._lanes)
        return self._gates.row_of(gate, {other.sha256 for other in others if other is not None})

    def _release(self, choice: Choice) -> None:
        lane = self._lanes.pop(choice)
        if lane.count_row >= 0:
            self._free_count_rows.append(lane.count_row)
        if lane.bias_row >= 0:
            self._free_bias_rows.append(lane.bias_row)

    def _grow_pools(self, choices: Sequence[Choice]) -> bool:
        """Allocate a row of counts and of bias for every answer when the first needs them."""
        device, vocab_size = self.token_ids.device, self.inputs.banned.shape[0]
        counts, bias = self.inputs.counts, self.inputs.bias
        marks = self.inputs.marks
        if not len(counts) and any(choice.occurrences is not None for choice in choices):
            counts = torch.zeros(self._max_rows, vocab_size, device=device)
            marks = torch.zeros(self._max_rows, vocab_size, dtype=torch.uint8, device=device)
            self._free_count_rows = list(range(self._max_rows))
        if not len(bias) and any(choice.owner.bias.is_used for choice in choices):
            bias = torch.zeros(self._max_rows, vocab_size, device=device)
            self._free_bias_rows = list(range(self._max_rows))
        if counts is self.inputs.counts and bias is self.inputs.bias:
            return False
        self.inputs = replace(self.inputs, counts=counts, marks=marks, bias=bias)
        return True

    def _write_counts(self, row: int, seen: Occurrences) -> None:
        marks = np.full(len(seen.ids), SEEN, dtype=np.uint8)
        marks[seen.sampled > 0] |= SAMPLED
        self.inputs.counts[row].zero_()
        self.inputs.marks[row].zero_()
        if len(seen.ids):
            ids = self._to_device(seen.ids)
            self.inputs.counts[row, ids] = self._to_device(seen.counts)
            self.inputs.marks[row, ids] = self._to_device(marks)

    def _write_bias(self, row: int, bias: Bias) -> None:
        self.inputs.bias[row].zero_()
        ids = np.concatenate([bias.ids, np.array(bias.banned, dtype=np.int64)])
        values = np.concatenate([bias.values, np.full(len(bias.banned), -np.inf, np.float32)])
        self.inputs.bias[row, self._to_device(ids)] = self._to_device(values)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array.copy())
        if self._is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self.token_ids.device, non_blocking=True)

    def _next_staged(self) -> dict[str, NDArray[Any]]:
        """Return the host's arrays that no copy under way reads."""
        self._turn = (self._turn + 1) % _NUM_STAGED
        tensors = self._staged[self._turn].tensors
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    def _upload(self) -> None:
        self._device.memory.copy_(self._staged[self._turn].memory, non_blocking=True)


def _write_weights(seats: Sequence[Seat], named: NDArray[np.float32]) -> list[tuple[float, ...]]:
    """Write the seats' weights to their rows of `named` [B]; return them."""
    weights = [seat.choice.mixture.weights for seat in seats]
    sizes = [range(len(own)) for own in weights]
    rows = [seat.first_row + k for seat, size in zip(seats, sizes, strict=True) for k in size]
    if rows:
        named[rows] = list(itertools.chain.from_iterable(weights))
    return weights


def _write_constrained(
    seats: Sequence[Seat], lanes: Sequence[Lane], ints: NDArray[np.int32]
) -> list[AllowedTokens]:
    """Give answers that a grammar holds rows of masks; return what is to be written there.

    Answers that share rows share their mask, which is applied once.
    """
    constrained: dict[int, AllowedTokens] = {}
    for g in [g for g, lane in enumerate(lanes) if lane.flags.constrained]:
        allowed, first_row = seats[g].choice.allowed, seats[g].first_row
        if allowed is not None and first_row not in constrained:
            ints[_INT_AT["allowed_row"], g] = len(constrained)
            constrained[first_row] = allowed
    return list(constrained.values())
