"""`mrss gate list`: which merge rules and gates there are, and what they take. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mrss_provider.cli.output import answer, answer_json, table
from mrss_provider.mixture import GATES, MERGES, Parameter

_TRAINED = "gates/*.safetensors"
"""In the folder of states."""


def list_methods(states: Path, as_json: bool) -> None:
    """Print every merge rule and gate with its parameters; the trained gates of the folder too."""
    trained = sorted(path.stem for path in states.glob(_TRAINED))
    if as_json:
        gates = [
            {
                "name": name,
                "parameters": [_about(parameter, trained) for parameter in parameters],
                "needs_training": any(parameter.kind == "file" for parameter in parameters),
            }
            for name, parameters in GATES.items()
        ]
        merges = [
            {"name": name, "parameters": [_about(parameter, trained) for parameter in parameters]}
            for name, parameters in MERGES.items()
        ]
        answer_json({"gates": gates, "merges": merges})
        return
    header = ("PARAMETER", "DEFAULT", "ALLOWED", "WHAT IT IS")
    for title, methods in (("MERGE RULE", MERGES), ("GATE", GATES)):
        rows = [row for name in methods for row in _rows(name, methods[name], trained)]
        answer(table((title, *header), rows) + "\n")


def _about(parameter: Parameter, trained: list[str]) -> dict[str, Any]:
    about: dict[str, Any] = {"name": parameter.name, "default": parameter.default}
    if parameter.kind == "number":
        about["range"] = [parameter.low, parameter.high]
    elif parameter.kind == "flag":
        about["choices"] = [True, False]
    elif parameter.kind == "choice":
        about["choices"] = list(parameter.choices)
    elif parameter.kind == "file":
        about["choices"] = trained
    else:
        about["format"] = parameter.allowed
    return about | {"doc": parameter.doc}


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
