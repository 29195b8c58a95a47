"""`mrss compare vote`: two answers at a time, without names; each vote is kept at once."""

from __future__ import annotations

import sys
from pathlib import Path

from mrss_provider.cli.output import CommandError, answer, note, printable
from mrss_provider.compare.folder import Folder
from mrss_provider.compare.jsonl import JsonLines
from mrss_provider.compare.judge import conversation
from mrss_provider.compare.votes import Ballot, Vote, ballots

_KEYS: dict[str, Vote] = {"a": "a", "1": "a", "b": "b", "2": "b", "t": "tie", "tie": "tie"}
_MAX_VOTER_CHARS = 64


def vote(path: Path, voter: str) -> None:
    """Show what this voter has not seen, and keep what they say.

    Raises:
        MRSSError: no comparison there.
        CommandError: there is nothing to vote on.
    """
    if not 0 < len(voter) <= _MAX_VOTER_CHARS:
        raise CommandError(f"--voter must have 1 to {_MAX_VOTER_CHARS} characters")
    folder = Folder.open(path)
    results = folder.read_results()
    questions = {prompt.id: conversation(prompt) for prompt in folder.prompts.prompts}
    with JsonLines(folder.votes) as file:
        waiting = ballots(folder, results, voter)
        if not waiting:
            raise CommandError(f"there is nothing left for {voter!r} to vote on")
        for number, ballot in enumerate(waiting, 1):
            _show(ballot, questions[ballot.prompt], number, len(waiting))
            said = _ask()
            if said is None:
                break
            file.append(ballot.line(said, voter))
        else:
            note("that was all")
    note(f"`mrss compare report {path}` counts the votes")


def _show(ballot: Ballot, question: str, number: int, total: int) -> None:
    answer(f"\n--- {number} of {total} ---\n{printable(question)}")
    for letter, result in (("A", ballot.a), ("B", ballot.b)):
        answer(f"\n[{letter}]\n{printable(result.text) or '(nothing)'}")


def _ask() -> Vote | None:
    while True:
        sys.stderr.write("\na, b, t(ie), or q(uit): ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        text = line.strip().lower()
        if not line or text in ("q", "quit"):
            return None
        if text in _KEYS:
            return _KEYS[text]
        note(f"{printable(text)!r:.40} is none of a, b, t and q")
