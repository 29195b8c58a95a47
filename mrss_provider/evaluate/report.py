"""A report of an evaluation as one HTML file: tables, curves, answers side by side.

The page loads nothing and has no script. What a model wrote is text in it, never HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from mrss_provider.evaluate.plots import Line, Point, line_plot, scatter_plot
from mrss_provider.evaluate.systems import DEFAULT

Row = Mapping[str, Any]

_PARTS = ("know", "tone", "both")
# What a state alone is asked for, at a distance.
_PART_OF = {"knowledge alone": "knowledge", "tone alone": "tone"}
_UNMEASURED = "<p>Not measured.</p>"
_HOLDS = {True: "yes", False: "no", None: "not measured"}


def report_page(report: Row) -> str:
    """Return the page of a report as `run` returns it."""
    template = Template(files(__package__).joinpath("report_page.html").read_text("utf-8"))
    first = report["pairs"][0]
    return template.substitute(
        title=escape(f"{report['model']}: {report['task']}"),
        verdict=_verdict(report),
        systems=_systems(report["systems"]),
        decodings=_decodings(first["systems"]),
        front=_front(first),
        distance=_distance(first["distance"]),
        temperature=_temperature(first["temperatures"]),
        gains=_gains(first["gains"]),
        samples=_samples(first["samples"]),
        about=escape(_about(report)),
    )


def _about(report: Row) -> str:
    num_pairs = len(report["pairs"])
    parts = [
        f"{report['facts']} facts, {report['samples']} answers a fact and system, seed "
        f"{report['seed']}, {num_pairs} pair{'s' * (num_pairs > 1)} of states; model "
        f"{report['model_fingerprint'][:12]}."
    ]
    if num_pairs > 1:
        parts.append(
            "The first table has the answers of all pairs; curves, gains and samples are the first "
            "pair's."
        )
    if report["tone_accuracy"] is not None:
        parts.append(
            f"The manner is told by a classifier that is right about {report['tone_accuracy']:.2f} "
            "of texts that it was not trained on."
        )
    return " ".join(parts)


def headline(report: Row) -> str:
    """Return the verdict in one sentence."""
    if report["works"] is None:
        remedy = "; run it without --quick" if report["quick"] else ", see which below"
        return f"no condition fails, but some were not measured{remedy}"
    if report["works"]:
        return "mixing works here: every condition holds for every pair"
    return "mixing does not meet all conditions here; see which below"


def _verdict(report: Row) -> str:
    parts = [f"<p><strong>{escape(headline(report))}</strong></p>"]
    for number, pair in enumerate(report["pairs"]):
        title = f"Pair {number + 1}" if len(report["pairs"]) > 1 else "Conditions"
        rows = [
            (condition["text"], condition["value"], _HOLDS[condition["holds"]])
            for condition in (*pair["preconditions"], *pair["conditions"])
        ]
        parts.append(f"<h3>{title}</h3>" + table(("condition", "measured", "holds"), rows))
        parts += [f"<p>{escape(text)}</p>" for text in pair["negatives"]]
    return "".join(parts)


def _systems(systems: Sequence[Row]) -> str:
    rows = [
        (
            system["name"] + (" (trained on both)" if system["trained_on_both"] else ""),
            str(system["rows"]),
            f"{system['knowledge']:.2f}",
            f"{system['tone']:.2f}",
            f"{system['both']:.2f}",
            f"{system['ci_both'][0]:.2f} to {system['ci_both'][1]:.2f}",
            "" if system["nll"] is None else f"{system['nll']:.3f}",
        )
        for system in systems
    ]
    return table(("system", "rows", "know", "tone", "both", "95 %", "nats a token"), rows)


def _decodings(systems: Sequence[Row]) -> str:
    names = list(systems[0]["decodings"])
    rows = []
    for system in systems:
        cells = [
            " / ".join(f"{system['decodings'][name][part][0]:.2f}" for part in _PARTS)
            for name in names
        ]
        rows.append((system["name"], *cells))
    return table(("system: know / tone / both", *names), rows)


def _front(pair: Row) -> str:
    points = [
        Point(system["knowledge"], system["tone"], system["name"], system["name"] == DEFAULT)
        for system in pair["systems"]
    ]
    lines = [
        Line(method, [(p["knowledge"], p["tone"]) for p in curve])
        for method, curve in pair["curves"].items()
    ]
    areas = "".join(
        f"<li>{escape(method)}: {value:.3f}</li>" for method, value in pair["front"].items()
    )
    plot = scatter_plot(points, lines, x_label="knows", y_label="has the tone")
    note = "Area that each curve dominates above the best one-row baseline:" if areas else ""
    return f"{plot}<p>{note}</p><ul>{areas}</ul>"


def _distance(distance: Mapping[str, Sequence[Row]]) -> str:
    if not distance:
        return _UNMEASURED
    lines = []
    for name, points in distance.items():
        part = _PART_OF.get(name.split(",")[0], "both")
        lines.append(Line(f"{name}: {part}", [(p["turns"], p[part]) for p in points]))
    return line_plot(lines, x_label="turns of other talk before the question", y_label="share")


def _temperature(points: Sequence[Row]) -> str:
    if not points:
        return _UNMEASURED
    lines = [
        Line(part, [(p["temperature"], p[part]) for p in points])
        for part in ("knowledge", "tone", "both")
    ]
    return line_plot(lines, x_label="temperature", y_label="share")


def _gains(gains: Mapping[str, Mapping[str, Row]]) -> str:
    parts = []
    for decoding, others in gains.items():
        rows = []
        for name, found in others.items():
            if "gain" in found:
                mean, low, high = found["gain"]
                text = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
                rows.append((name, text, f"{found['p']:.4f}"))
            else:
                rows.append((name, "", f"{found['p']:.4f}"))
        head = ("the default over", "more of both (95 %)", "p, corrected")
        parts.append(f"<h3>{escape(decoding)}</h3>{table(head, rows)}")
    return "".join(parts)


def _samples(samples: Sequence[Row]) -> str:
    parts = []
    for sample in samples:
        rows = list(sample["answers"].items())
        parts.append(
            f"<details><summary>{escape(sample['question'])}</summary>"
            f"{table(('system', 'answer'), rows)}</details>"
        )
    return "".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of texts."""
    first = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{first}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
