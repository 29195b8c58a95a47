"""What every value of a body is checked with: its kind, and that its text is whole."""

from __future__ import annotations

from typing import Any

from mrss_provider.errors import InvalidRequestError
from mrss_provider.errors import shown as shown


def expect(value: object, kind: type, where: str, allowed: str) -> Any:
    """Return `value`, which must be a `kind`.

    Raises:
        InvalidRequestError: it is not; `allowed` says what may stand there.
    """
    if not isinstance(value, kind):
        raise InvalidRequestError(f"{where} must be {allowed}, got {kind_of(value)}", param=where)
    return value


def kind_of(value: object) -> str:
    """Return what a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "nothing"}
    return names.get(type(value)) or shown(value)


def check_text(text: str, where: str) -> str:
    """Return `text`.

    Raises:
        InvalidRequestError: a lone surrogate, which JSON can spell and UTF-8 cannot.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidRequestError(
                f"{where} has half of a surrogate pair at character {exc.start}; send whole "
                "characters",
                param=where,
            ) from exc
    return text
