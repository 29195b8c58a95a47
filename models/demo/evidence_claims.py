"""What docs/evaluation.md says of `models.demo.evidence`, as conditions that a new run may break.

On both bases, of every tuning seed, at top-p 0.7: the default beats each one-row state by 20 points
of `both` with an interval above 0, and reaches 0.8 of the ceiling (eta). Not claimed is that it
beats `sequential-tk-held`, which is tuned on top of the other state of its pair and does as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mrss_provider.evaluate.verdict import LEAST_ETA, LEAST_GAIN

_RUNS = {"first base": "evaluation-0", "second base": "evaluation-1"}
_DECODING = "top-p 0.7"
_AS_GOOD = "sequential-tk-held"
_ETA = "eta = both / (A_K S_T)"


def broken_claims(work: Path, seeds: Sequence[str]) -> list[str]:
    """Return a sentence for each claim that a finished run does not bear out.

    Args:
        work: the `--work` of `models.demo.evidence`.
        seeds: of the tuning, one a pair.

    Raises:
        FileNotFoundError: an evaluation is not finished.
    """
    broken = []
    for base, folder in _RUNS.items():
        report = json.loads((work / folder / "report.json").read_text(encoding="utf-8"))
        broken += broken_of(base, report, seeds)
    return broken


def broken_of(base: str, report: Mapping[str, Any], seeds: Sequence[str]) -> list[str]:
    """Return a sentence for each claim that the report of one base does not bear out."""
    if len(report["pairs"]) != len(seeds):
        return [f"{base}: {len(report['pairs'])} of {len(seeds)} tuning seeds were evaluated"]
    broken = []
    for seed, pair in zip(seeds, report["pairs"], strict=True):
        told = [*_gains(pair), *_eta(pair)]
        broken += [f"{base}, seed {seed}: {text}" for text in told]
    return broken


def _gains(pair: Mapping[str, Any]) -> list[str]:
    rivals = {one["name"] for one in pair["systems"] if one["is_baseline"]} - {_AS_GOOD}
    broken = []
    for name in sorted(rivals):
        gain, low, _ = pair["gains"][_DECODING][name]["gain"]
        if gain < LEAST_GAIN or low <= 0:
            broken.append(
                f"the default has {gain:+.2f} of both over {name}, the interval from {low:+.2f}; "
                f"claimed are {LEAST_GAIN:+.2f} and an interval above 0"
            )
    return broken


def _eta(pair: Mapping[str, Any]) -> list[str]:
    (found,) = (one for one in pair["conditions"] if one["text"].startswith(_ETA))
    if found["holds"]:
        return []
    return [f"the default reaches {found['value']} of the ceiling; claimed is {LEAST_ETA:.2f}"]
