"""Bodies of administration: fields as people and RWKV-Infer's scripts write them.

Numbers may come as strings, truths as "True" or "1". An unknown field is refused by name.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mrss_provider.administration import Defaults
from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture import Kind, parse_method
from mrss_provider.sampling_params import SamplingParams

_MAX_TEXT = 4096
_MAX_ITEMS = 256
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|(.))", re.DOTALL)
_PLAIN = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", "0": "\0", '"': '"', "'": "'"}


class Form:
    """The fields of one JSON object.

    Args:
        body: the object.
        known: the fields that it may have.

    Raises:
        InvalidRequestError: it is no object, or has another field.
    """

    def __init__(self, body: object, known: Sequence[str]) -> None:
        if not isinstance(body, dict):
            raise InvalidRequestError("the body must be a JSON object")
        for key in body:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise InvalidRequestError(f"{str(key)!r:.80} is no field here; {hint}", param=None)
        # null stands for absent.
        self._fields: Mapping[str, Any] = {k: v for k, v in body.items() if v is not None}

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text; one without a default must be given.

        Raises:
            InvalidRequestError: it is missing, no text, too long, or has half a character.
        """
        value = self._fields.get(key, default)
        if value is None:
            raise InvalidRequestError(f"{key} is missing", param=key)
        return _text(value, key)

    def method(self, kind: Kind) -> str:
        """Return a merge rule or gate as after `~` in a name, from that or from an object.

        Raises:
            InvalidRequestError: as `parse_method`, of an object; as `text`, of anything else.
        """
        value = self._fields.get(kind)
        if isinstance(value, dict):
            return parse_method(value, kind, kind).text
        return self.text(kind)

    def number(self, key: str) -> float | None:
        """Return a number, or None without one.

        Raises:
            InvalidRequestError: no finite number.
        """
        return _number(self._fields[key], key) if key in self._fields else None

    def truth(self, key: str, *, default: bool) -> bool:
        """Return true or false.

        Raises:
            InvalidRequestError: neither.
        """
        value = self._fields.get(key, default)
        known = _TRUTHS.get(str(value).lower()) if isinstance(value, bool | int | str) else None
        if known is None:
            raise InvalidRequestError(f"{key} must be true or false, got {value!r:.40}", param=key)
        return known

    def texts(self, key: str) -> list[str]:
        """Return a list of texts; a single one is a list of one.

        Raises:
            InvalidRequestError: it is missing or no such list.
        """
        value = self._fields.get(key)
        if value is None:
            raise InvalidRequestError(f"{key} is missing", param=key)
        return [_text(item, key) for item in _items(value, key)]

    def numbers(self, key: str) -> list[float] | None:
        """Return a list of numbers, or None without one.

        Raises:
            InvalidRequestError: no such list.
        """
        if key not in self._fields:
            return None
        return [_number(item, key) for item in _items(self._fields[key], key)]

    def defaults(self) -> Defaults:
        """Return `default_temperature` and `default_top_p`, each checked where it is given.

        Raises:
            InvalidRequestError: a value that no request could have.
        """
        defaults = Defaults(self.number("default_temperature"), self.number("default_top_p"))
        SamplingParams(temperature=defaults.temperature, top_p=defaults.top_p)
        return defaults


def unescaped(text: str) -> str:
    r"""Return `text` with `\n`, `\x17`, `\u3002` and their kin replaced by what they stand for.

    Raises:
        InvalidRequestError: an escape that means nothing.
    """

    def plain(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        char = chr(int(code, 16)) if code else _PLAIN.get(match[3])
        if char is None or "\ud800" <= char <= "\udfff":
            raise InvalidRequestError(f"endtoken: {match[0]!r} means nothing", param="endtoken")
        return char

    return _ESCAPE.sub(plain, text)


def _text(value: object, key: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise InvalidRequestError(
            f"{key} must be a text of at most {_MAX_TEXT} characters, got {value!r:.40}", param=key
        )
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise InvalidRequestError(f"{key} has half of a surrogate pair", param=key) from exc
    return value


def _number(value: object, key: str) -> float:
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        raise InvalidRequestError(f"{key} must be a finite number, got {value!r:.40}", param=key)
    return number


def _items(value: object, key: str) -> Sequence[object]:
    items = value if isinstance(value, list) else [value]
    if len(items) > _MAX_ITEMS:
        raise InvalidRequestError(
            f"{key} may have {_MAX_ITEMS} entries, got {len(items)}", param=key
        )
    return items
