"""run: `mrss evaluate` from files to a report: an engine, the pairs of states, the numbers."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import GenerateRequest
from mrss_provider.config import EngineConfig
from mrss_provider.errors import EngineError
from mrss_provider.evaluate.asking import Asker
from mrss_provider.evaluate.evaluation import Evaluation, evaluate_pair, pooled
from mrss_provider.evaluate.measuring import Journal, Measurer, Plan
from mrss_provider.evaluate.systems import Pair, System, compared, digest_of, make_folder
from mrss_provider.evaluate.task import Part, Task
from mrss_provider.evaluate.workers import workers
from mrss_provider.model import ModelConfig
from mrss_provider.sampling_params import SamplingParams

FORMAT = 1

_ROWS = 192
"""Recurrent states at once: enough answers side by side to keep a device busy."""

_ROWS_AN_ANSWER = 3
"""Of most mixtures of two states: their rows and the base's."""


@dataclass(frozen=True)
class Job:
    """What to evaluate.

    Attributes:
        config: of the engine; its folder of states is where pairs are looked for.
        model: what the checkpoint is.
        task: the questions.
        pairs: states that were tuned apart, one pair a tuning seed.
        baselines: a folder of one-row states a pair, or none.
        plan: how much to ask.
        is_quick: leave out all but a first look.
        out: where finished cells are kept; None keeps nothing.
    """

    config: EngineConfig
    model: ModelConfig
    task: Task
    pairs: Sequence[Pair]
    baselines: Sequence[Path]
    plan: Plan
    is_quick: bool
    out: Path | None


def run(
    job: Job,
    tell: Callable[[str], None] = lambda name: None,
    on_done: Callable[[], None] = lambda: None,
    *,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Evaluate every pair; return the report as JSON holds it.

    Args:
        job: what.
        tell: called with the name of each part before it begins.
        on_done: called after each answer, if pairs are measured one after the other.
        num_processes: pairs measured at once, each by an engine in a process of its own.

    Raises:
        MRSSError: a state or the model cannot be loaded, `out` is of another evaluation, or a
            process was killed.
    """
    numbers = range(len(job.pairs))
    # Of this process alone, which removes it whatever becomes of the others.
    with tempfile.TemporaryDirectory(prefix="mrss-evaluate-") as made:
        folders = [Path(made, str(number)) for number in numbers]
        if num_processes == 1 or len(numbers) == 1:
            evaluations = [_evaluate(job, n, folders[n], tell, on_done) for n in numbers]
        else:
            tell(f"{len(numbers)} pairs, {num_processes} at a time")
            evaluations = _evaluate_at_once(job, folders, num_processes)
    return {
        "format": FORMAT,
        "task": job.task.title,
        "model": job.model.name,
        "model_fingerprint": job.model.fingerprint,
        "facts": job.task.num_facts("test"),
        "tone_accuracy": job.task.tone_accuracy,
        "samples": job.plan.samples,
        "seed": job.plan.seed,
        "quick": job.is_quick,
        "works": _all_work([evaluation.works for evaluation in evaluations]),
        "systems": pooled(evaluations, job.plan.seed),
        "pairs": [evaluation.to_json() for evaluation in evaluations],
    }


def _evaluate_at_once(job: Job, folders: Sequence[Path], num_processes: int) -> list[Evaluation]:
    """Evaluate all pairs, so many at a time."""
    numbers = range(len(folders))
    try:
        with workers(min(num_processes, len(numbers))) as processes:
            return list(processes.map(_evaluate, [job] * len(numbers), numbers, folders))
    except BrokenProcessPool as exc:
        raise EngineError(
            "a process that measured a pair was killed, maybe for want of memory; ask again with a "
            "smaller --jobs (with --out it goes on where it stopped)"
        ) from exc


def _evaluate(
    job: Job,
    number: int,
    folder: Path,
    tell: Callable[[str], None] = lambda name: None,
    on_done: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate the pair of a number, from 0, with its states in a new `folder`."""
    pair = job.pairs[number]
    baselines = job.baselines[number] if job.baselines else None
    folder.mkdir()
    extra = make_folder(pair, baselines, folder, job.model)
    gates = sorted(path.stem for path in (folder / "gates").glob("*.safetensors"))
    systems = compared(pair, extra, gates, is_quick=job.is_quick)
    journal = _journal(job, number, pair, folder)
    return asyncio.run(_measure(job, pair, folder, systems, journal, tell, on_done))


async def _measure(
    job: Job,
    pair: Pair,
    folder: Path,
    systems: Sequence[System],
    journal: Journal,
    tell: Callable[[str], None],
    on_done: Callable[[], None],
) -> Evaluation:
    config = replace(
        job.config,
        states=folder,
        max_rows=max(_ROWS, job.config.max_rows),
        max_queued=max(1024, job.config.max_queued),
    )
    async with AsyncEngine(config) as engine:
        rows = await _rows_of(engine, systems)
        asker = Asker(engine, on_done, at_once=config.max_rows // _ROWS_AN_ANSWER)
        measurer = Measurer(job.task, asker, job.plan, journal, tell)
        return await evaluate_pair(measurer, job.task, pair, systems, job.plan, rows)


async def _rows_of(engine: AsyncEngine, systems: Sequence[System]) -> dict[str, int]:
    """Return how many recurrent states each mixture takes, by asking for one token of it."""
    rows: dict[str, int] = {}
    for system in systems:
        request = GenerateRequest(system.model, SamplingParams(max_tokens=1), prompt="User:")
        stream = await engine.open(request)
        rows[system.model] = stream.info.rows
        await stream.aclose()
    return rows


def _journal(job: Job, number: int, pair: Pair, folder: Path) -> Journal:
    plan = {key: value for key, value in vars(job.plan).items() if key in ("samples", "seed")}
    asked = [job.task.questions(part, 1, seed=job.plan.seed) for part in get_args(Part)]
    settings = {
        "format": FORMAT,
        "task": job.task.identity,
        "questions": hashlib.sha256(repr(asked).encode()).hexdigest(),
        "facts": job.task.num_facts("test"),
        "model": job.model.fingerprint,
        "states": digest_of(folder),
        "pair": [pair.knowledge, pair.tone],
        "dev_samples": job.plan.dev_samples,
        **plan,
    }
    path = None if job.out is None else job.out / f"answers-{number}.jsonl"
    return Journal(path, settings)


def _all_work(verdicts: Sequence[bool | None]) -> bool | None:
    if False in verdicts:
        return False
    return None if None in verdicts else True
