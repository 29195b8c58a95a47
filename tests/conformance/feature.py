"""What is asked of every client on every route: a function a feature, which raises where it fails.

`ask` is a client (`clients.py`, `frameworks.py`) on a route; a client without the method that a
feature needs cannot ask for it at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Ask = Any
HI = [{"role": "user", "content": "Where is the lighthouse?"}]
GREEDY = {"temperature": 0.0, "max_tokens": 12}
DRAWN = {"temperature": 1.0, "seed": 7, "max_tokens": 12}


@dataclass(frozen=True)
class Feature:
    """A row of the table.

    Attributes:
        name: what the table says.
        check: asks and asserts.
        needs: the method that a client must have.
        group: heading of the table.
        short: among the cells of `make test`.
    """

    name: str
    check: Callable[[Ask], None]
    needs: str
    group: str
    short: bool = False


FEATURES: list[Feature] = []


def feature(
    name: str, group: str, needs: str = "chat", *, short: bool = False
) -> Callable[..., Any]:
    """Enter the function below into the table."""

    def enter(check: Callable[[Ask], None]) -> Callable[[Ask], None]:
        FEATURES.append(Feature(name, check, needs, group, short))
        return check

    return enter
