"""Command line options made from the configuration classes: a field, a flag, a variable, one text.

A field `max_rows` of `EngineConfig` is `--max-rows` and `MRSS_MAX_ROWS`; its help is the field's
entry in the class docstring.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer


def takes_config(
    *classes: type, only: Sequence[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of `classes`, or for those in `only`.

    The command's `overrides` parameter receives what was given on the command line.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = [
            _parameter(cls, field)
            for cls in classes
            for field in fields(cls)
            if only is None or field.name in only
        ]
        names = {option.name for option in options}
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "overrides"
        ]

        def run(**values: Any) -> None:
            overrides = {name: values.pop(name) for name in names}
            command(**values, overrides={k: v for k, v in overrides.items() if v is not None})

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        parameters = [*own, *options]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def field_help(cls: type) -> Mapping[str, str]:
    """Return field -> its entry under `Attributes:` in the docstring of `cls`, on one line."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): ((?:.|\n(?!    \w+: ))+)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _parameter(cls: type, field: Field[Any]) -> inspect.Parameter:
    hint = get_type_hints(cls)[field.name]
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if type(None) in get_args(hint):
        hint = kinds[0]
    text = re.sub(r"\bNone\b", "unset", field_help(cls)[field.name])
    option = typer.Option(help=f"{text[0].upper()}{text[1:]} [{_default_text(field.default)}]")
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[hint | None, option],
    )


def _default_text(default: object) -> str:
    if isinstance(default, Path):
        return "bundled"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, float):
        return f"{default:g}"
    return "unset" if default is None else str(default)
