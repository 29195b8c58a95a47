"""No program of the persistent decode step reads what is old, or empties what is to be read."""

from __future__ import annotations

import pytest
from persistent_protocol import Guard, Protocol, Sizes
from persistent_sizes import RANKS, UP_RANKS
from program_order import Buffer, Order

MIN_PHASES = 3
"""In this time a mark has reached memory before its numbers are looked for."""


def sizes(width: int, rows: int, num_programs: int = 132) -> Sizes:
    return Sizes(rows, width, RANKS[width], UP_RANKS[width], num_programs)


def too_soon(protocol: Protocol) -> dict[str, int]:
    """Return what is looked for too few phases behind its mark."""
    found = protocol.order.phases
    assert found
    return {name: phases for name, phases in found.items() if phases < MIN_PHASES}


@pytest.mark.parametrize(
    "case",
    [
        sizes(1024, 1),
        sizes(1024, 1, 144),
        sizes(1024, 1)._replace(up_ranks=(8, 8, 8, 8)),
        sizes(2048, 8),
        sizes(2048, 32),
        sizes(4096, 20),
    ],
    ids=str,
)
def test_marks_come_between_reads_and_writes_and_long_before_the_next_reads(case: Sizes) -> None:
    protocol = Protocol(case).run()
    assert not protocol.order.faults
    assert not too_soon(protocol)
    assert not protocol.not_blank()


@pytest.mark.parametrize(
    ("guard", "name"),
    [(Guard.WAIT_FOR_INPUTS, "projected"), (Guard.WAIT_FOR_FFN_INPUTS, "squared")],
)
def test_programs_without_a_part_in_what_they_read_would_come_too_soon(
    guard: Guard, name: str
) -> None:
    protocol = Protocol(sizes(1024, 1), without=guard).run()
    assert too_soon(protocol) == {name: 2}


def test_programs_without_a_part_of_the_last_product_would_mark_what_others_still_read() -> None:
    protocol = Protocol(sizes(2048, 32), without=Guard.LAST_MARKS_BY_READERS).run()
    assert set(protocol.order.faults) == {
        "inputs is marked before all have read it",
        "before is marked before all have read it",
    }


def handed_over(order: Order, buffer: Buffer, *, to: int, phase: int) -> None:
    """Let the other one of two programs write a buffer of one cell, and this one read it."""
    order.write(1 - to, [(buffer, buffer.at)], layer=0)
    order.read(to, [(buffer, buffer.at)], layer=0, phase=phase)


@pytest.mark.parametrize("is_answered", [False, True])
def test_who_marks_a_number_has_heard_from_its_reader(is_answered: bool) -> None:
    order, number, answer = Order(2), Buffer("number", 2, 1), Buffer("answer", 2, 1)
    handed_over(order, number, to=1, phase=0)
    if is_answered:
        handed_over(order, answer, to=0, phase=1)
    order.mark(0, [(number, number.at)], phase=2)
    assert set(order.faults) == (
        set() if is_answered else {"number is marked before all have read it"}
    )


@pytest.mark.parametrize("fences", [(), (0,), (1,), (0, 1)], ids=str)
def test_only_fences_of_both_programs_order_a_mark_before_the_next_look(
    fences: tuple[int, ...],
) -> None:
    order, number, other = Order(2), Buffer("number", 2, 1), Buffer("other", 2, 1)
    order.mark(0, [(number, number.at)], phase=2)
    if 0 in fences:
        order.fence(0)
    handed_over(order, other, to=1, phase=4)
    if 1 in fences:
        order.fence(1)
    handed_over(order, number, to=1, phase=5)
    assert not order.faults
    assert order.phases == ({} if len(fences) == 2 else {"number": 3})


def test_a_look_that_nothing_orders_behind_the_mark_is_found() -> None:
    order, number = Order(2), Buffer("number", 2, 1)
    order.mark(0, [(number, number.at)], phase=0)
    handed_over(order, number, to=1, phase=1)
    assert set(order.faults) == {"number is looked for before it is marked"}
