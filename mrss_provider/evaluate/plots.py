"""Plots as inline SVG: points and lines over two axes, with a legend in text beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 16, 48

# Far apart for all eyes; beyond them hues repeat.
HUES = (250, 55, 165, 330, 110, 290, 25, 200)


@dataclass(frozen=True)
class Point:
    """A named point; a marked one is drawn large, with its name."""

    x: float
    y: float
    name: str
    is_marked: bool = False


@dataclass(frozen=True)
class Line:
    """A named line through points, in their order."""

    name: str
    points: Sequence[tuple[float, float]]


def scatter_plot(
    points: Sequence[Point], lines: Sequence[Line], *, x_label: str, y_label: str
) -> str:
    """Return shares over shares: points with their names on demand, and lines."""
    x, y = _scale(0, 1, _LEFT, WIDTH - _RIGHT), _scale(0, 1, HEIGHT - _BOTTOM, _TOP)
    drawn = [_axes((0, 1), x, y, x_label, y_label), *_lines(lines, x, y)]
    for point in points:
        radius = 7 if point.is_marked else 4
        drawn.append(
            f'<circle class="{"marked" if point.is_marked else "point"}" cx="{x(point.x):.1f}" '
            f'cy="{y(point.y):.1f}" r="{radius}"><title>{escape(point.name)}: {point.x:.2f}, '
            f"{point.y:.2f}</title></circle>"
        )
        if point.is_marked:
            drawn.append(
                f'<text x="{x(point.x) - 10:.1f}" y="{y(point.y) + 20:.1f}" text-anchor="end">'
                f"{escape(point.name)}</text>"
            )
    return _figure(drawn, lines, f"{y_label} over {x_label}")


def line_plot(lines: Sequence[Line], *, x_label: str, y_label: str) -> str:
    """Return shares, in [0, 1], over anything."""
    values = [value for line in lines for value, _ in line.points]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    x = _scale(low, high if high > low else low + 1, _LEFT, WIDTH - _RIGHT)
    y = _scale(0, 1, HEIGHT - _BOTTOM, _TOP)
    drawn = [_axes(sorted(set(values)), x, y, x_label, y_label), *_lines(lines, x, y)]
    for number, line in enumerate(lines):
        drawn += [
            f'<circle style="--hue:{HUES[number % len(HUES)]}" class="dot" cx="{x(a):.1f}" '
            f'cy="{y(b):.1f}" r="3.5"><title>{escape(line.name)}: {a:g}, {b:.2f}</title></circle>'
            for a, b in line.points
        ]
    return _figure(drawn, lines, f"{y_label} over {x_label}")


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(
    ticks: Sequence[float],
    x: Callable[[float], float],
    y: Callable[[float], float],
    x_label: str,
    y_label: str,
) -> str:
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = y(share)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4}" text-anchor="end">{share:g}</text>')
    shown = [0, 0.25, 0.5, 0.75, 1] if tuple(ticks) == (0, 1) else ticks
    parts += [
        f'<text x="{x(tick):.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        for tick in shown
        if math.isfinite(tick)
    ]
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _lines(
    lines: Sequence[Line], x: Callable[[float], float], y: Callable[[float], float]
) -> list[str]:
    drawn = []
    for number, line in enumerate(lines):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        hue = HUES[number % len(HUES)]
        drawn.append(f'<polyline style="--hue:{hue}" class="line" points="{path}"/>')
    return drawn


def _figure(drawn: Sequence[str], lines: Sequence[Line], label: str) -> str:
    legend = "".join(
        f'<li><span class="swatch" style="--hue:{HUES[number % len(HUES)]}"></span>'
        f"{escape(line.name)}</li>"
        for number, line in enumerate(lines)
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(drawn)}</svg><ul>{legend}</ul></figure>"
    )
