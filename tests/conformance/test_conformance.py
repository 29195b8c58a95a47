"""The matrix of docs/compatibility.md, cell by cell. `make conformance` runs all of it."""

from __future__ import annotations

from typing import Any

import pytest
from conformance.matrix import CLIENTS, EXCEPTIONS, ROUTES, Cell, cells, run

pytestmark = pytest.mark.timeout(240)

CELLS = list(cells())


def is_short(cell: Cell) -> bool:
    """Whether `make test` asks it too: the plain client before our own server."""
    return cell.feature.short and (cell.client.id, cell.route) == ("openai", "server")


ASKED = [
    pytest.param(cell, id=cell.id, marks=() if is_short(cell) else pytest.mark.slow)
    for cell in CELLS
    if cell.is_asked
]


@pytest.mark.parametrize("cell", ASKED)
def test_cell_does_what_the_table_says(cell: Cell, client_on: Any) -> None:
    run(cell, client_on(cell.client, cell.route))


def test_every_exception_is_about_a_cell_that_there_is() -> None:
    told = {id(cell.exception) for cell in CELLS}
    assert [e.why for e in EXCEPTIONS if id(e) not in told] == []


def test_every_client_asks_for_something_on_each_of_its_routes() -> None:
    asked = {(cell.client.id, cell.route) for cell in CELLS if cell.is_asked}
    assert asked == {(client.id, route) for client in CLIENTS for route in client.routes}
    assert {route for _, route in asked} == set(ROUTES)


def test_the_short_selection_is_small() -> None:
    assert 12 <= sum(map(is_short, CELLS)) <= 18
