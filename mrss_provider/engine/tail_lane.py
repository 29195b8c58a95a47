"""What the tail's kernels must know of one answer: a lane, written when it comes.

Here parameters by name become the kernels' fields; `TailLayout` gives lanes their places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from mrss_kernels.tail_tensors import FLOAT_FIELDS, GATES, INT_FIELDS, MAX_ENDS, ORDERS, RULES
from numpy.typing import NDArray

from mrss_provider.engine.batch import Choice
from mrss_provider.mixture import Method

# Less of it than any distribution's likeliest token has; a smaller one could be 0 in fp32.
_MIN_TOP_P = 1e-30

# What the kernels do of a gate: the host has put its prior into the named weights.
_TAIL_GATES = {"schedule": "fixed", "posterior": "fixed"}


def tail_gate(gate: Method) -> str:
    """Return what the tail is to do for a gate: one of `GATES`, if its kernels know it."""
    return _TAIL_GATES.get(gate.name, gate.name)


def is_fused(choice: Choice) -> bool:
    """Tell whether the tail's kernels know all that this answer wants of a token."""
    request = choice.owner.request
    if request.trace or request.forced or choice.is_heard or choice.is_probed:
        return False
    if choice.allowed is not None and len(choice.allowed.end_ids) > MAX_ENDS:
        return False
    mixture = choice.mixture
    if mixture.rows == 1:
        return True
    return mixture.merge.name in RULES and tail_gate(mixture.gate) in GATES


@dataclass(frozen=True)
class TailFlags:
    """What any request of a step needs of the tail; each that is off saves launches.

    `single` says that it is the only one: then the launches are not as many requests wide as the
    step has rows.
    """

    truncate: bool
    mixed: bool
    gated: bool
    constrained: bool
    single: bool = False


@dataclass(eq=False)
class Lane:
    """What the kernels must know of one answer, whatever its place."""

    slots: tuple[int, ...]
    ints: NDArray[np.int32]
    floats: NDArray[np.float32]
    seed: int
    flags: TailFlags
    count_row: int
    bias_row: int
    gate_row: int


class Seat(NamedTuple):
    """An answer's place in a step: the first of its rows of the logits, and their states' slots.

    Answers of one request that get their first token share the rows of the logits.
    """

    choice: Choice
    first_row: int
    slots: tuple[int, ...]


def make_lane(seat: Seat, count_row: int, bias_row: int, gate_row: int) -> Lane:
    """Return what the kernels must know of the answer on a seat.

    Args:
        seat: which answer, and which of its rows are awake.
        count_row: its row of `TailInputs.counts`, or -1.
        bias_row: its row of `TailInputs.bias`, or -1.
        gate_row: its row of `TailInputs.gates`, if its gate is a learned one.
    """
    choice = seat.choice
    mixture, sampling = choice.mixture, choice.owner.request.sampling
    rows = mixture.rows
    assert sampling.temperature is not None
    assert sampling.top_p is not None
    assert sampling.seed is not None
    ints = {
        "num_rows": rows,
        "rule": RULES.index(mixture.merge.name) if rows > 1 else 0,
        "gate": GATES.index(tail_gate(mixture.gate)) if rows > 1 else 0,
        "base_named": int(mixture.base_named),
        "keep_merged": int(bool(sampling.logprobs and sampling.top_logprobs)),
        "top_k": sampling.top_k or 0,
        "order": ORDERS.index(sampling.sampling_order or "openai"),
        "choice": choice.index,
        "count_row": count_row,
        "bias_row": bias_row,
        "gate_row": gate_row,
        "allowed_row": -1,
    }
    floats = {
        "cut": mixture.cut,
        "temperature": sampling.temperature,
        "top_p": max(sampling.top_p, _MIN_TOP_P),
        "min_p": sampling.min_p,
        "repetition": sampling.repetition_penalty,
        "presence": sampling.presence_penalty,
        "frequency": sampling.frequency_penalty,
        "decay": sampling.penalty_decay,
        "exponent": _number(mixture.merge, "exponent"),
        "tau": _number(mixture.gate, "tau"),
        "sharpness": _number(mixture.gate, "exponent"),
    }
    return Lane(
        slots=seat.slots,
        ints=np.array([ints.get(name, 0) for name in INT_FIELDS], dtype=np.int32),
        floats=np.array([floats[name] for name in FLOAT_FIELDS], dtype=np.float32),
        # A 64-bit word, signed as the kernels take it.
        seed=(sampling.seed + (1 << 63)) % (1 << 64) - (1 << 63),
        flags=TailFlags(
            truncate=bool(sampling.top_k) or sampling.top_p < 1.0 or sampling.min_p > 0.0,
            mixed=rows > 1,
            gated=rows > 1 and tail_gate(mixture.gate) != "fixed",
            constrained=choice.allowed is not None,
        ),
        count_row=count_row,
        bias_row=bias_row,
        gate_row=gate_row,
    )


def _number(method: Method, name: str) -> float:
    """Return a parameter of a merge rule or gate, 1 if it has none of that name."""
    return method.number(name) if name in method.parameters else 1.0
