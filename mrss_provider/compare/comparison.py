"""Comparisons: each measure of each pair of models, corrected over the pairs, and in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from mrss_provider.compare.calls import Result
from mrss_provider.compare.pairwise import Pair, Place, Preferences, answered_by_both, pairs_of
from mrss_provider.resampling import Mean, Sample, holm, judge

NOTHING = "no difference found"


@dataclass(frozen=True)
class Measure:
    """What is compared.

    Attributes:
        name: in tables and files.
        value: of one answer; None where it has none.
        is_ratio: whether models are compared by the ratio of what they take, not by differences.
        is_less_better: whether small values are good.
        better: what to say of the winner, before the other's name.
    """

    name: str
    value: Callable[[Result], float | None]
    is_ratio: bool = False
    is_less_better: bool = False
    better: str = "better than"


SPEED = (
    Measure("ttft_s", lambda r: r.ttft_s, True, True, "faster to its first text than"),
    Measure(
        "tokens_per_s", lambda r: r.tokens_per_s, True, False, "faster from token to token than"
    ),
    Measure("total_s", lambda r: r.total_s, True, True, "sooner done than"),
)


@dataclass(frozen=True)
class Comparison:
    """One measure of one pair.

    Attributes:
        measure: its name.
        a, b: the models.
        kind: "difference" (a minus b), "ratio" (a over b, of geometric means) or "preference" (for
            a, in [-1, 1]).
        value: the estimate.
        low, high: its interval at `level`; None is unbounded, too little is known.
        level: coverage of the interval after Holm's correction.
        p: corrected over the pairs.
        num_prompts, num_pairs: that it rests on.
        winner: a, b, or None for no difference found.
        sentence: all of this in words.
    """

    measure: str
    a: str
    b: str
    kind: str
    value: float
    low: float | None
    high: float | None
    level: float
    p: float
    num_prompts: int
    num_pairs: int
    winner: str | None
    sentence: str


def compare(
    measure: Measure, results: Sequence[Result], models: Sequence[str], alpha: float
) -> list[Comparison]:
    """Compare every two models by one measure, at an error rate of `alpha` over all of them."""
    samples: dict[Pair, dict[Place, float]] = {}
    for pair in pairs_of(models):
        found: dict[Place, float] = {}
        for a, b in answered_by_both(results, pair):
            first, second = measure.value(a), measure.value(b)
            if first is None or second is None:
                continue
            if not measure.is_ratio:
                found[a.prompt, a.seed] = first - second
            elif first > 0 and second > 0:
                found[a.prompt, a.seed] = math.log(first / second)
        samples[pair] = found
    return _judge_all(measure, "ratio" if measure.is_ratio else "difference", samples, alpha)


def compare_preferences(
    name: str, preferences: Mapping[Pair, Preferences], alpha: float
) -> list[Comparison]:
    """Compare every two models by what was said of them; `name` says who said it."""
    measure = Measure(name, lambda _: None, better="preferred to")
    values = {pair: p.values for pair, p in preferences.items()}
    return _judge_all(measure, "preference", values, alpha)


def _judge_all(
    measure: Measure, kind: str, samples: Mapping[Pair, Mapping[Place, float]], alpha: float
) -> list[Comparison]:
    told = {
        pair: (judge(Sample.of((place[0], v) for place, v in values.items())), len(values))
        for pair, values in samples.items()
        if values
    }
    adjusted = holm([found.p for found, _ in told.values()])
    return [
        _judge(measure, kind, pair, found, num_pairs, p, divisor, alpha)
        for (pair, (found, num_pairs)), (p, divisor) in zip(told.items(), adjusted, strict=True)
    ]


def _judge(
    measure: Measure,
    kind: str,
    pair: Pair,
    found: Mean,
    num_pairs: int,
    p: float,
    divisor: int,
    alpha: float,
) -> Comparison:
    level = 1 - alpha / divisor
    low, high = found.interval(level)
    winner = None
    if p <= alpha and not low <= 0 <= high:
        is_first = (found.mean < 0) == measure.is_less_better
        winner = pair[0] if is_first else pair[1]
    value = found.mean
    if kind == "ratio":
        value, low, high = math.exp(value), math.exp(low), _exp(high)
    made = Comparison(
        measure=measure.name,
        a=pair[0],
        b=pair[1],
        kind=kind,
        value=value,
        low=low if math.isfinite(low) and (kind != "ratio" or low > 0) else None,
        high=high if math.isfinite(high) else None,
        level=level,
        p=p,
        num_prompts=found.num_groups,
        num_pairs=num_pairs,
        winner=winner,
        sentence="",
    )
    return Comparison(**{**asdict(made), "sentence": _sentence(made, measure)})


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _sentence(c: Comparison, measure: Measure) -> str:
    """Say what was found: the winner's value against the other's, or a's against b's."""
    seen = f"{100 * c.level:.3g} %, {c.num_prompts} prompt{'s' * (c.num_prompts != 1)}"
    first, second = c.a, c.b
    numbers: Sequence[float | None] = (c.value, c.low, c.high)
    if c.winner == c.b:
        first, second = c.b, c.a
        numbers = [_turned(n, c.kind) for n in (c.value, c.high, c.low)]
    found = f"{first} is {measure.better} {second}"
    if c.winner is None:
        found = f"{NOTHING} between {first} and {second}"
        least = _least_prompts(1 - c.level)
        if c.num_prompts < least:
            seen += f"; {least} are the least that can show a difference"
    return f"{measure.name}: {found}: {in_words(c.kind, *numbers)}, {seen}"


def in_words(kind: str, value: float | None, low: float | None, high: float | None) -> str:
    """Return an estimate and its interval: `0.73 times [0.64, 0.83]`, `+0.25 [+0.1, +0.4]`."""
    form = "{:.3g}" if kind == "ratio" else "{:+.3g}"
    value_, low_, high_ = ("?" if n is None else form.format(n) for n in (value, low, high))
    return f"{value_}{' times' if kind == 'ratio' else ''} [{low_}, {high_}]"


def _turned(value: float | None, kind: str) -> float | None:
    if value is None:
        return None
    return 1 / value if kind == "ratio" else -value


def _least_prompts(alpha: float) -> int:
    """Return how many prompts there must be before agreement of all of them is no chance."""
    return math.ceil(math.log2(2 / alpha) - 1e-9)
