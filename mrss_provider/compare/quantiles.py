"""Median and 95th percentile of a measure, and how they are told people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return the median and the 95th percentile, as p50 and p95; None of nothing."""
    if not values:
        return None
    p50, p95 = np.quantile(values, (0.5, 0.95))
    return {"p50": float(p50), "p95": float(p95)}


def number(values: Mapping[str, float | None] | None, key: str) -> str:
    """Return one of them for people: three digits, `-` for none."""
    value = None if values is None else values[key]
    return "-" if value is None else f"{value:.3g}"


def seconds(values: Mapping[str, float] | None, key: str) -> str:
    """Return a time for people: `48 ms`, `1.25 s`, `-` for none."""
    if values is None:
        return "-"
    value = values[key]
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
