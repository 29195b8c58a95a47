"""StopMatcher: cuts an answer at its stop strings, holding back only what may begin one."""

from __future__ import annotations

import re
from collections.abc import Iterable


class StopMatcher:
    """Takes text in pieces and gives back what is certainly before every stop string.

    The stop string that is complete first wins (of two that end together, the one that begins
    first), so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        assert all(self._stops), "an empty stop string matches everywhere"
        # What may begin a stop string, by length.
        self._beginnings = frozenset(stop[:i] for stop in self._stops for i in range(1, len(stop)))
        self._max_held = max(map(len, self._stops), default=1) - 1
        # Most pieces have no character that a stop string begins with.
        self._first = re.compile("|".join({re.escape(stop[0]) for stop in self._stops}) or r"(?!)")
        self._held = ""
        self.matched: str | None = None

    def push_open(self, text: str) -> str | None:
        """Take a piece as `push` does if it completes no stop string; else take nothing.

        Returns:
            What may be shown; None if the piece completes one, or one was complete before.
        """
        if not self._held and self.matched is None and self._first.search(text) is None:
            return text
        if self.matched is not None or any(stop in self._held + text for stop in self._stops):
            return None
        return self.push(text)

    def push(self, text: str) -> str:
        """Take a piece; return what may be shown. After a match nothing comes any more."""
        if self.matched is not None:
            return ""
        if not self._held and self._first.search(text) is None:
            return text
        text = self._held + text
        start = self._match(text)
        if start is None:
            start = len(text) - self._num_held(text)
        self._held = "" if self.matched is not None else text[start:]
        return text[:start]

    def flush(self) -> str:
        """Return what was held back; for the end of an answer that no stop string ended."""
        held, self._held = self._held, ""
        return held

    def _match(self, text: str) -> int | None:
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not found:
            return None
        _, start, self.matched = min(found)
        return start

    def _num_held(self, text: str) -> int:
        for length in range(min(self._max_held, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0
