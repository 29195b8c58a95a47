"""A warp that runs the PTX of `persistent7_await`, on memory whose numbers arrive with time.

Only the instructions that are in it are known; another one, a register that was never written and a
branch that not all threads take are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

NUM_LANES = 32
NOT_WRITTEN = 0xFFFFFFFF

Values = np.ndarray
Memory = Callable[[int, Values], Values]
"""What is at addresses [32] at a time, counted in instructions."""


def _any_vote(votes: Values, members: Values) -> Values:
    voters = members >> np.arange(NUM_LANES) & 1 > 0
    return np.full_like(votes, votes[voters].any())


OPERATIONS: dict[str, Callable[..., Values]] = {
    "mov.b32": np.copy,
    "mov.pred": np.copy,
    "or.b32": np.bitwise_or,
    "and.b32": np.bitwise_and,
    "max.u32": np.maximum,
    "add.u32": np.add,
    "setp.eq.u32": np.equal,
    "setp.ne.u32": np.not_equal,
    "setp.ge.u32": np.greater_equal,
    "vote.sync.any.pred": _any_vote,
}


class Instruction(NamedTuple):
    """One instruction, with the predicate that it runs under and what that must be."""

    predicate: str
    wanted: bool
    name: str
    operands: list[str]


class Load(NamedTuple):
    """A load: when, by which threads [32], from which addresses [32] on, into which operands."""

    time: int
    lanes: Values
    addresses: Values
    operands: list[int]


class Trapped(Exception):
    """A thread came to a trap."""


class Warp:
    """32 threads in step.

    Attributes:
        registers: by name, uint32 or bool [32].
        loads: in the order in which they were made.
    """

    def __init__(self, text: str, operands: Sequence[Values | None], memory: Memory) -> None:
        """Take PTX, what is in its operands $0, $1, ... at first, None for nothing, and memory."""
        self._code, self._labels = _parsed(text)
        self._memory = memory
        self.registers = {
            f"${i}": np.array(value) for i, value in enumerate(operands) if value is not None
        }
        self.loads: list[Load] = []

    def run(self) -> None:
        """Run until the last instruction.

        Raises:
            Trapped: a thread trapped.
        """
        at = time = 0
        while at < len(self._code):
            predicate, wanted, name, operands = self._code[at]
            lanes = np.full(NUM_LANES, True)
            if predicate:
                lanes = self.registers[predicate] == wanted
            at += 1
            time += 1
            if name.startswith("bra"):
                assert lanes.all() or not lanes.any(), "threads part"
                at = self._labels[operands[0]] if lanes.all() else at
            elif name == "trap" and lanes.any():
                raise Trapped
            elif name.startswith("ld."):
                self._load(name, operands, lanes, time)
            elif name != "trap":
                values = (self._read(operand) for operand in operands[1:])
                self._write(operands[0], OPERATIONS[name](*values), lanes)

    def _read(self, operand: str) -> Values:
        if operand[0].isdigit():
            return np.full(NUM_LANES, int(operand, 0), np.uint32)
        return self.registers[operand]

    def _write(self, name: str, values: Values, lanes: Values) -> None:
        if not lanes.all():
            values = np.where(lanes, values, self.registers[name])
        self.registers[name] = values

    def _load(self, name: str, operands: list[str], lanes: Values, time: int) -> None:
        words, addresses = operands[:-1], self.registers[operands[-1]]
        vector = "" if len(words) == 1 else f".v{len(words)}"
        assert name == f"ld.volatile.global{vector}.b32"
        self.loads.append(Load(time, lanes, addresses, [int(word[1:]) for word in words]))
        for i, word in enumerate(words):
            self._write(word, self._memory(time, addresses + i), lanes)


def _parsed(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return instructions, and which one each label is in front of."""
    code: list[Instruction] = []
    labels = {}
    for statement in re.split(r"[;\n]", text):
        words = statement.split()
        if not words or words[0] in ("{", "}", ".reg"):
            continue
        if words[0].endswith(":"):
            labels[words[0][:-1]] = len(code)
            continue
        predicate = words.pop(0)[1:] if words[0].startswith("@") else ""
        operands = re.findall(r"[$\w]+", " ".join(words[1:]))
        wanted = not predicate.startswith("!")
        code.append(Instruction(predicate.lstrip("!"), wanted, words[0], operands))
    return code, labels
