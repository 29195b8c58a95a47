"""The matrix as two tables for docs/compatibility.md."""

from __future__ import annotations

from collections.abc import Mapping

from conformance.features import FEATURES, Feature
from conformance.matrix import CLIENTS, EXCEPTIONS, Cell, Client, cells

PASSES, FAILS, NOT_ASKED = "✓", "✗", "-"


def compatibility() -> list[list[str]]:
    """Return a row a feature and a column a client; routes stand in their order in a cell."""
    found = {(cell.feature.name, cell.client.id, cell.route): cell for cell in cells()}
    rows = [["", *(client.id for client in CLIENTS)]]
    group = ""
    for feature in FEATURES:
        if feature.group != group:
            group = feature.group
            rows.append([f"**{group}**", *[""] * len(CLIENTS)])
        rows.append([feature.name, *(_marks(found, feature, client) for client in CLIENTS)])
    return rows


def reasons() -> list[list[str]]:
    """Return why some cells fail, or are not asked, by the numbers in the other table."""
    return [["", "why"], *([str(n), why] for n, why in enumerate(_reasons(), 1))]


def _reasons() -> list[str]:
    return list(dict.fromkeys(exception.why for exception in EXCEPTIONS))


def _marks(found: Mapping[tuple[str, str, str], Cell], feature: Feature, client: Client) -> str:
    marks = [_mark(found.get((feature.name, client.id, route))) for route in client.routes]
    return marks[0] if len(set(marks)) == 1 else " ".join(marks)


def _mark(cell: Cell | None) -> str:
    if cell is None:
        return NOT_ASKED
    if cell.exception is None:
        return PASSES
    number = _reasons().index(cell.exception.why) + 1
    return f"{FAILS if cell.is_asked else NOT_ASKED}{number}"
