"""Plots as inline SVG: the spread of a measure for each model, and intervals of differences.

Colours are variables of the page, so that one drawing does for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from mrss_provider.compare.comparison import Comparison

_WIDTH = 760
_LABEL = 250
_ROW = 30
_AXIS = 26
_PAD = 14
# More points than this look the same and make the page slow.
_MAX_POINTS = 300


def spread(title: str, rows: Sequence[tuple[str, Sequence[float]]], unit: str) -> str:
    """Draw one row of points for each model, on a logarithmic axis, with median and middle half.

    Args:
        title: what is drawn, for screen readers too.
        rows: label and values above 0; "" is drawn where there are none.
        unit: of the axis.
    """
    values = [value for _, row in rows for value in row if value > 0]
    if not values:
        return ""
    low, high = min(values), max(values)
    low, high = (low / 1.25, high * 1.25) if high / low < 1.5 else (low / 1.05, high * 1.05)
    scale = _scale(math.log(low), math.log(high))
    parts = [_ticks_log(low, high, len(rows), lambda v: scale(math.log(v)), unit)]
    for i, (label, row) in enumerate(rows):
        y = _PAD + _ROW * i + _ROW / 2
        parts.append(_label(label, y))
        row = [value for value in row if value > 0]
        if row:
            parts.append(_points(row, y, i, lambda v: scale(math.log(v))))
    return _svg(title, len(rows), parts)


def intervals(title: str, comparisons: Sequence[Comparison]) -> str:
    """Draw one interval for each comparison, all of one kind, and the line of no difference."""
    if not comparisons:
        return ""
    is_ratio = comparisons[0].kind == "ratio"
    nothing = 1.0 if is_ratio else 0.0
    ends = [nothing]
    for c in comparisons:
        ends += [end for end in (c.low, c.value, c.high) if end is not None]
    place: Callable[[float], float] = (lambda v: math.log(v)) if is_ratio else (lambda v: v)
    placed = [place(end) for end in ends if not is_ratio or end > 0]
    low, high = min(placed), max(placed)
    margin = 0.06 * (high - low) or (0.1 if is_ratio else 0.5)
    scale = _scale(low - margin, high + margin)
    parts = [_line(scale(place(nothing)), len(comparisons), "none")]
    for i, c in enumerate(comparisons):
        y = _PAD + _ROW * i + _ROW / 2
        left = scale(low - margin if c.low is None else place(c.low))
        right = scale(high + margin if c.high is None else place(c.high))
        kind = "found" if c.winner else "unfound"
        text = f"{c.value:.3g}" + (" times" if is_ratio else "")
        parts += [
            _label(f"{c.a} : {c.b}", y),
            f'<line class="{kind}" x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>',
            f'<circle class="{kind}" cx="{scale(place(c.value)):.1f}" cy="{y}" r="4">'
            f"<title>{escape(c.sentence)}</title></circle>",
            f'<text class="value" x="{_WIDTH - 4}" y="{y + 4}">{escape(text)}</text>',
        ]
    y = _PAD + _ROW * len(comparisons) + 16
    word = "1: the same" if is_ratio else "0: the same"
    parts.append(f'<text class="tick" x="{scale(place(nothing)):.1f}" y="{y}">{word}</text>')
    return _svg(title, len(comparisons), parts)


def _scale(low: float, high: float) -> Callable[[float], float]:
    left, right = _LABEL + _PAD, _WIDTH - 80
    span = (high - low) or 1.0
    return lambda value: left + (right - left) * (value - low) / span


def _points(row: Sequence[float], y: float, number: int, at: Callable[[float], float]) -> str:
    step = max(1, math.ceil(len(row) / _MAX_POINTS))
    dots = "".join(
        # A fixed pattern of heights keeps equal values apart.
        f'<circle class="dot m{number}" cx="{at(value):.1f}" cy="{y + (j * 7) % 13 - 6:.1f}" '
        'r="2.2"/>'
        for j, value in enumerate(sorted(row)[::step])
    )
    first, median, third = (float(q) for q in np.quantile(row, (0.25, 0.5, 0.75)))
    return (
        f'<rect class="middle" x="{at(first):.1f}" width="{max(1.0, at(third) - at(first)):.1f}" '
        f'y="{y - 9}" height="18"/>{dots}'
        f'<line class="median" x1="{at(median):.1f}" x2="{at(median):.1f}" '
        f'y1="{y - 10}" y2="{y + 10}"/>'
        f'<text class="value" x="{_WIDTH - 4}" y="{y + 4}">{median:.3g}</text>'
    )


def _ticks_log(
    low: float, high: float, num_rows: int, at: Callable[[float], float], unit: str
) -> str:
    steps = [1, 2, 5] if math.log10(high / low) < 2.5 else [1]
    parts = []
    y = _PAD + _ROW * num_rows + 16
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for step in steps:
            value = step * 10.0**power
            if low <= value <= high:
                parts.append(_line(at(value), num_rows, "grid"))
                text = escape(f"{value:g} {unit}".strip())
                parts.append(f'<text class="tick" x="{at(value):.1f}" y="{y}">{text}</text>')
    return "".join(parts)


def _line(x: float, num_rows: int, kind: str) -> str:
    bottom = _PAD + _ROW * num_rows
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{_PAD}" y2="{bottom}"/>'


def _label(text: str, y: float) -> str:
    shown = text if len(text) <= 40 else text[:19] + "…" + text[-20:]
    return (
        f'<text class="label" x="{_LABEL}" y="{y + 4}">{escape(shown)}'
        f"<title>{escape(text)}</title></text>"
    )


def _svg(title: str, num_rows: int, parts: Sequence[str]) -> str:
    height = 2 * _PAD + _ROW * num_rows + _AXIS
    return (
        f'<svg role="img" viewBox="0 0 {_WIDTH} {height}" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
