"""The end of `mrss tune`: the state's file with its provenance, the summary, the curve."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from mrss_provider import __version__
from mrss_provider.cli.output import answer, answer_json, note
from mrss_provider.cli.tune_job import Bench, Job
from mrss_provider.cli.tune_view import draw_curve, show_summary
from mrss_provider.config import EngineConfig
from mrss_provider.tune.chats import Line
from mrss_provider.tune.config import TuneConfig, TuneResult
from mrss_provider.tune.distillation import Gap, measure_gap
from mrss_provider.tune.files import save_result
from mrss_provider.tune.run_file import Record, run_path
from mrss_provider.tune.token_loss import Imitation
from mrss_provider.tune.training import Training

_GAP_LINES = 64


def finish(
    engine: EngineConfig,
    job: Job,
    bench: Bench,
    training: Training,
    config: TuneConfig,
    settings: Mapping[str, Any],
    found: Mapping[str, Any],
    findings: Mapping[str, Any],
) -> None:
    """Write the state and what is known of it, and say how it went.

    Args:
        engine: where the model is.
        job: what was to be tuned.
        bench: what it was computed with.
        training: the run, which is done.
        config: how it learnt.
        settings: all that decides what it learns, as it was when it began.
        found: the learning rate, and how it was found.
        findings: what is odd about the data.

    Raises:
        StateFileError: the state cannot be written; the unfinished run stays.
    """
    record, learner = training.record, training.learner
    result = TuneResult(
        learner.wkv(0), tuple(record.losses), record.seconds, learner.time_offset(0)
    )
    summary = _summary(job, bench, record, config, found)
    if isinstance(bench.token_loss, Imitation):
        summary["gap"] = _gaps(bench, bench.token_loss, result, config)
    state = save_result(
        job.out,
        result,
        engine.model,
        group=job.group,
        config=config,
        licence=job.licence,
        display_name=job.title,
        template=bench.template,
        notes=_notes(job, summary, settings, findings),
    )
    run_path(job.out).unlink(missing_ok=True)
    summary["norms"] = [round(norm, 3) for norm in state.layer_norms]
    summary["curve"] = _curve(job, record)
    if job.as_json:
        answer_json({"out": str(job.out), **summary})
        return
    for line in show_summary(summary):
        answer(line)
    if job.out.suffix == ".pth" and result.time_offset is not None:
        note("its offsets are in the file too; the `rwkv` package does not read them")
    if job.group is None:
        note("it has no --group (knowledge, tone, ...), by which gates choose among states")
    answer(f"wrote {job.out}")


def _notes(
    job: Job,
    summary: Mapping[str, Any],
    settings: Mapping[str, Any],
    findings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what the state's file says of how it came to be."""
    return {
        **summary,
        "data": {
            "files": {name: path.name for name, path in job.source.files.items()},
            "sha256": settings["sha256"],
            **findings,
        },
        "settings": settings,
        "date": datetime.now(UTC).date().isoformat(),
        "mrss_provider": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _curve(job: Job, record: Record) -> str | None:
    if not job.curve:
        return None
    path = job.out.with_suffix(".png")
    try:
        if draw_curve(path, record, job.out.stem):
            return str(path)
        note("no loss curve: matplotlib is not installed; pip install 'mrss-provider[tune]'")
    except OSError as exc:
        # The state is written, and what is known of it not yet told.
        note(f"no loss curve: {path} cannot be written: {exc.strerror or exc}")
    return None


def _summary(
    job: Job, bench: Bench, record: Record, config: TuneConfig, found: Mapping[str, Any]
) -> dict[str, Any]:
    held_out: dict[str, float] | None = None
    if record.held_out:
        looks = dict(record.held_out)
        last = record.held_out[-1][1]
        begun_at = "base" if bench.start is None else "start"
        held_out = {begun_at: looks[0], "best": looks[record.best_step], "last": last}
    rates: Sequence[Mapping[str, float | None]] | None = found.get("rates")
    return {
        "learning_rate": config.learning_rate,
        "rates": rates,
        "steps": record.step,
        "best_step": record.best_step if held_out else record.step,
        "held_out": held_out,
        "tokens": record.tokens,
        "tokens_per_s": round(record.tokens / max(record.seconds, 1e-9), 1),
        "seconds": round(record.seconds, 1),
        "distilled": job.source.distill,
        "beside": list(job.beside),
        **({} if bench.start is None else {"from": bench.start.name}),
    }


def _gaps(
    bench: Bench, imitation: Imitation, result: TuneResult, config: TuneConfig
) -> dict[str, dict[str, float]]:
    def measured(lines: Sequence[Line]) -> dict[str, float]:
        gap: Gap = measure_gap(
            bench.weights, imitation, result, lines[:_GAP_LINES], max_len=config.max_len, seed=0
        )
        found = asdict(gap) | {"kl": gap.kl.mean, "low": gap.kl.low, "high": gap.kl.high}
        # The ends of an interval of few texts are infinite, which JSON has no number for.
        return {key: round(value, 5) for key, value in found.items() if math.isfinite(value)}

    seen, unseen = bench.parts
    return {"seen": measured(seen), "unseen": measured(unseen)}
