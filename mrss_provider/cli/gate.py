"""`mrss gate list`: which merge rules and gates there are, and what they take. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from mrss_provider.cli.output import answer, answer_json, table
from mrss_provider.mixture import GATES, MERGES, Parameter
from mrss_provider.openai_schema.methods import methods_object

_TRAINED = "gates/*.safetensors"
"""In the folder of states."""


def list_methods(states: Path, as_json: bool) -> None:
    """Print every merge rule and gate with its parameters; the trained gates of the folder too."""
    trained = sorted(path.stem for path in states.glob(_TRAINED))
    if as_json:
        methods = methods_object(trained)
        answer_json({kind: methods[kind] for kind in ("gates", "merges")})
        return
    header = ("PARAMETER", "DEFAULT", "ALLOWED", "WHAT IT IS")
    for title, methods in (("MERGE RULE", MERGES), ("GATE", GATES)):
        rows = [row for name in methods for row in _rows(name, methods[name], trained)]
        answer(table((title, *header), rows) + "\n")


def _rows(name: str, parameters: tuple[Parameter, ...], trained: list[str]) -> list[list[str]]:
    """Return a line a parameter, the method's name on the first of them."""
    rows = [
        [
            parameter.name,
            _default(parameter),
            (", ".join(trained) or "none yet") if parameter.kind == "file" else _short(parameter),
            parameter.doc,
        ]
        for parameter in parameters
    ] or [[""] * 4]
    return [[name if i == 0 else "", *row] for i, row in enumerate(rows)]


def _default(parameter: Parameter) -> str:
    if isinstance(parameter.default, float):
        return f"{parameter.default:g}"
    return "" if parameter.default is None else str(parameter.default).lower()


def _short(parameter: Parameter) -> str:
    if parameter.kind == "number":
        return f"{parameter.low:g} to {parameter.high:g}"
    if parameter.kind == "points":
        return "state=factor@position,..."
    return " or ".join(parameter.choices or ("true", "false"))
