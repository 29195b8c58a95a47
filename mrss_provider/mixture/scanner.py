"""Scanner: reads a text from left to right; what is wrong with it has a position."""

from __future__ import annotations

import math
import re
from typing import NoReturn

from mrss_provider.errors import InvalidRequestError

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
NUMBER = r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMBER_PATTERN = re.compile(NUMBER)


class Scanner:
    """A text and how far it has been read.

    Args:
        text: to read.
        what: how errors call it.
        param: the request's parameter that it came from.
    """

    def __init__(self, text: str, *, what: str, param: str) -> None:
        self.text = text
        self.at = 0
        self._what = what
        self._param = param

    @property
    def is_at_end(self) -> bool:
        """Whether nothing is left."""
        return self.at == len(self.text)

    def take(self, char: str) -> bool:
        """Read `char` if it comes next, and tell whether it did."""
        if not self.text.startswith(char, self.at):
            return False
        self.at += 1
        return True

    def match(self, pattern: re.Pattern[str], expected: str) -> str:
        """Read what `pattern` matches.

        Raises:
            InvalidRequestError: something else comes next.
        """
        match = pattern.match(self.text, self.at)
        if match is None:
            got = "the end" if self.is_at_end else repr(self.text[self.at])
            self.fail(self.at, f"expected {expected}, got {got}")
        self.at = match.end()
        return match.group()

    def number(self, expected: str) -> float:
        """Read a finite number.

        Raises:
            InvalidRequestError: something else comes next.
        """
        start = self.at
        text = self.match(_NUMBER_PATTERN, expected)
        if math.isinf(float(text)):
            self.fail(start, f"the number {text:.20} is too large")
        return float(text)

    def end(self, hint: str) -> None:
        """Refuse what is left.

        Raises:
            InvalidRequestError: something is.
        """
        if not self.is_at_end:
            self.fail(self.at, f"unexpected {self.text[self.at]!r}; {hint}")

    def fail(self, position: int, why: str) -> NoReturn:
        """Raise what is wrong at `position`."""
        raise InvalidRequestError(
            f"bad {self._what} {self.text!r:.1100} at position {position}: {why}", param=self._param
        )
