"""The tables of docs/evaluation.md: from `models.demo.measure_gates`, and from `mrss evaluate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks/results/gates.json"
WHOLE = RESULTS.with_name("evaluation.json")
FADING = RESULTS.with_name("fading.json")

DECODINGS = ("T=1", "top-p 0.7", "greedy")
_HEADER = [*DECODINGS, "nats a token: facts / others", "all"]
_SAME = "knowledge:1.0+"


def gates() -> list[list[str]]:
    """Every rule with every gate. Best weights that are the equal ones have no row of their own."""
    rows = [["rule, gate", *_HEADER]]
    for title, row in _results()["rows"].items():
        if not row.get("mixture", "").startswith(_SAME):
            rows.append([_title(title, row), *_cells(row)])
    return rows


def evaluation() -> list[list[str]]:
    """Every system of `mrss evaluate`; the default's gain is of `both` at T=1."""
    report = json.loads(WHOLE.read_text(encoding="utf-8"))
    (pair,) = report["pairs"]
    rows = [["system", "rows", *DECODINGS, "the default gains, T=1"]]
    for system in pair["systems"]:
        cells = []
        for name in DECODINGS:
            know, tone, both = (
                system["decodings"][name][part][0] for part in ("know", "tone", "both")
            )
            cells.append(f"{_share(know)} / {_share(tone)} / **{_share(both)}**")
        found = pair["gains"]["T=1"].get(system["name"])
        gain = "" if found is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found["gain"])
        rows.append([system["name"], str(system["rows"]), *cells, gain])
    return rows


def gains() -> list[list[str]]:
    """What the learned gate gains over others."""
    rows = [["learned against", *(f"`both`, {name}" for name in DECODINGS), "nats less"]]
    return rows + [
        [pair.replace("learned - ", ""), *_differences(row)]
        for pair, row in _results()["pairs"].items()
    ]


def domains() -> list[list[str]]:
    """Two states of knowledge beside a voice."""
    rows = [["rule, gate", *_HEADER]]
    return rows + [
        [f"`{title}` alone" if "," not in title else title, *_cells(row)]
        for title, row in _results()["domains"]["rows"].items()
    ]


def domain_gains() -> list[list[str]]:
    """What choosing between the two gains."""
    rows = [["under", *(f"`both`, {name}" for name in DECODINGS), "nats less"]]
    pairs = _results()["domains"]["posterior-novelty - novelty"]
    return rows + [[merge, *_differences(row)] for merge, row in pairs.items()]


def fading() -> list[list[str]]:
    """What each line is about, at every distance: as it is, and given anew at turns."""
    report = json.loads(FADING.read_text(encoding="utf-8"))
    turns = (0, 1, 2, 5, 10)
    first = next(iter(report["cells"].values()))
    lengths = [first[f"{n} never"]["prompt_tokens"] for n in turns]
    after = ["at once", "1 turn on", *(f"{n} turns on" for n in turns[2:])]
    heads = [f"{name} ({length})" for name, length in zip(after, lengths, strict=True)]
    rows = [["", "reinject", *heads]]
    for line in report["lines"]:
        cells, part = report["cells"][_line(line)], line["wanted"]
        for how in ("never", "turn"):
            name = f"{_line(line)}: {part}" if how == "never" else ""
            told = [_with_interval(cells[f"{n} {how if n else 'never'}"][part]) for n in turns]
            rows.append([name, f"`{how}`", *told])
    return rows


def _line(line: Mapping[str, str]) -> str:
    talk = "plain talk" if line["history"] == "plain" else f"a {line['history']}'s talk"
    told = ", facts told in the chat" if line["town"] == "told" else ""
    return f"`{line['mixture']}`, {talk}{told}"


def _with_interval(share: list[float]) -> str:
    mean, low, high = map(_share, share)
    return f"**{mean}** [{low}, {high}]"


def _results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def _title(title: str, row: Mapping[str, Any]) -> str:
    if "mixture" not in row:
        return title if title == "base" else f"`{title}` alone"
    terms = row["mixture"].split("~")[0]
    return f"{title}: `{terms}`" if "best by" in title else title


def _cells(row: Mapping[str, Any]) -> list[str]:
    shares = []
    for name in DECODINGS:
        know, tone, both = (row[name][part] for part in ("know", "tone", "both"))
        interval = f"[{_share(both[1])}, {_share(both[2])}]"
        shares.append(f"{_share(know[0])} / {_share(tone[0])} / **{_share(both[0])}** {interval}")
    nats = f"{row['nll_fact'][0]:.3f} / {row['nll_other'][0]:.3f}"
    mean, low, high = row["nll"]
    return [*shares, nats, f"{mean:.3f} [{low:.3f}, {high:.3f}]"]


def _differences(row: Mapping[str, Any]) -> list[str]:
    found = [row[name] for name in (*DECODINGS, "nll")]
    return ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*values) for values in found]


def _share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1.00"
