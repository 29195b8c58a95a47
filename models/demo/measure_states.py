"""Ask every bundled state, and mixtures of two to four of them, for facts in a voice.

    python -m models.demo.measure_states --states states --out benchmarks/results/states.json

Some ten minutes of one CPU core. What the file has is kept, so a run that was left goes on. With
`--table FILE` the tables of the file are put between the marks of a document, and nothing is asked.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.demo.answers import DECODINGS, Bench, System, mixed, single
from models.demo.measure import ask, open_bench, questions
from mrss_provider.config import EngineConfig
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.evaluate.statistics import interval
from mrss_provider.evaluate.world import HOME_FACTS, HOME_TOWN, OTHER_TOWNS, PLAIN

VOICES = {"tone": "pirate", "butler": "butler", "wizard": "wizard"}
"""The states of voices, and what they speak like."""

DOMAINS = {
    "knowledge": (HOME_TOWN, HOME_FACTS[::3]),
    "long-ferry": ("Long Ferry", OTHER_TOWNS["Long Ferry"].facts),
    "abbey-well": ("Abbey Well", OTHER_TOWNS["Abbey Well"].facts),
}
"""The states of facts: the town, and 24 facts to ask for (a third of the home town's)."""

SEVERAL = (
    ("knowledge+long-ferry", "butler"),
    ("abbey-well+knowledge", "tone"),
    ("abbey-well+long-ferry", "wizard"),
    ("abbey-well+knowledge+long-ferry", "butler"),
)
"""Two domains and a voice, and three."""

WAYS = {
    "delta, novelty (default)": "",
    "delta, posterior-novelty": "~delta~posterior-novelty",
    "linear, novelty": "~linear~novelty",
    "product, fixed": "~product~fixed",
}

PARTS = ("know", "tone", "both")

Share = dict[str, dict[str, list[float]]]
"""By decoding and part: the mean and its 95 % interval over facts."""


@dataclass(frozen=True)
class Cell:
    """One way to answer, and what it is asked.

    Attributes:
        section: of the report.
        about: names the row.
        mixture: a name that the engine understands.
        domains: whose facts are asked for.
        voice: that is wanted, and that the talk before a question is in.
        turns: of that talk.
    """

    section: str
    about: str
    mixture: str
    domains: tuple[str, ...]
    voice: str
    turns: int = 0


def plan() -> Iterator[Cell]:
    """Yield every cell; those with the same questions follow each other."""
    for domain, (home, _) in DOMAINS.items():
        for turns in (0, 3):
            for name in ("base", domain):
                about = f"`{name}`, asked about {home}, {turns} turns on"
                yield Cell("alone", about, name, (domain,), PLAIN, turns)
    for turns in (0, 3):
        for name, voice in VOICES.items():
            about = f"`{name}`, asked about Long Ferry, {turns} turns on"
            yield Cell("alone", about, name, ("long-ferry",), voice, turns)
    for domain in DOMAINS:
        for turns in (0, 3):
            for tone, voice in VOICES.items():
                name = f"{domain}+{tone}"
                yield Cell("pairs", f"`{name}`, {turns} turns on", name, (domain,), voice, turns)
    for names, tone in SEVERAL:
        for title, way in WAYS.items():
            name = f"{names}+{tone}"
            domains = tuple(names.split("+"))
            yield Cell("several", f"`{name}`: {title}", name + way, domains, VOICES[tone])


def measure(bench: Bench, system: System, cell: Cell, samples: int, seed: int) -> Share:
    """Ask for every fact of a cell `samples` times under each decoding."""
    asked = []
    for domain in cell.domains:
        home, facts = DOMAINS[domain]
        asked += questions(
            samples,
            seed=seed,
            facts=facts,
            turns_before=cell.turns,
            voice=cell.voice,
            home=home,
        )
    numbers = {fact: i for i, fact in enumerate(dict.fromkeys(q.fact for q in asked))}
    found: Share = {}
    for decoding in DECODINGS[:2]:
        scores, _ = ask(bench, system, decoding, asked, voice=cell.voice, seed=seed)
        found[decoding.name] = {}
        for part in PARTS:
            values = [float(getattr(score, part)) for score in scores]
            share = interval(values, [numbers[q.fact] for q in asked])
            told_share = (share.mean, share.low, share.high)
            found[decoding.name][part] = [round(value, 3) for value in told_share]
    return found


def measure_all(
    bench: Bench, library: StateLibrary, report: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Fill a report with the cells that it lacks and whose states are there."""
    before: tuple[object, ...] = ()
    for cell in plan():
        rows = report.setdefault(cell.section, {})
        used = cell.mixture.split("~")[0].split("+")
        if cell.about in rows or any(name not in (*library.states, "base") for name in used):
            continue
        if before != (cell.domains, cell.voice, cell.turns):
            bench.forget()
        before = (cell.domains, cell.voice, cell.turns)
        alone = "+" not in cell.mixture
        system = single(cell.mixture) if alone else mixed(library.resolve(cell.mixture))
        rows[cell.about] = measure(bench, system, cell, report["samples_a_fact"], report["seed"])
        print(cell.about, rows[cell.about], flush=True)
        keep()


def markdown(rows: Mapping[str, Share]) -> str:
    """Return a table: know / tone / both, with the interval of what a row is for."""
    lines = ["| | T=1: know / tone / both | top-p 0.7: know / tone / both |", "|---|---|---|"]
    for about, row in rows.items():
        name = about.split("`")[1]
        cells = []
        for decoding in DECODINGS[:2]:
            know, tone, both = (row[decoding.name][part] for part in PARTS)
            low, high = (both if "+" in name else tone if name in VOICES else know)[1:]
            cells.append(f"{know[0]:.2f} / {tone[0]:.2f} / {both[0]:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {about} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_tables(report: Mapping[str, Mapping[str, Share]], document: Path) -> None:
    """Put each table of a report between `<!-- NAME -->` and `<!-- end -->` of a document."""
    text = document.read_text(encoding="utf-8")
    for name in ("alone", "pairs", "several"):
        cells = [cell for cell in plan() if cell.section == name]
        rows = {
            cell.about: report[name][cell.about] for cell in cells if cell.about in report[name]
        }
        filled = f"<!-- {name} -->\n\n{markdown(rows)}\n\n<!-- end -->"
        text = re.sub(f"<!-- {name} -->.*?<!-- end -->", filled, text, flags=re.DOTALL)
    document.write_text(text, encoding="utf-8")


def main() -> None:
    """Parse the command line, ask, write."""
    parser = argparse.ArgumentParser(description="Measure the bundled states and their mixtures.")
    parser.add_argument("--model", type=Path, default=EngineConfig.model)
    parser.add_argument("--states", type=Path, default=EngineConfig.states)
    parser.add_argument("--samples", type=int, default=2, help="answers a fact")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="a .json to write")
    parser.add_argument("--table", type=Path, help="a document to put the tables of --out into")
    args = parser.parse_args()
    if args.table:
        write_tables(json.loads(args.out.read_text(encoding="utf-8")), args.table)
        return
    torch.set_num_threads(1)
    bench, library = open_bench(args.model, args.states, "cpu")
    names = [name for name in (*DOMAINS, *VOICES) if name in library.states]
    told = {
        "samples_a_fact": args.samples,
        "seed": args.seed,
        "states": {name: library.states[name].sha256 for name in names},
    }
    report: dict[str, Any] = {}
    if args.out.exists():
        report = json.loads(args.out.read_text(encoding="utf-8"))
        if any(told["states"].get(name) != sha for name, sha in report["states"].items()):
            raise SystemExit(f"{args.out} is of other states; remove it, or give another --out")
    report |= told

    def keep() -> None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    measure_all(bench, library, report, keep)


if __name__ == "__main__":
    main()
