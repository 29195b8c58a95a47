"""Plot of `models.demo.evidence`: docs/images/evaluation_front.svg, knowledge against tone.

python benchmarks/plot_evaluation.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from plot import ROOT, STYLE

RESULTS = ROOT / "benchmarks/results/evaluation_seeds.json"
IMAGE = ROOT / "docs/images/evaluation_front.svg"

BASES = ("first base", "second base")
CURVES = ("linear~fixed", "geometric~fixed", "delta~fixed", "delta~novelty")
DEFAULT = "mixture-default"
# Points, and where their names stand from them, in points.
ONE_ROW = {
    "base": (5, 4),
    "knowledge alone": (-66, 8),
    "tone alone": (-2, -14),
    "average": (5, 4),
    "sum": (5, 4),
    "union": (5, 4),
    "sequential-kt": (4, -12),
    "sequential-tk-held": (-92, -24),
    "joint": (-40, -12),
}


def main() -> None:
    """Draw both bases."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    with mpl.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(BASES), figsize=(8.6, 4.2), sharey=True, layout="constrained"
        )
        for axes, base in zip(panels, BASES, strict=True):
            _draw(axes, runs[base])
            axes.set(title=base, xlabel="knows, T=1", xlim=(-0.03, 1.04), ylim=(-0.05, 1.08))
        panels[0].set_ylabel("has the voice, T=1")
        panels[0].legend(loc="lower left", bbox_to_anchor=(0.02, 0.15), fontsize=8)
        figure.savefig(IMAGE, metadata={"Date": None})


def _draw(axes: Axes, report: Mapping[str, Any]) -> None:
    """Draw means over the pairs of a base."""
    for method in CURVES:
        points = zip(*(pair["curves"][method] for pair in report["pairs"]), strict=True)
        means = [(_mean(same, "knowledge"), _mean(same, "tone")) for same in points]
        axes.plot(*zip(*means, strict=True), "o-", ms=3, lw=1, label=method.replace("~", ", "))
    by_name = {system["name"]: system for system in report["systems"]}
    for name, offset in ONE_ROW.items():
        if name in by_name:
            at = by_name[name]["knowledge"], by_name[name]["tone"]
            axes.plot(*at, "x", color="0.25", ms=5)
            axes.annotate(name, at, offset, textcoords="offset points", fontsize=7, color="0.25")
    default = by_name[DEFAULT]
    axes.plot(default["knowledge"], default["tone"], "*", ms=12, color="black", label="the default")


def _mean(points: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(point[key] for point in points) / len(points)


if __name__ == "__main__":
    main()
