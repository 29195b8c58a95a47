"""`schedule`: factors of states that change on the way, piecewise linear over tokens or turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mrss_provider.engine.gates.gate import Gate, Heard
from mrss_provider.engine.merges import make_merge
from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture import Points

if TYPE_CHECKING:
    from mrss_provider.engine.request import ResolvedMixture


class Schedule(Gate):
    """Before its first point and after its last a factor stays; states not named keep 1."""

    name = "schedule"

    def __init__(self, points: Points, over: str) -> None:
        self._points = dict(points)
        self._over_turns = over == "turns"
        self.moves_prior = not self._over_turns

    def check(self, mixture: ResolvedMixture) -> None:
        """Refuse states that are not terms, and a moment at which nothing speaks."""
        terms = [name for name, ratio in zip(mixture.names, mixture.ratios, strict=True) if ratio]
        for name in self._points:
            if name not in terms:
                raise InvalidRequestError(
                    f"the schedule has points for {name!r}, which is not a term; the terms are "
                    f"{', '.join(terms)}",
                    param="mrss.gate",
                )
        # Without any strength such a rule leaves the base to speak.
        if make_merge(mixture.merge).anchored and not mixture.base_named:
            return
        # Sums of factors are linear between positions, so that none is 0 there alone.
        for position in sorted({x for points in self._points.values() for x, _ in points}):
            if not any(ratio > 0 for ratio in self._ratios(mixture, position)):
                raise InvalidRequestError(
                    f"under the merge rule {mixture.merge.text!r} some state must have a factor "
                    f"above 0 at every position, got none at {position}",
                    param="mrss.gate",
                )

    def prior(self, mixture: ResolvedMixture, heard: Heard) -> tuple[float, ...]:
        """Return the named ratios times the factors of this moment."""
        return self._ratios(mixture, heard.turn if self._over_turns else heard.position)

    def _ratios(self, mixture: ResolvedMixture, position: int) -> tuple[float, ...]:
        return tuple(
            ratio * self._factor(name, position)
            for name, ratio in zip(mixture.names, mixture.ratios, strict=True)
        )

    def _factor(self, name: str, position: int) -> float:
        if name not in self._points:
            return 1.0
        positions, factors = zip(*self._points[name], strict=True)
        return float(np.interp(position, positions, factors))
