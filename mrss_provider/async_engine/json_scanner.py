"""ObjectScanner: finds where a JSON object ends, in text that comes in pieces."""

from __future__ import annotations

import re

# What matters outside of strings, and inside of one.
_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')


class ObjectScanner:
    """Reads one object. Whether it is JSON at all is not looked at: only how deep it is."""

    def __init__(self) -> None:
        self._depth = 0
        self._has_begun = False
        self._in_string = False
        self._skips = False

    def feed(self, text: str) -> int | None:
        """Take a piece; return how much of it belongs to the object.

        Returns:
            None while the object goes on; 0 if the text does not begin with one.
        """
        if not self._has_begun and text and text[0] != "{":
            return 0
        self._has_begun |= bool(text)
        at = 0
        while at < len(text):
            if self._skips:
                self._skips = False
                at += 1
                continue
            found = (_INSIDE if self._in_string else _OUTSIDE).search(text, at)
            if found is None:
                return None
            at = found.end()
            self._read(found[0])
            if not self._depth:
                return at
        return None

    def _read(self, char: str) -> None:
        if char == "\\":
            self._skips = True
        elif char == '"':
            self._in_string = not self._in_string
        else:
            self._depth += 1 if char in "{[" else -1
