"""Blind votes between two answers: which are still to be shown, in what order, and what was said.

Who is who is decided by the file's own draw and is written only after the vote.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from mrss_provider.compare.calls import Result
from mrss_provider.compare.folder import Folder
from mrss_provider.compare.jsonl import read_lines
from mrss_provider.compare.pairwise import (
    VALUES,
    Pair,
    Place,
    Preferences,
    answered_by_both,
    pairs_of,
)
from mrss_provider.errors import FileFormatError

Vote = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class Ballot:
    """Two answers to vote on.

    Attributes:
        prompt: its id.
        seed: of both.
        a: the answer that is shown as A.
        b: as B.
    """

    prompt: str
    seed: int
    a: Result
    b: Result

    def line(self, vote: Vote, voter: str) -> dict[str, Any]:
        """Return the line of votes.jsonl; its fields are also those of `/v1/feedback`."""
        return {
            "time": round(time.time(), 3),
            "prompt": self.prompt,
            "seed": self.seed,
            "models": [self.a.model, self.b.model],
            "vote": vote,
            "voter": voter,
        }


def ballots(folder: Folder, results: Iterable[Result], voter: str) -> list[Ballot]:
    """Return what a voter has not seen, shuffled, sides drawn; the same order each time.

    Answers that are the same word for word are left out: there is nothing to say.
    """
    results = list(results)
    rng = random.Random(f"{folder.settings.prompts_sha256} {voter}")
    drawn: list[Ballot] = []
    for pair in pairs_of(folder.settings.models):
        both = sorted(answered_by_both(results, pair), key=lambda two: (two[0].prompt, two[0].seed))
        for first, second in both:
            a, b = (first, second) if rng.random() < 0.5 else (second, first)
            if first.text != second.text:
                drawn.append(Ballot(first.prompt, first.seed, a, b))
    rng.shuffle(drawn)
    seen = {
        (frozenset(line["models"]), line["prompt"], line["seed"])
        for line in _read(folder)
        if line["voter"] == voter
    }
    return [b for b in drawn if (frozenset((b.a.model, b.b.model)), b.prompt, b.seed) not in seen]


def read_votes(folder: Folder, results: Iterable[Result]) -> dict[Pair, Preferences]:
    """Return what people said of each pair; several votes on one comparison are averaged.

    Where anybody voted on a pair, its answers that are the same word for word are ties.

    Raises:
        FileFormatError: a line that is no vote.
    """
    said: dict[Pair, dict[Place, list[float]]] = {
        pair: {} for pair in pairs_of(folder.settings.models)
    }
    for line in _read(folder):
        first, second = line["models"]
        value = VALUES[line["vote"]]
        pair = (first, second) if (first, second) in said else (second, first)
        if pair in said:
            value = value if pair == (first, second) else -value
            said[pair].setdefault((line["prompt"], line["seed"]), []).append(value)
    results = list(results)
    for pair, places in said.items():
        for a, b in answered_by_both(results, pair) if places else ():
            if a.text == b.text:
                places.setdefault((a.prompt, a.seed), [0.0])
    return {
        pair: Preferences({place: sum(v) / len(v) for place, v in of_pair.items()})
        for pair, of_pair in said.items()
    }


def _read(folder: Folder) -> Iterable[dict[str, Any]]:
    for number, line in read_lines(folder.votes):
        try:
            first, second = line["models"]
            is_vote = line["vote"] in VALUES and isinstance(line["prompt"], str)
            is_vote = is_vote and isinstance(line["seed"], int) and isinstance(line["voter"], str)
            is_vote = is_vote and isinstance(first, str) and isinstance(second, str)
        except (KeyError, ValueError, TypeError):
            is_vote = False
        if not is_vote:
            raise FileFormatError(f"{folder.votes}, line {number}: no vote")
        yield line
