"""The lines under `results/`, and which of them count: the newest of each cell.

Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]

# What a line was measured of and on. Two lines that agree in all of it are one cell.
CELL_FIELDS = (
    "benchmark",
    "engine",
    "model",
    "rows",
    "states",
    "requests",
    "merge",
    "gate",
    "tokens",
    "prompt_tokens",
    "dtype",
    "state_dtype",
    "card",
)
# Lines from before a field was written.
_DEFAULTS = {"engine": "mrss"}


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a results file in its order, none where there is no file.

    Raises:
        ValueError: a line that is no JSON object; says which.
    """
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise ValueError(f"line {number} of {path} must be a JSON object, got {text[:60]!r}")
        lines.append(_DEFAULTS | line)
    return lines


def newest(lines: Iterable[Line]) -> list[Line]:
    """Return the newest line of each cell, in the order in which these lines stand.

    Newest is the latest `date`; of one day's, the one that stands last.
    """
    cells: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        key = tuple(line.get(field) for field in CELL_FIELDS)
        if key not in cells or _date(line) >= _date(cells[key]):
            cells.pop(key, None)
            cells[key] = line
    return list(cells.values())


def one_card(lines: Iterable[Line]) -> list[Line]:
    """Return the lines of the card that the newest line is of: a curve is of one card."""
    found = list(lines)
    if not found:
        return []
    card = max(enumerate(found), key=lambda pair: (_date(pair[1]), pair[0]))[1]["card"]
    return [line for line in found if line["card"] == card]


def matching(lines: Iterable[Line], **fields: Any) -> list[Line]:
    """Return the lines that have all these values; a line without a field does not match."""
    return [
        line for line in lines if all(line.get(name) == value for name, value in fields.items())
    ]


def _date(line: Line) -> str:
    return str(line.get("date", ""))
