"""Evaluation: one pair of states measured whole, as numbers that a report and `--json` show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mrss_provider.evaluate.asking import GREEDY, T1, TOP_P, Decoding
from mrss_provider.evaluate.judging import measured
from mrss_provider.evaluate.measuring import (
    Cell,
    Measurer,
    Plan,
    Texts,
    best_weights,
    diversity,
    gain,
    share,
)
from mrss_provider.evaluate.statistics import Interval, hypervolume, interval, mcnemar, mean
from mrss_provider.evaluate.systems import DEFAULT, DEFAULT_METHOD, Pair, System, fixed_weights
from mrss_provider.evaluate.task import History, Task
from mrss_provider.evaluate.verdict import conditions, negatives, preconditions, works
from mrss_provider.resampling import holm

_PARTS = ("know", "tone")
_NO_TEXTS = Texts([], [], [])
# Whom the talk between the state and the question is to fade, and in which manner it is.
_DISTANT: tuple[tuple[str, History], ...] = (
    ("knowledge alone", "plain"),
    ("tone alone", "toned"),
    (DEFAULT, "toned"),
    (DEFAULT, "plain"),
)
_FIXED_KEYS = ("name", "model", "rows", "trained_on_both", "is_baseline")


@dataclass
class Evaluation:
    """What was measured of one pair; everything JSON holds.

    Attributes:
        systems: one entry a system, the default first.
        gains: of the default over every other system, at T=1 and top-p 0.7.
        curves: method -> points over weights.
        front: hypervolume of the default's curve and of fixed weights, above the best one-row
            baseline.
        temperatures: of the default.
        distance: system -> points over turns of talk.
        preconditions, conditions, negatives: of the verdict.
        works: None if something was not measured.
        samples: answers of some systems, side by side.
        cells: system -> its answers at T=1, for `pooled`; not part of the JSON.
    """

    systems: list[dict[str, Any]] = field(default_factory=list)
    gains: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    front: dict[str, float] = field(default_factory=dict)
    temperatures: list[dict[str, Any]] = field(default_factory=list)
    distance: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    preconditions: list[dict[str, Any]] = field(default_factory=list)
    conditions: list[dict[str, Any]] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    works: bool | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    cells: dict[str, Cell] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the cells."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cells"}


def pooled(evaluations: Sequence[Evaluation], seed: int) -> list[dict[str, Any]]:
    """Return the systems that all pairs have, with their answers at T=1 put together.

    Intervals are over facts: the answers of all pairs about one fact stay together.
    """
    if len(evaluations) == 1:
        return evaluations[0].systems
    common = [s for s in evaluations[0].systems if all(s["name"] in e.cells for e in evaluations)]
    systems = []
    for entry in common:
        name = entry["name"]
        cells = [evaluation.cells[name] for evaluation in evaluations]
        together = Cell(*[[v for c in cells for v in getattr(c, f)] for f in ("facts", *_PARTS)])
        both = share(together, "both", seed)
        own = [next(s for s in e.systems if s["name"] == name) for e in evaluations]
        nlls = [s["nll"] for s in own if s["nll"] is not None]
        systems.append(
            {
                **{key: entry[key] for key in _FIXED_KEYS},
                **_shares(together),
                "ci_both": [_short(both.low), _short(both.high)],
                "nll": _short(mean(nlls)) if nlls else None,
                "both_by_pair": [s["both"] for s in own],
            }
        )
    return systems


async def evaluate_pair(
    measurer: Measurer,
    task: Task,
    pair: Pair,
    systems: Sequence[System],
    plan: Plan,
    rows: Mapping[str, int],
) -> Evaluation:
    """Measure one pair of states.

    Args:
        measurer: asks.
        task: what.
        pair: the states.
        systems: the default first.
        plan: how much.
        rows: recurrent states that each system's model takes; the methods of `plan.curves` must be
            among the systems.
    """
    found = Evaluation()
    best = {method: await best_weights(measurer, pair, method) for method in plan.curves}
    chosen = [*systems, *best.values()]
    # Weights take no rows.
    both = f"{pair.knowledge}+{pair.tone}"
    of_best = {
        one.model: rows[both if method == DEFAULT_METHOD else f"{both}~{method}"]
        for method, one in best.items()
    }
    num_rows = {**rows, **of_best}
    cells = {
        system.name: {d.name: await measurer.cell(system, d) for d in plan.decodings}
        for system in chosen
    }
    # A hint comes with a question, and these texts have none.
    told = [system for system in chosen if not system.is_hinted]
    texts = {system.name: await measurer.given(system) for system in told}
    for system in chosen:
        own = texts.get(system.name, _NO_TEXTS)
        of_one = cells[system.name]
        found.systems.append(_entry(system, num_rows[system.model], of_one, own, plan))
    found.cells = {name: own[T1.name] for name, own in cells.items()}
    found.gains = _gains(cells, plan)
    found.samples = _samples(cells)
    for method in plan.curves:
        found.curves[method] = await _curve(measurer, pair, method)
    found.front = _front(found, chosen)
    by_name = {system.name: system for system in chosen}
    found.temperatures = await _temperatures(measurer, by_name[DEFAULT], plan)
    found.distance = await _distance(measurer, task, by_name, plan)
    of_verdict = await measured(measurer, task, by_name, cells, texts, found.gains, found.distance)
    found.preconditions = [asdict(condition) for condition in preconditions(of_verdict)]
    found.conditions = [asdict(condition) for condition in conditions(of_verdict)]
    found.negatives = negatives(of_verdict)
    found.works = works(of_verdict)
    return found


def _entry(
    system: System, rows: int, cells: Mapping[str, Cell], texts: Texts, plan: Plan
) -> dict[str, Any]:
    """Return one system's numbers: those at T=1 on top, every decoding below."""
    at_t1 = cells[T1.name]
    both = share(at_t1, "both", plan.seed)
    entry: dict[str, Any] = {
        "name": system.name,
        "model": system.model,
        "rows": rows,
        "trained_on_both": system.trained_on_both,
        "is_baseline": system.is_baseline,
        **_shares(at_t1),
        "ci_both": [_short(both.low), _short(both.high)],
        "nll": None,
        "decodings": {name: _decoded(cell, plan.seed) for name, cell in cells.items()},
    }
    if texts.nats:
        nll = interval(texts.nats, texts.facts, seed=plan.seed)
        entry["nll"] = _short(nll.mean)
        entry["ci_nll"] = [_short(nll.low), _short(nll.high)]
        for name, wanted in (("nll_fact", True), ("nll_other", False)):
            chosen = zip(texts.nats, texts.is_fact, strict=True)
            own = [nat for nat, is_fact in chosen if is_fact == wanted]
            entry[name] = _short(mean(own)) if own else None
    return entry


