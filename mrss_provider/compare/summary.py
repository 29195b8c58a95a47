"""Summary: what a comparison found. One table of models, and for each pair what differs.

Every measure is corrected over its pairs on its own; `summary.json` is this as JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mrss_provider.compare.calls import Result
from mrss_provider.compare.comparison import (
    SPEED,
    Comparison,
    Measure,
    compare,
    compare_preferences,
)
from mrss_provider.compare.folder import Folder
from mrss_provider.compare.judge import Judgements
from mrss_provider.compare.pairwise import Pair, Preferences
from mrss_provider.compare.quantiles import quantiles
from mrss_provider.compare.scorers import Scorer, score

ALPHA = 0.05


@dataclass(frozen=True)
class Summary:
    """What a comparison found.

    Attributes:
        models: one row each.
        comparisons: of every measure and pair.
        num_cells: that were planned.
        num_done: that have a result.
        alpha: error rate of each measure's findings.
        judge: what the judge did, or None.
        num_votes: comparisons that people voted on.
        scores: (prompt, model, seed) -> score by name.
        scorers: their names, whether they had something to say or not.
    """

    models: list[dict[str, Any]]
    comparisons: list[Comparison]
    num_cells: int
    num_done: int
    alpha: float = ALPHA
    judge: Mapping[str, Any] | None = None
    num_votes: int = 0
    scores: Mapping[tuple[str, str, int], Mapping[str, float]] = field(default_factory=dict)
    scorers: tuple[str, ...] = ()

    @property
    def verdicts(self) -> list[str]:
        """The sentences, in order."""
        return [comparison.sentence for comparison in self.comparisons]

    def to_dict(self) -> dict[str, Any]:
        """Return summary.json."""
        return {
            "version": 1,
            "num_cells": self.num_cells,
            "num_done": self.num_done,
            "alpha": self.alpha,
            "scorers": self.scorers,
            "models": self.models,
            "comparisons": [asdict(c) for c in self.comparisons],
            "judge": self.judge,
            "num_votes": self.num_votes,
        }


@dataclass(frozen=True)
class Opinions:
    """What others said of pairs: a judge, by name, and people."""

    judge: str | None = None
    judgements: Judgements | None = None
    votes: Mapping[Pair, Preferences] = field(default_factory=dict)


def summarise(
    folder: Folder,
    results: Sequence[Result],
    scorers: Mapping[str, Scorer],
    opinions: Opinions | None = None,
    *,
    alpha: float = ALPHA,
) -> Summary:
    """Compare what came.

    Args:
        folder: what was asked.
        results: all that came.
        scorers: by name.
        opinions: of a judge and of people.
        alpha: how often a measure may find what is not there.

    Raises:
        InvalidRequestError: a scorer fails.
    """
    opinions = opinions or Opinions()
    prompts = {prompt.id: prompt for prompt in folder.prompts.prompts}
    scores = {r.key: score(scorers, prompts[r.prompt], r.text) for r in results if r.error is None}
    models = folder.settings.models
    names = [name for name in scorers if any(name in of_one for of_one in scores.values())]
    comparisons: list[Comparison] = []
    for name in names:
        comparisons += compare(_measure_of(name, scores), results, models, alpha)
    judged = opinions.judgements
    if judged is not None:
        comparisons += compare_preferences(f"judge {opinions.judge}", judged.preferences, alpha)
    comparisons += compare_preferences("votes", opinions.votes, alpha)
    for measure in SPEED:
        comparisons += compare(measure, results, models, alpha)
    counts = None
    if judged is not None:
        counts = {k: v for k, v in vars(judged).items() if k != "preferences"}
        counts |= {"model": opinions.judge}
        counts["num_ties"] = sum(p.num_ties for p in judged.preferences.values())
    return Summary(
        models=[_row(model, results, scores, names) for model in models],
        comparisons=comparisons,
        num_cells=len(prompts) * len(models) * len(folder.settings.seeds),
        num_done=len(results),
        alpha=alpha,
        judge=counts,
        num_votes=sum(len(p.values) for p in opinions.votes.values()),
        scores=scores,
        scorers=tuple(scorers),
    )


def _measure_of(name: str, scores: Mapping[tuple[str, str, int], Mapping[str, float]]) -> Measure:
    return Measure(name, lambda result: scores[result.key].get(name))


def _row(
    model: str,
    results: Sequence[Result],
    scores: Mapping[tuple[str, str, int], Mapping[str, float]],
    names: Sequence[str],
) -> dict[str, Any]:
    """Return one model's row; times are medians and 95th percentiles, in seconds."""
    own = [r for r in results if r.model == model]
    good = [r for r in own if r.error is None]
    gaps = [b - a for r in good for a, b in zip(r.chunk_s, r.chunk_s[1:], strict=False)]
    costs = [r.cost for r in good if r.cost is not None]
    means = {}
    for name in names:
        values = [scores[r.key][name] for r in good if name in scores[r.key]]
        means[name] = {"mean": float(np.mean(values)) if values else None, "n": len(values)}
    return {
        "model": model,
        "num_answers": len(good),
        "errors": dict(Counter(str(r.error["type"]) for r in own if r.error is not None)),
        "finish_reasons": dict(Counter(r.finish_reason or "none" for r in good)),
        "ttft_s": quantiles([r.ttft_s for r in good if r.ttft_s is not None]),
        "gap_s": quantiles(gaps),
        "total_s": quantiles([r.total_s for r in good]),
        "tokens_per_s": quantiles([r.tokens_per_s for r in good if r.tokens_per_s is not None]),
        "completion_tokens": sum(r.completion_tokens or 0 for r in good),
        "cost": sum(costs) if costs else None,
        "scores": means,
        "model_ids": sorted({r.model_id for r in good if r.model_id}),
        "fingerprints": sorted({r.fingerprint for r in good if r.fingerprint}),
    }
