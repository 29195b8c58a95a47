"""Which of the kept lines count."""

import json
from pathlib import Path
from typing import Any

import pytest
from cells import CELL_FIELDS, matching, newest, one_card, read_lines

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
BASE = {"benchmark": "decode", "engine": "mrss", "model": "1.5b", "rows": 1, "card": "A"}


def line(date: str, steps: float, **fields: Any) -> dict[str, Any]:
    return BASE | {"date": date, "steps_per_s": steps} | fields


def steps(lines: list[dict[str, Any]]) -> list[float]:
    return [found["steps_per_s"] for found in lines]


def test_the_newest_line_of_a_cell_wins_wherever_it_stands() -> None:
    lines = [line("2026-11-24", 1.0), line("2026-11-25", 2.0), line("2026-11-23", 3.0)]
    assert steps(newest(lines)) == [2.0]
    assert steps(newest(lines[::-1])) == [2.0]


def test_of_one_day_the_last_line_wins() -> None:
    assert steps(newest([line("2026-11-25", 1.0), line("2026-11-25", 2.0)])) == [2.0]


@pytest.mark.parametrize("field", CELL_FIELDS)
def test_lines_that_differ_in_what_was_measured_are_two_cells(field: str) -> None:
    lines = [line("2026-11-24", 1.0), line("2026-11-25", 2.0, **{field: "other"})]
    assert steps(newest(lines)) == [1.0, 2.0]


def test_fields_of_the_machine_do_not_make_a_cell() -> None:
    lines = [line("2026-11-24", 1.0, commit="a"), line("2026-11-25", 2.0, commit="b")]
    assert steps(newest(lines)) == [2.0]


def test_a_curve_is_of_the_card_of_its_newest_line() -> None:
    lines = [
        line("2026-11-24", 1.0, rows=1),
        line("2026-11-25", 2.0, rows=1, card="B"),
        line("2026-11-24", 3.0, rows=2),
        line("2026-11-25", 4.0, rows=2, card="B"),
    ]
    assert steps(one_card(newest(lines))) == [2.0, 4.0]
    assert steps(one_card(newest([*lines, line("2026-11-26", 5.0, rows=4)]))) == [1.0, 3.0, 5.0]
    assert one_card([]) == []


def test_of_one_days_lines_the_last_says_which_card_a_curve_is_of() -> None:
    lines = [line("2026-11-25", 1.0), line("2026-11-25", 2.0, card="B"), line("2026-11-25", 3.0)]
    assert steps(one_card(newest(lines))) == [3.0]


def test_a_line_without_a_field_does_not_match_it() -> None:
    assert matching([line("2026-11-24", 1.0)], gate="fixed") == []
    assert steps(matching([line("2026-11-24", 1.0)], rows=1, card="A")) == [1.0]


def test_old_lines_are_ours_and_bad_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert read_lines(path) == []
    path.write_text(json.dumps({"model": "1.5b"}) + "\n\n" + json.dumps({"engine": "fla"}) + "\n")
    assert [found["engine"] for found in read_lines(path)] == ["mrss", "fla"]
    path.write_text("{}\n[1]\n")
    with pytest.raises(ValueError, match=r"line 2 of .* must be a JSON object, got '\[1\]'"):
        read_lines(path)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_kept_line_is_read(path: Path) -> None:
    assert newest(read_lines(path))
