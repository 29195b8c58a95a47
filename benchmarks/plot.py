"""Plots of the kept results: docs/images/*.svg, from the newest line of each cell.

    python benchmarks/plot.py

A curve is of one card, the one that its newest line is of. A figure for which there are no lines
is left as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cells import Line, matching, newest, one_card, read_lines
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("0.1b", "1.5b", "7.2b")
MIXTURE_MODELS = ("1.5b", "7.2b")
# Name, merge and gate of what a curve shows, and how.
MIXTURES = (
    ("linear, fixed weights", "linear", "fixed", "o-"),
    ("delta, novelty (default; one base row more)", "delta", "novelty", "s-"),
)
ENGINES = ("mrss", "albatross", "rwkv_lightning", "rwkv", "fla")
# Equal input gives an equal file.
STYLE = {
    "svg.hashsalt": "mrss",
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def mixture_states(lines: list[Line]) -> Any | None:
    """Steps per second against the states of a request, a panel a model and number of requests."""
    cells = matching(newest(lines), benchmark="mixture", dtype="fp16", state_dtype="fp32")
    counts = sorted({line["requests"] for line in cells})
    if not cells:
        return None
    figure, grid = plt.subplots(
        len(counts),
        len(MIXTURE_MODELS),
        figsize=(3.6 * len(MIXTURE_MODELS), 2.6 * len(counts) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for row, requests in zip(grid, counts, strict=True):
        for axes, model in zip(row, MIXTURE_MODELS, strict=True):
            own = one_card(matching(cells, model=model, requests=requests))
            if own:
                _draw_mixture(axes, own, f"{model}, {_requests(requests)}")
            else:
                axes.set_axis_off()
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _draw_mixture(axes: Axes, cells: list[Line], title: str) -> None:
    single = {line["states"]: line["steps_per_s"] for line in matching(cells, states=1)}
    for label, merge, gate, style in MIXTURES:
        own = matching(cells, merge=merge, gate=gate)
        steps = single | {line["states"]: line["steps_per_s"] for line in own}
        axes.plot(sorted(steps), [steps[k] for k in sorted(steps)], style, label=label, ms=4)
    limits = {line["states"]: line["limit_per_s"] for line in matching(cells, merge="linear")}
    limits |= {line["states"]: line["limit_per_s"] for line in matching(cells, states=1)}
    axes.plot(
        sorted(limits), [limits[k] for k in sorted(limits)], ":", color="gray", label="memory limit"
    )
    axes.set_title(f"{title}\n{_card(cells)}", fontsize=9)
    axes.set_xlabel("states of a request")
    axes.set_ylabel("steps / s")
    axes.set_xticks(sorted({line["states"] for line in cells}))
    axes.set_ylim(bottom=0)


def decode_bandwidth(lines: list[Line]) -> Any | None:
    """Bytes that a decode step must move, times steps per second, against rows."""
    cells = matching(
        newest(lines), benchmark="decode", engine="mrss", dtype="fp16", state_dtype="fp32"
    )
    if not cells:
        return None
    figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    reads: dict[str, float] = {}
    for model in MODELS:
        own = sorted(one_card(matching(cells, model=model)), key=lambda line: line["rows"])
        if not own:
            continue
        # limit_per_s is the read bandwidth over those bytes.
        tb_per_s = [x["steps_per_s"] / x["limit_per_s"] * x["read_tb_per_s"] for x in own]
        axes.plot([x["rows"] for x in own], tb_per_s, "o-", ms=4, label=f"{model}, {_card(own)}")
        reads[_card(own)] = max(x["read_tb_per_s"] for x in own)
    for card, read in reads.items():
        axes.axhline(read, ls=":", color="gray", label=f"a plain read, {card}")
    _rows_axis(axes)
    axes.set_ylabel("weights and states moved, TB / s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def decode_engines(lines: list[Line]) -> Any | None:
    """Tokens per second against rows, ours and other engines', a panel a model."""
    cells = matching(newest(lines), benchmark="decode", dtype="fp16")
    models = [m for m in MODELS if any(x["engine"] != "mrss" for x in matching(cells, model=m))]
    if not models:
        return None
    figure, row = plt.subplots(
        1, len(models), figsize=(3.8 * len(models), 3.4), squeeze=False, layout="constrained"
    )
    for axes, model in zip(row[0], models, strict=True):
        # Beside each other only what one card ran.
        rivals = [x for x in matching(cells, model=model) if x["engine"] != "mrss"]
        card = one_card(rivals)[0]["card"]
        for engine in ENGINES:
            own = matching(cells, model=model, engine=engine, card=card)
            for state_dtype in sorted({line["state_dtype"] for line in own}):
                points = sorted(
                    matching(own, state_dtype=state_dtype), key=lambda line: line["rows"]
                )
                label = f"{engine}, {state_dtype} state"
                rows = [x["rows"] for x in points]
                axes.plot(rows, [x["tokens_per_s"] for x in points], "o-", ms=3, label=label)
        _rows_axis(axes)
        axes.set_yscale("log")
        axes.set_title(f"{model}, {card.removeprefix('NVIDIA ')}", fontsize=9)
        axes.set_ylabel("tokens / s")
        axes.legend(fontsize=7)
    return figure


def _rows_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("rows")


FIGURES = {
    "mixture_states": ("mixture", mixture_states),
    "decode_bandwidth": ("decode", decode_bandwidth),
    "decode_engines": ("decode", decode_engines),
}


def main() -> None:
    """Draw every figure that there are lines for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    mpl.use("svg")
    for name, (benchmark, draw) in FIGURES.items():
        with mpl.rc_context(STYLE):
            figure = draw(read_lines(args.results / f"{benchmark}.jsonl"))
            if figure is None:
                print(f"{name}: no lines in {benchmark}.jsonl")
                continue
            path = args.out / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            plt.close(figure)
            print(path)


def _card(lines: list[Line]) -> str:
    return str(lines[0]["card"]).removeprefix("NVIDIA ") if lines else ""


def _requests(count: int) -> str:
    return "one request" if count == 1 else f"{count} requests"


if __name__ == "__main__":
    main()