def _decoded(cell: Cell, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in ("know", "tone", "both"):
        one = share(cell, part, seed)
        found[part] = [_short(one.mean), _short(one.low), _short(one.high)]
    if cell.well_formed:
        found["well_formed"] = _short(mean(cell.well_formed))
        found["template_entropy"] = _short(diversity(cell))
    return found


def _gains(cells: Mapping[str, Mapping[str, Cell]], plan: Plan) -> dict[str, dict[str, Any]]:
    """Compare the default with every other system; p-values are Holm's, over the systems."""
    found: dict[str, dict[str, Any]] = {}
    for decoding in (T1, TOP_P):
        default = cells[DEFAULT][decoding.name]
        others = {n: own[decoding.name] for n, own in cells.items() if n != DEFAULT}
        gains = {name: gain(default, cell, plan.seed) for name, cell in others.items()}
        found[decoding.name] = _corrected(
            {name: (_as_list(one), one.p) for name, one in gains.items()}
        )
    if GREEDY in plan.decodings:
        default = cells[DEFAULT][GREEDY.name]
        found["greedy, McNemar"] = _corrected(
            {
                name: ({}, mcnemar(default.both, own[GREEDY.name].both))
                for name, own in cells.items()
                if name != DEFAULT
            }
        )
    return found


def _corrected(tests: Mapping[str, tuple[dict[str, Any], float]]) -> dict[str, Any]:
    """Return what each test found, with its p-value among all of them."""
    adjusted = holm([p for _, p in tests.values()])
    return {
        name: {**found, "p": _short(p)}
        for (name, (found, _)), (p, _) in zip(tests.items(), adjusted, strict=True)
    }


async def _curve(measurer: Measurer, pair: Pair, method: str) -> list[dict[str, Any]]:
    """Measure a method over the weights, on the questions for choosing, at T=1."""
    points = []
    for title, model in fixed_weights(pair, method):
        cell = await measurer.dev_cell(System(f"{method} {title}", model), T1)
        points.append({"weights": title, **_shares(cell)})
    return points


async def _temperatures(measurer: Measurer, system: System, plan: Plan) -> list[dict[str, float]]:
    """Measure a system at each of the plan's temperatures."""
    points = []
    for temperature in plan.temperatures:
        cell = await measurer.cell(system, Decoding(f"T={temperature:g}", temperature=temperature))
        points.append({"temperature": temperature, **_shares(cell)})
    return points


async def _distance(
    measurer: Measurer, task: Task, by_name: Mapping[str, System], plan: Plan
) -> dict[str, list[dict[str, Any]]]:
    """Measure the default and its two states after turns of the talk that the task has."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, history in _DISTANT:
        if not task.has_talk(history):
            continue
        points = []
        for turns in plan.turns:
            cell = await measurer.distant_cell(by_name[name], turns, history)
            points.append({"turns": turns, **_shares(cell)})
        found[f"{name}, {history} talk"] = points
    return found


def _front(found: Evaluation, systems: Sequence[System]) -> dict[str, float]:
    """Return what each curve dominates above the best of the one-row baselines."""
    baselines = {system.name for system in systems if system.is_baseline}
    best = max((s for s in found.systems if s["name"] in baselines), key=lambda s: s["both"])
    reference = best["knowledge"], best["tone"]
    return {
        method: _short(hypervolume([(p["knowledge"], p["tone"]) for p in points], reference))
        for method, points in found.curves.items()
    }


def _samples(cells: Mapping[str, Mapping[str, Cell]]) -> list[dict[str, Any]]:
    """Return the answers of all systems to some questions at T=1, right and wrong as they came."""
    shown: list[dict[str, Any]] = []
    for place, (question, _) in enumerate(cells[DEFAULT][T1.name].texts):
        answers = {name: own[T1.name].texts[place][1] for name, own in cells.items()}
        shown.append({"question": question, "answers": answers})
    return shown


def _shares(cell: Cell) -> dict[str, float]:
    return {
        "knowledge": _short(mean(cell.know)),
        "tone": _short(mean(cell.tone)),
        "both": _short(mean(cell.both)),
    }


def _as_list(one: Interval) -> dict[str, list[float]]:
    return {"gain": [_short(one.mean), _short(one.low), _short(one.high)]}


def _short(value: float) -> float:
    return round(value, 4)
