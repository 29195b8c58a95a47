"""Change one table of `mixtures.toml` and leave the rest of the text, comments too, as it is.

What comes out is read again and compared before anybody writes it: a text that this does not
understand is refused, never damaged.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from typing import Any

from mrss_provider.engine.mixtures_file import MIXTURES_FILE, NamedMixture
from mrss_provider.errors import ConflictError
from mrss_provider.mixture import Term

_HEADER = re.compile(r"\s*\[\s*(\"?)([A-Za-z0-9_.-]+)\1\s*\]\s*(?:#.*)?")


def put_table(text: str, name: str, mixture: NamedMixture) -> str:
    """Return `text` with the table `name` replaced, or with it at the end; its comments stay.

    Raises:
        ConflictError: `text` is no TOML, or is written in a way that this cannot change.
    """
    table = mixture_table(mixture)
    body = [f"{key} = {_value(value)}" for key, value in table.items()]
    lines = _lines(text)
    span = _span(lines, name)
    if span is None:
        gap = [""] if lines and lines[-1].strip() else []
        changed = [*lines, *gap, f"[{_key(name)}]", *body]
    else:
        start, end = span
        kept = [line for line in lines[start + 1 : end] if line.lstrip().startswith("#")]
        after = [""] if end < len(lines) else []
        changed = [*lines[: start + 1], *kept, *body, *after, *lines[end:]]
    expected = {**_read(text), name: table}
    return _checked(changed, expected, name)


def drop_table(text: str, name: str) -> str:
    """Return `text` without the table `name`; the comments above and in it go too.

    Raises:
        ConflictError: as `put_table`.
    """
    tables = _read(text)
    if name not in tables:
        return text
    lines = _lines(text)
    start, end = _span(lines, name) or (0, 0)
    start = _above(lines, start)
    expected = {key: table for key, table in tables.items() if key != name}
    return _checked([*lines[:start], *lines[end:]], expected, name)


def mixture_table(mixture: NamedMixture) -> dict[str, Any]:
    """Return the table that reads as `mixture`."""
    said = {
        "terms": terms_text(mixture.terms),
        "merge": mixture.merge and mixture.merge.text,
        "gate": mixture.gate and mixture.gate.text,
        "cut": mixture.cut,
        "reinject": mixture.reinject,
        "temperature": mixture.temperature,
        "top_p": mixture.top_p,
        "sampling_order": mixture.sampling_order,
        "template": mixture.template,
        "description": mixture.description or None,
        "display_name": mixture.display_name or None,
    }
    return {key: value for key, value in said.items() if value is not None}


def terms_text(terms: Sequence[Term]) -> str:
    """Return names and weights as a typed name has them."""
    return "+".join(t.name if t.weight == 1 else f"{t.name}:{_number(t.weight)}" for t in terms)


def _read(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ConflictError(
            f"{MIXTURES_FILE} cannot be read ({exc}); mend it before it is changed from here"
        ) from exc


def _lines(text: str) -> list[str]:
    # Not splitlines: in TOML a line ends with a line feed only, and texts may hold other breaks.
    return text.removesuffix("\n").split("\n") if text else []


def _span(lines: Sequence[str], name: str) -> tuple[int, int] | None:
    """Return where the table begins, and where what belongs to the next one does."""
    starts = [i for i, line in enumerate(lines) if line.lstrip().startswith("[")]
    for i in starts:
        header = _HEADER.fullmatch(lines[i])
        if header is None or header[2] != name:
            continue
        following = next((j for j in starts if j > i), None)
        return i, len(lines) if following is None else max(i + 1, _above(lines, following))
    return None


def _above(lines: Sequence[str], header: int) -> int:
    """Return where the comment lines directly above a header begin."""
    while header > 0 and lines[header - 1].startswith("#"):
        header -= 1
    return header


def _checked(lines: Sequence[str], expected: dict[str, Any], name: str) -> str:
    text = "\n".join(lines).strip("\n")
    changed = text + "\n" if text else ""
    try:
        is_right = tomllib.loads(changed) == expected
    except (tomllib.TOMLDecodeError, RecursionError):
        is_right = False
    if not is_right:
        raise ConflictError(
            f"[{name}] of {MIXTURES_FILE} is written in a way that cannot be changed from here "
            "without losing what is around it; change it by hand"
        )
    return changed


def _key(name: str) -> str:
    return f'"{name}"' if "." in name else name


def _value(value: str | float) -> str:
    if isinstance(value, str):
        # A JSON string is a TOML string, but for the one control character that JSON lets pass.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
