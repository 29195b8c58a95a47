"""Arms: the deployments of weighted groups, read from what a proxy's callback logged.

Feedback and votes that were posted on their answers go with them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO

from mrss_provider.compare.jsonl import lines_of, read_lines
from mrss_provider.compare.log_callback import NUM_KEPT, aside
from mrss_provider.errors import FileFormatError

Line = Mapping[str, Any]


@dataclass
class Arm:
    """What is known of one deployment.

    Attributes:
        id: its `model_info.id`.
        models: names that it was called by.
        calls: lines of the log, the first first.
        scores: from feedback, in [-1, 1].
    """

    id: str
    models: set[str] = field(default_factory=set)
    calls: list[Line] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @property
    def answered(self) -> list[Line]:
        """Calls that the model answered; a cache's answers say nothing about it."""
        return [call for call in self.calls if call["error"] is None and not call["cache_hit"]]

    @property
    def num_errors(self) -> int:
        """Calls that failed."""
        return sum(call["error"] is not None for call in self.calls)

    def values(self, key: str) -> list[float]:
        """Return what was measured in answered calls."""
        return [call[key] for call in self.answered if call.get(key) is not None]


@dataclass
class Arms:
    """All that a log and a feedback file hold.

    Attributes:
        groups: model_name -> arm's id -> arm.
        votes: group -> (winner's arm, loser's arm) or a tie's two arms, and whether it is a tie.
        num_ungrouped: calls without a group or an arm, such as health checks.
        num_unknown: feedback on answers that are not in the log.
    """

    groups: dict[str, dict[str, Arm]] = field(default_factory=dict)
    votes: dict[str, list[tuple[str, str, bool]]] = field(default_factory=dict)
    num_ungrouped: int = 0
    num_unknown: int = 0


def read_arms(log: Path, feedback: Path | None = None) -> Arms:
    """Read a log, what was put aside of it first, and the feedback on its answers.

    Raises:
        FileFormatError: the log is not there, or a line is none of ours.
    """
    if not log.exists():
        raise FileFormatError(
            f"there is no {log}; a proxy with mrss_provider.compare.arm_log among its callbacks "
            "and MRSS_COMPARE_LOG writes one"
        )
    arms = Arms()
    answers: dict[str, tuple[str, str]] = {}
    for path, file in reversed(_open_all(log)):
        for number, line in lines_of(file, path):
            _check(line, path, number)
            if not line["group"] or not line["arm"]:
                arms.num_ungrouped += 1
                continue
            of_group = arms.groups.setdefault(line["group"], {})
            arm = of_group.setdefault(line["arm"], Arm(line["arm"]))
            arm.models.add(str(line["model"]))
            arm.calls.append(line)
            for key in ("id", "call_id"):
                if line[key]:
                    answers[str(line[key])] = (line["group"], line["arm"])
    if feedback is not None:
        _read_feedback(feedback, arms, answers)
    return arms


def _check(line: Line, path: Path, number: int) -> None:
    needed = ("group", "arm", "model", "error", "cache_hit", "ttft_s", "total_s", "id", "call_id")
    error = line.get("error")
    is_ours = all(key in line for key in needed) and (
        error is None or (isinstance(error, dict) and "type" in error)
    )
    is_ours = is_ours and all(isinstance(line[key], str | None) for key in ("group", "arm"))
    measured = (line.get(key) for key in ("ttft_s", "total_s", "cost", "completion_tokens"))
    if not is_ours or not all(isinstance(value, int | float | None) for value in measured):
        raise FileFormatError(f"{path}, line {number}: no line of mrss_provider.compare.arm_log")


def _open_all(log: Path) -> list[tuple[Path, BinaryIO]]:
    """Open a log and what was put aside of it, the newest first, each file once.

    In this order none is missed: a log that is put aside meanwhile is open already.
    """
    found: dict[int, tuple[Path, BinaryIO]] = {}
    for path in (log, *(aside(log, n) for n in range(1, NUM_KEPT + 1))):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue
        inode = os.fstat(file.fileno()).st_ino
        if inode in found:
            file.close()
        else:
            found[inode] = path, file
    return list(found.values())


def _read_feedback(path: Path, arms: Arms, answers: Mapping[str, tuple[str, str]]) -> None:
    if not path.exists():
        raise FileFormatError(f"there is no {path}; /v1/feedback of mrss serve writes one")
    # Who thinks again, or sends twice, has one opinion of one answer: the last.
    said: dict[tuple[Any, ...], Line] = {}
    for number, line in read_lines(path):
        if not _is_feedback(line):
            raise FileFormatError(f"{path}, line {number}: no line of /v1/feedback")
        said[line.get("owner"), line["id"], "score" in line] = line
    for one in said.values():
        if "score" not in one:
            _take_vote(one, arms, answers)
        elif (place := answers.get(one["id"])) is None:
            arms.num_unknown += 1
        else:
            arms.groups[place[0]][place[1]].scores.append(float(one["score"]))


def _is_feedback(line: Line) -> bool:
    if not isinstance(line.get("id"), str) or not isinstance(line.get("owner"), str | None):
        return False
    if "score" in line:
        score = line["score"]
        return isinstance(score, int | float) and -1 <= score <= 1
    models, ids = line.get("models"), line.get("ids", [])
    if not isinstance(models, list) or not isinstance(ids, list):
        return False
    if not all(isinstance(name, str) for name in (*models, *ids)):
        return False
    letters = "abcd"[: len(models)]
    return line.get("vote") in (*letters, "tie") and len(ids) in (0, len(models))


def _take_vote(line: Line, arms: Arms, answers: Mapping[str, tuple[str, str]]) -> None:
    """Count a vote in every group that has the answers; among several, one beats each other one."""
    places = [answers.get(one) for one in line.get("ids", ())]
    if not places or None in places:
        places = _places_by_name(line.get("models", ()), arms)
    known = [place for place in places if place is not None]
    if len(known) < 2 or len(known) != len(places) or len({group for group, _ in known}) != 1:
        arms.num_unknown += 1
        return
    group = known[0][0]
    found = arms.votes.setdefault(group, [])
    if line["vote"] == "tie":
        found += [(a, b, True) for (_, a), (_, b) in combinations(known, 2)]
        return
    winner = "abcd".index(line["vote"])
    found += [(known[winner][1], arm, False) for i, (_, arm) in enumerate(known) if i != winner]


def _places_by_name(models: Sequence[str], arms: Arms) -> list[tuple[str, str] | None]:
    """Find arms by what they are called, if exactly one is."""
    found: list[tuple[str, str] | None] = []
    for model in models:
        name = model.removeprefix("mrss/")
        places = [
            (group, arm.id)
            for group, of_group in arms.groups.items()
            for arm in of_group.values()
            if model == arm.id or name in {m.removeprefix("mrss/") for m in arm.models}
        ]
        found.append(places[0] if len(places) == 1 else None)
    return found
