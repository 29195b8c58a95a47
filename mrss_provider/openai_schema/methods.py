"""Merge rules and gates as one object: what a program needs to offer them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mrss_provider.mixture import (
    DEFAULT_CUT,
    DEFAULT_GATE,
    DEFAULT_MERGE,
    GATES,
    MERGES,
    Parameter,
)


def methods_object(trained: Sequence[str]) -> dict[str, Any]:
    """Write every merge rule and gate with its parameters, in the order that a name has them.

    Args:
        trained: names of the trained gates, which the gate `learned` takes.
    """
    return {
        "object": "mrss.methods",
        "merges": [
            {"name": name, "parameters": _parameters(parameters, trained)}
            for name, parameters in MERGES.items()
        ],
        "gates": [
            {
                "name": name,
                "parameters": _parameters(parameters, trained),
                "needs_training": any(parameter.kind == "file" for parameter in parameters),
            }
            for name, parameters in GATES.items()
        ],
        "default": {"merge": DEFAULT_MERGE.text, "gate": DEFAULT_GATE.text, "cut": DEFAULT_CUT},
    }


def _parameters(parameters: Sequence[Parameter], trained: Sequence[str]) -> list[dict[str, Any]]:
    return [_parameter(parameter, trained) for parameter in parameters]


def _parameter(parameter: Parameter, trained: Sequence[str]) -> dict[str, Any]:
    about: dict[str, Any] = {"name": parameter.name, "default": parameter.default}
    if parameter.kind == "number":
        about["range"] = [parameter.low, parameter.high]
    elif parameter.kind == "flag":
        about["choices"] = [True, False]
    elif parameter.kind == "choice":
        about["choices"] = list(parameter.choices)
    elif parameter.kind == "file":
        about["choices"] = list(trained)
    else:
        about["format"] = parameter.allowed
    return about | {"doc": parameter.doc}
