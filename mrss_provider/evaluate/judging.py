"""From the cells of an evaluation to what its verdict is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mrss_provider.evaluate.asking import GREEDY, T1, TOP_P
from mrss_provider.evaluate.measuring import Cell, Measurer, Texts
from mrss_provider.evaluate.statistics import mean
from mrss_provider.evaluate.systems import DEFAULT, System
from mrss_provider.evaluate.task import Task
from mrss_provider.evaluate.verdict import Measured

# Plain and toned talk of so many turns is some 100 tokens.
FADED_TURNS = 3
LATE_TURNS = 2

Gains = Mapping[str, Mapping[str, Any]]
Distance = Mapping[str, Sequence[Mapping[str, Any]]]


async def measured(
    measurer: Measurer,
    task: Task,
    by_name: Mapping[str, System],
    cells: Mapping[str, Mapping[str, Cell]],
    texts: Mapping[str, Texts],
    gains: Gains,
    distance: Distance,
) -> Measured:
    """Gather what a verdict is made of; asks for what is still missing, texts without a question.

    Args:
        measurer: asks.
        task: what.
        by_name: the systems.
        cells: of each system by decoding, T=1 and top-p 0.7 among them.
        texts: that state facts in the manner, as each system finds them.
        gains: of the default, by decoding and system.
        distance: the default's and the states' points over turns of talk.
    """
    top_p = {name: own[TOP_P.name] for name, own in cells.items()}
    baselines = {name: mean(cell.both) for name, cell in top_p.items() if by_name[name].is_baseline}
    best = max(baselines, key=lambda name: baselines[name])
    default = top_p[DEFAULT]
    greedy = cells[DEFAULT].get(GREEDY.name)
    base_nats = await measurer.neutral(by_name["base"])
    nats = await measurer.neutral(by_name[DEFAULT])
    plain = await measurer.given(by_name["knowledge alone"], toned=False)
    late = distance.get(f"{DEFAULT}, toned talk", [])
    return Measured(
        knowledge_alone=mean(top_p["knowledge alone"].know),
        tone_alone=mean(top_p["tone alone"].tone),
        base_knows=mean(top_p["base"].know),
        chance=task.chance,
        know=mean(default.know),
        tone=mean(default.tone),
        both=mean(default.both),
        both_t1=mean(cells[DEFAULT][T1.name].both),
        gain_low=gains[TOP_P.name][best]["gain"][1],
        baselines=baselines,
        prompt_only=mean(top_p["prompt only"].both),
        both_greedy=None if greedy is None else mean(greedy.both),
        fact_nats=_difference(texts["knowledge alone"], plain),
        well_formed=mean(default.well_formed) if default.well_formed else None,
        base_well_formed=mean(top_p["base"].well_formed) if default.well_formed else None,
        perplexity=None if nats is None or base_nats is None else _ratio(nats, base_nats),
        late_both=_at(late, LATE_TURNS),
        faded_both=_faded(distance),
    )


def _difference(toned: Texts, plain: Texts) -> float | None:
    """Return how many nats more a fact costs in toned text than in plain text."""
    means = []
    for texts in (toned, plain):
        facts = [nat for nat, is_fact in zip(texts.nats, texts.is_fact, strict=True) if is_fact]
        if not facts:
            return None
        means.append(mean(facts))
    return means[0] - means[1]


def _ratio(nats: float, base_nats: float) -> float:
    """Return a perplexity over the base's, from nats a token."""
    return math.exp(nats - base_nats)


def _faded(distance: Distance) -> dict[str, float]:
    """Return the default's lowest `both` within some 100 tokens, by the manner of the talk."""
    faded = {}
    for history in ("toned", "plain"):
        points = distance.get(f"{DEFAULT}, {history} talk", [])
        if near := [p["both"] for p in points if 0 < p["turns"] <= FADED_TURNS]:
            faded[history] = min(near)
    return faded


def _at(points: Sequence[Mapping[str, Any]], turns: int) -> float | None:
    return next((point["both"] for point in points if point["turns"] == turns), None)
