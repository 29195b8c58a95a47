"""Traces on the wire: what the `mrss` object of an answer or chunk says of its tokens.

A token's bytes are spelled as completions spell them (`token_text`), numbers as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from mrss_provider.backend import TokenTrace, TraceSummary
from mrss_provider.openai_schema.spelling import token_bytes, token_text

_NAMES = tuple(field.name for field in fields(TokenTrace))


def trace_fields(tokens: Sequence[TokenTrace], summary: TraceSummary | None) -> dict[str, Any]:
    """Write a trace as entries of an `mrss` object; empty if nothing was traced."""
    entries: dict[str, Any] = {}
    if tokens:
        entries["tokens"] = [token_trace_to_dict(token) for token in tokens]
    if summary is not None:
        entries["spoken_share"] = dict(summary.spoken_share)
        entries["influence_half_life"] = dict(summary.influence_half_life)
    return entries


def read_trace(mrss: Mapping[str, Any]) -> tuple[tuple[TokenTrace, ...], TraceSummary | None]:
    """Read what `trace_fields` wrote.

    Raises:
        KeyError, TypeError, ValueError: somebody else wrote it.
    """
    summary = None
    if "spoken_share" in mrss:
        summary = TraceSummary(mrss["spoken_share"], mrss["influence_half_life"])
    return tuple(_token_from_dict(raw) for raw in mrss.get("tokens", ())), summary


def token_trace_to_dict(trace: TokenTrace) -> dict[str, Any]:
    """Write one token's trace under the names of its attributes."""
    written = {name: getattr(trace, name) for name in _NAMES}
    written["token"] = token_text(trace.token)
    written["would_say"] = {name: token_text(token) for name, token in trace.would_say.items()}
    return written


def _token_from_dict(raw: Mapping[str, Any]) -> TokenTrace:
    would_say = {name: token_bytes(text) for name, text in raw["would_say"].items()}
    return TokenTrace(**{**raw, "token": token_bytes(raw["token"]), "would_say": would_say})
