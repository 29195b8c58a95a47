"""The jinja2 that templates run in: a sandbox, our filters, and the parts that templates share."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mrss_provider.errors import ConfigError

if TYPE_CHECKING:
    import jinja2

TEMPLATES_FOLDER = Path(__file__).parent / "templates"

# What a template may import: nothing else of the file system is in its reach.
_PARTS = ("turns.jinja",)


@functools.lru_cache(maxsize=16)
def compiled(source: str, name: str) -> jinja2.Template:
    """Compile a template. It may come with a model from elsewhere, hence the sandbox.

    Raises:
        ConfigError: not jinja2.
    """
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as exc:
        raise ConfigError(f"the chat template {name!r} is no jinja2: {exc}") from exc


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        loader=jinja2.FunctionLoader(_part), keep_trailing_newline=False
    )
    environment.filters["one_line_breaks"] = _one_line_breaks
    environment.filters["open_line_breaks"] = _open_line_breaks
    environment.filters["no_turns"] = _no_turns
    environment.filters["json"] = _json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _part(name: str) -> str | None:
    return (TEMPLATES_FOLDER / name).read_text(encoding="utf-8") if name in _PARTS else None


_NEWLINES = re.compile(r"[\r\n]+")
_BLANK_BEFORE_TURN = re.compile(r"[\r\n]+(?=(?:System|User|Assistant):)")


def _one_line_breaks(text: str, is_trimmed: bool = True) -> str:
    return _NEWLINES.sub("\n", text.strip() if is_trimmed else text.strip("\r\n"))


def _open_line_breaks(text: str) -> str:
    return _NEWLINES.sub("\n", text.lstrip())


def _no_turns(text: str, is_open: bool = False, is_trimmed: bool = True) -> str:
    if is_trimmed:
        text = text.lstrip() if is_open else text.strip()
    return _BLANK_BEFORE_TURN.sub("\n", text)


def _json(value: object) -> str:
    # Newlines are escaped: JSON on one line ends no turn.
    return json.dumps(value, ensure_ascii=False)


def _raise_exception(message: Any) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(str(message))
