"""Whether the model thinks before it answers: `reasoning_effort`, and LiteLLM's `thinking`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrss_provider.errors import InvalidRequestError
from mrss_provider.openai_schema.checks import expect, shown

EFFORTS: Mapping[str, bool] = {
    "none": False,
    "minimal": True,
    "low": True,
    "medium": True,
    "high": True,
    "xhigh": True,
}
"""The levels, and whether the model thinks: how long it does is its own affair."""

_TYPES = {"enabled": True, "adaptive": True, "disabled": False}


def parse_thinking(known: Mapping[str, Any]) -> bool | None:
    """Return whether the answer begins with a thought; None where nothing is said.

    Raises:
        InvalidRequestError: a level that there is not, or two that differ.
    """
    effort, thinking = known.get("reasoning_effort"), known.get("thinking")
    by_effort = None if effort is None else _parse_effort(effort)
    by_type = None if thinking is None else _parse_type(thinking)
    if by_effort is not None and by_type not in (None, by_effort):
        raise InvalidRequestError(
            f"reasoning_effort and thinking must say the same when both are given, got {effort!r} "
            f"and {shown(thinking)}",
            param="thinking",
        )
    return by_type if by_effort is None else by_effort


def write_thinking(body: dict[str, Any], thinking: bool | None) -> None:
    """Write what `parse_thinking` reads into `body`, which is modified."""
    if thinking is not None:
        body["reasoning_effort"] = "medium" if thinking else "none"


def _parse_effort(effort: object) -> bool:
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise InvalidRequestError(
            f"reasoning_effort must be one of {', '.join(EFFORTS)}, got {shown(effort)}",
            param="reasoning_effort",
        )
    return EFFORTS[effort]


def _parse_type(thinking: object) -> bool:
    raw = expect(thinking, dict, "thinking", 'an object such as {"type": "enabled"}')
    kind = raw.get("type")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise InvalidRequestError(
            f"thinking.type must be one of {', '.join(_TYPES)}, got {shown(kind)}", param="thinking"
        )
    budget = raw.get("budget_tokens")
    if budget is not None:
        raise InvalidRequestError(
            "thinking.budget_tokens is refused: a thought ends when the model ends it; "
            "max_tokens limits the whole answer",
            param="thinking",
        )
    for key in raw:
        if key not in ("type", "budget_tokens"):
            raise InvalidRequestError(
                f"thinking has type only, got {shown(key)}; leave it out", param="thinking"
            )
    return _TYPES[kind]
