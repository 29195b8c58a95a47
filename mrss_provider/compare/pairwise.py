"""Preferences between two answers to one prompt: what judges and people said, as numbers.

A preference is in [-1, 1] from the second model of a pair to the first; 0 is a tie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from mrss_provider.compare.calls import Result

VALUES: Mapping[str, float] = {"a": 1.0, "b": -1.0, "tie": 0.0}
"""What a verdict between A and B is as a preference for A."""

Pair = tuple[str, str]
Place = tuple[str, int]


@dataclass(frozen=True)
class Preferences:
    """What was said of one pair of models.

    Attributes:
        values: (prompt, seed) -> preference for the first model.
    """

    values: dict[Place, float] = field(default_factory=dict)

    @property
    def num_ties(self) -> int:
        """How many were even."""
        return sum(value == 0 for value in self.values.values())


def pairs_of(models: Sequence[str]) -> list[Pair]:
    """Return every two models, in the order of tables."""
    return list(combinations(models, 2))


def answered_by_both(results: Iterable[Result], pair: Pair) -> list[tuple[Result, Result]]:
    """Return the answers of both models to the same prompt and seed, where neither failed."""
    found: dict[tuple[str, Place], Result] = {
        (r.model, (r.prompt, r.seed)): r for r in results if r.error is None
    }
    first, second = pair
    return [
        (result, found[second, place])
        for (model, place), result in found.items()
        if model == first and (second, place) in found
    ]
