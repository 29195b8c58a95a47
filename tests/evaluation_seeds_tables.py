"""The tables of docs/evaluation.md over tuning seeds and bases, from `models.demo.evidence`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks/results/evaluation_seeds.json"

BASES = ("first base", "second base")
PLAIN = ", no locality"
_DEFAULT = "mixture-default"
_HELD = "sequential-tk-held"
_PARTS = ("know", "tone", "both")
_KNOWS = "knowledge alone, plain talk"


def seeds() -> list[list[str]]:
    """Every system with the pairs of both bases, and what the default gains over it."""
    header = ["system", "rows"]
    for base in BASES:
        header += [f"{base}, T=1", "top-p 0.7, by seed"]
    rows = [[*header, "the default gains, top-p 0.7"]]
    for system in _run(BASES[0])["systems"]:
        name = system["name"]
        row = [name, str(system["rows"])]
        for base in BASES:
            report = _run(base)
            both = [_of(pair, name, "top-p 0.7") for pair in report["pairs"]]
            shown = [_share(one[2]) if one else "not tuned" for one in both]
            row += [f"{_shares(report, name, 'T=1')} {_interval(report, name)}", " ".join(shown)]
        rows.append([*row, "" if name == _DEFAULT else _gains(name)])
    return rows


def _interval(report: Mapping[str, Any], name: str) -> str:
    """Return the interval of both of the pairs together, if all of them have the system."""
    own = [system for system in report["systems"] if system["name"] == name]
    return "[{}, {}]".format(*map(_share, own[0]["ci_both"])) if own else ""


def _gains(name: str) -> str:
    """Return the least and the most that the default has more of both than a system."""
    pairs = [pair for base in BASES for pair in _run(base)["pairs"]]
    found = [pair["gains"]["top-p 0.7"].get(name) for pair in pairs]
    gains = [one["gain"] for one in found if one is not None]
    sure = sum(low > 0 for _, low, _ in gains)
    means = [mean for mean, _, _ in gains]
    return f"{min(means):+.2f} to {max(means):+.2f}; {sure} of {len(gains)} sure"


def seed_conditions() -> list[list[str]]:
    """What the verdict asks of every pair, and what was measured."""
    pairs = [(base, number) for base in BASES for number in range(len(_run(base)["pairs"]))]
    rows = [["condition", *(f"{base}, seed {number + 1}" for base, number in pairs)]]
    of_pairs = [_run(base)["pairs"][number] for base, number in pairs]
    listed = [[*pair["preconditions"], *pair["conditions"]] for pair in of_pairs]
    for place in range(len(listed[0])):
        cells = [conditions[place] for conditions in listed]
        rows.append([_limit(cells[0]["text"]), *(_told(cell) for cell in cells)])
        if rows[-1][0].startswith("both, beyond"):
            others = [_beyond_others(pair) for pair in of_pairs]
            rows.append([f"the same without `{_HELD}`", *(f"{value:.3f}" for value in others)])
    return rows


def _beyond_others(pair: Mapping[str, Any]) -> float:
    """Return what the default has more than the best one-row baseline but one, at top-p 0.7."""
    names = [one["name"] for one in pair["systems"] if one["is_baseline"] and one["name"] != _HELD]
    best = max(_of(pair, name, "top-p 0.7")[2] for name in names)
    return _of(pair, _DEFAULT, "top-p 0.7")[2] - best


def seed_methods() -> list[list[str]]:
    """Merge rules and gates: `both` with knowledge that was tuned with and without locality."""
    header = ["merge rule, gate", "rows"]
    for kind in ("locality", "no locality"):
        header += [f"{kind}: T=1", "top-p 0.7", "worst pair, T=1"]
    rows = [header]
    for system in _run(BASES[0] + PLAIN)["systems"]:
        name = system["name"]
        if name != _DEFAULT and ", " not in name:
            continue
        row = [
            "**delta, novelty** (the default)" if name == _DEFAULT else name,
            str(system["rows"]),
        ]
        for ending in ("", PLAIN):
            pairs = [pair for base in BASES for pair in _run(base + ending)["pairs"]]
            at_t1, at_top_p = (
                [_of(pair, name, decoding)[2] for pair in pairs]
                for decoding in ("T=1", "top-p 0.7")
            )
            row += [_share(_mean(at_t1)), _share(_mean(at_top_p)), _share(min(at_t1))]
        rows.append(row)
    return rows


def seed_distance() -> list[list[str]]:
    """How far the states reach: shares after turns of talk, at top-p 0.7, means over seeds."""
    ways = _results()["distance"]
    first = ways["never"][BASES[0]][0][_KNOWS]
    rows = [
        [
            "",
            "reinject",
            *(f"{n} turn" + "s" * (n != 1) for n in (point["turns"] for point in first)),
        ]
    ]
    for base in BASES:
        alone = _far(ways["never"][base], _KNOWS, "knowledge")
        rows.append([f"{base}: `knowledge`, plain talk: know", "`never`", *alone])
        for history in ("toned", "plain"):
            for way, pairs in ways.items():
                title = f"{base}: the default, {history} talk: both"
                far = _far(pairs[base], f"{_DEFAULT}, {history} talk", "both")
                rows.append([title, f"`{way}`", *far])
    return rows


def _far(pairs: Sequence[Mapping[str, Any]], curve: str, part: str) -> list[str]:
    """Return the means over pairs at every distance."""
    points = zip(*(pair[curve] for pair in pairs), strict=True)
    return [_share(_mean([point[part] for point in same])) for same in points]


def seed_states() -> list[list[str]]:
    """What tuning came to: nats a token of held-out chats, and the rate that they chose."""
    rows = [["state", "data", "rate, by seed", "facts", "voice", "facts in the voice"]]
    found = _results()["states"]
    for name in dict.fromkeys(state["state"] for state in found[BASES[0]]):
        for base in BASES:
            own = [state for state in found[base] if state["state"] == name]
            means = [f"{_mean([one[part] for one in own]):.3f}" for part in _NATS]
            rates = " ".join(f"{one['rate']:g}" for one in own)
            rows.append([f"`{name}`", base, rates, *means])
    return rows


_NATS = ("facts", "voice", "joint")


def _results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def _run(title: str) -> dict[str, Any]:
    found: dict[str, Any] = _results()["runs"][title]
    return found


def _of(pair: Mapping[str, Any], name: str, decoding: str) -> list[float]:
    """Return know, tone and both of a system of one pair; empty if it has no such system."""
    for own in pair["systems"]:
        if own["name"] == name:
            return [own["decodings"][decoding][part][0] for part in _PARTS]
    return []


def _shares(report: Mapping[str, Any], name: str, decoding: str) -> str:
    of_pairs = [own for pair in report["pairs"] if (own := _of(pair, name, decoding))]
    know, tone, both = (_mean(values) for values in zip(*of_pairs, strict=True))
    return f"{_share(know)} / {_share(tone)} / **{_share(both)}**"


def _limit(text: str) -> str:
    """Return a condition without what differs from pair to pair."""
    text = text.partition(", `")[0] if ", `" in text else text
    return text.partition(": at least")[0] if text.startswith(("know,", "tone,", "well")) else text


def _told(condition: Mapping[str, Any]) -> str:
    value = str(condition["value"])
    return value if condition["holds"] else f"**{value}, no**"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1.00"
