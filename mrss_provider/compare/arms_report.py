"""The report on arms: a table of each weighted group, and verdicts between its arms.

Every interval of a group holds at all times at once, over all of its pairs, for each measure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mrss_provider.compare.arms import Arm, Arms
from mrss_provider.compare.comparison import NOTHING, in_words
from mrss_provider.compare.quantiles import quantiles
from mrss_provider.compare.sequential import (
    MIN_CALLS,
    Interval,
    Moments,
    bounded_mean_difference,
    mean_difference,
    proportion,
    proportion_difference,
)

ALPHA = 0.05


def report_arms(arms: Arms, group: str | None = None, *, alpha: float = ALPHA) -> dict[str, Any]:
    """Return tables and verdicts of all groups, or of one, ready for JSON."""
    names = sorted(arms.groups) if group is None else [group]
    notes = [
        f"Intervals hold at all times at once ({100 * (1 - alpha):g} % over the pairs of a group, "
        "for each measure): look as often as you like. Calls of one user are taken as independent."
    ]
    if arms.num_ungrouped:
        notes.append(f"{arms.num_ungrouped} calls are of no group, such as health checks.")
    if arms.num_unknown:
        notes.append(f"{arms.num_unknown} scores or votes are on answers that the log has not.")
    return {
        "version": 1,
        "groups": [
            _report(name, arms.groups[name], arms.votes.get(name, []), alpha) for name in names
        ],
        "notes": notes,
    }


def _report(
    group: str, of_group: Mapping[str, Arm], votes: Sequence[tuple[str, str, bool]], alpha: float
) -> dict[str, Any]:
    arms = sorted(of_group.values(), key=lambda arm: arm.id)
    total = sum(len(arm.calls) for arm in arms)
    pairs = list(combinations(arms, 2))
    comparisons = []
    for a, b in pairs:
        comparisons += _compare(a, b, votes, alpha / len(pairs))
    return {
        "group": group,
        "num_calls": total,
        "arms": [_row(arm, total) for arm in arms],
        "comparisons": comparisons,
        "verdicts": [comparison["sentence"] for comparison in comparisons],
    }


def _row(arm: Arm, total: int) -> dict[str, Any]:
    costs = arm.values("cost")
    errors = Counter(str(call["error"]["type"]) for call in arm.calls if call["error"] is not None)
    return {
        "arm": arm.id,
        "models": sorted(arm.models),
        "num_calls": len(arm.calls),
        "share": len(arm.calls) / total,
        "num_cached": sum(bool(call["cache_hit"]) for call in arm.calls),
        "num_errors": arm.num_errors,
        "errors": dict(errors),
        "ttft_s": quantiles(arm.values("ttft_s")),
        "total_s": quantiles(arm.values("total_s")),
        "cost": sum(costs) if costs else None,
        "completion_tokens": int(sum(arm.values("completion_tokens"))),
        "feedback": float(np.mean(arm.scores)) if arm.scores else None,
        "num_feedback": len(arm.scores),
    }


def _compare(
    a: Arm, b: Arm, votes: Sequence[tuple[str, str, bool]], alpha: float
) -> list[dict[str, Any]]:
    """Compare two arms by all that both have."""
    found = [
        _latency(key, word, a, b, alpha)
        for key, word in (("ttft_s", "sooner"), ("total_s", "sooner done"))
        if a.values(key) and b.values(key)
    ]
    pair = (a, b)
    if a.num_errors + b.num_errors:
        counts = [(arm.num_errors, len(arm.calls)) for arm in pair]
        interval = proportion_difference(counts[0], counts[1], alpha)
        value = counts[0][0] / counts[0][1] - counts[1][0] / counts[1][1]
        better = "fails less often than"
        found.append(_difference("error rate", pair, value, interval, better, is_less_better=True))
    if a.scores and b.scores:
        value = float(np.mean(a.scores) - np.mean(b.scores))
        interval = bounded_mean_difference(a.scores, b.scores, alpha)
        found.append(_difference("feedback", pair, value, interval, "is scored better than"))
    won = sum((winner, loser, tie) == (a.id, b.id, False) for winner, loser, tie in votes)
    lost = sum((winner, loser, tie) == (b.id, a.id, False) for winner, loser, tie in votes)
    if won + lost:
        # Won minus lost, as shares of the votes that decided.
        low, high = (2 * end - 1 for end in proportion(won, won + lost, alpha))
        value = (won - lost) / (won + lost)
        found.append(_difference("votes", pair, value, (low, high), "is preferred to"))
    return found


def _latency(key: str, word: str, a: Arm, b: Arm, alpha: float) -> dict[str, Any]:
    logs = [[math.log(v) for v in arm.values(key) if v > 0] for arm in (a, b)]
    if min(map(len, logs)) < MIN_CALLS:
        calls = f"{MIN_CALLS} answered calls of each are needed"
        return _as_dict(key, "ratio", (a, b), None, f"{key}: too early to tell; {calls}")
    first, second = (Moments.of(values) for values in logs)
    interval = mean_difference(first, second, alpha)
    assert interval is not None
    # Of logarithms, so that it is a ratio of geometric means.
    numbers = tuple(math.exp(n) for n in (first.mean - second.mean, *interval))
    winner = _winner((a, b), interval, is_less_better=True)
    return _verdict(key, "ratio", (a, b), numbers, winner, f"is {word} than")


def _winner(pair: tuple[Arm, Arm], interval: Interval, *, is_less_better: bool) -> Arm | None:
    """Return which arm the interval of first minus second speaks for, if it leaves out 0."""
    low, high = interval
    if low <= 0 <= high:
        return None
    return pair[0] if (high < 0) == is_less_better else pair[1]


def _difference(
    measure: str,
    pair: tuple[Arm, Arm],
    value: float,
    interval: Interval,
    better: str,
    *,
    is_less_better: bool = False,
) -> dict[str, Any]:
    winner = _winner(pair, interval, is_less_better=is_less_better)
    return _verdict(measure, "difference", pair, (value, *interval), winner, better)


def _verdict(
    measure: str,
    kind: str,
    pair: tuple[Arm, Arm],
    numbers: tuple[float, ...],
    winner: Arm | None,
    better: str,
) -> dict[str, Any]:
    a, b = pair
    value, low, high = numbers
    if winner is None:
        words = f"{NOTHING} between {a.id} and {b.id}"
    else:
        words = f"{winner.id} {better} {b.id if winner is a else a.id}"
    told = f"{a.id} to {b.id} {in_words(kind, value, low, high)}"
    return _as_dict(measure, kind, pair, numbers, f"{measure}: {words} ({told})", winner)


def _as_dict(
    measure: str,
    kind: str,
    pair: tuple[Arm, Arm],
    numbers: tuple[float, ...] | None,
    sentence: str,
    winner: Arm | None = None,
) -> dict[str, Any]:
    value, low, high = numbers or (None, None, None)
    return {
        "measure": measure,
        "a": pair[0].id,
        "b": pair[1].id,
        "kind": kind,
        "value": value,
        "low": low,
        "high": high,
        "winner": None if winner is None else winner.id,
        "sentence": sentence,
    }
