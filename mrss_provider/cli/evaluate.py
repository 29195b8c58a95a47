"""`mrss evaluate`: whether mixing gives answers with both the knowledge and the tone, measured."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mrss_provider.cli.folders import make_folder
from mrss_provider.cli.output import CommandError, answer, note, table
from mrss_provider.cli.states import read_config
from mrss_provider.compare.folder import write_whole
from mrss_provider.config import DEMO_MODEL, EngineConfig
from mrss_provider.evaluate.measuring import QUICK, Plan
from mrss_provider.evaluate.own_task import OwnTask
from mrss_provider.evaluate.report import headline, report_page
from mrss_provider.evaluate.run import Job, run
from mrss_provider.evaluate.systems import Pair
from mrss_provider.evaluate.task import Task, WorldTask
from mrss_provider.tokenizer import find_vocabulary

_QUICK_FACTS = 12
_REPORTS = ("report.json", "report.html")


def evaluate(
    config: EngineConfig,
    *,
    knowledge: str,
    tone: str,
    pairs: Sequence[Path],
    baselines: Sequence[Path],
    data: tuple[Path, Path] | None,
    voice: str | None,
    samples: int | None,
    seed: int | None,
    is_quick: bool,
    jobs: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure, print the table and the verdict, write `report.html` and `report.json` to `out`.

    Raises:
        CommandError: options that do not go together, or an `out` that cannot be written into.
        MRSSError: no such model, or as `run`.
    """
    if baselines and len(baselines) != max(1, len(pairs)):
        raise CommandError(
            f"give --baselines once for each --pair, got {len(baselines)} for "
            f"{max(1, len(pairs))} pair(s)"
        )
    model = read_config(config.model)
    if data is None and not _speaks_of_the_world(config.model):
        raise CommandError(
            "the bundled questions are about the bundled model's world, and this model has another "
            "vocabulary; give --knowledge-data and --tone-data"
        )
    job = Job(
        config,
        model,
        _task(data, voice, is_quick=is_quick),
        [Pair(folder, knowledge, tone) for folder in pairs or [config.states]],
        baselines,
        _plan(samples, seed, is_quick=is_quick),
        is_quick,
        out,
    )
    with _alone_in(out), _progress() as (tell, on_done):
        report = run(job, tell, on_done, num_processes=jobs)
        # First what may have taken hours, then what may fail.
        if as_json:
            answer(json.dumps(report, ensure_ascii=False))
        else:
            _print(report)
        if out is not None:
            _write(out, report)
            note(f"wrote {out / 'report.html'}")


def _speaks_of_the_world(model: Path) -> bool:
    """Tell whether a model is the bundled one, or another that was trained on its world's words."""
    if model == DEMO_MODEL:
        return True
    own, bundled = find_vocabulary(model), find_vocabulary(DEMO_MODEL)
    if own is None or bundled is None:
        return False
    return own.read_bytes() == bundled.read_bytes()


def _plan(samples: int | None, seed: int | None, *, is_quick: bool) -> Plan:
    plan = QUICK if is_quick else Plan()
    return replace(
        plan,
        samples=plan.samples if samples is None else samples,
        seed=plan.seed if seed is None else seed,
    )


def _task(data: tuple[Path, Path] | None, voice: str | None, *, is_quick: bool) -> Task:
    if data is None:
        return WorldTask(voice or "pirate", facts=_QUICK_FACTS if is_quick else None)
    if voice is not None:
        raise CommandError("--voice is of the bundled world; --tone-data tells your own manner")
    return OwnTask.read(*data)


def _print(report: dict[str, Any]) -> None:
    rows = [
        (
            system["name"],
            str(system["rows"]),
            f"{system['knowledge']:.2f}",
            f"{system['tone']:.2f}",
            f"{system['both']:.2f}",
            f"[{system['ci_both'][0]:.2f}, {system['ci_both'][1]:.2f}]",
            "" if system["nll"] is None else f"{system['nll']:.3f}",
        )
        for system in report["systems"]
    ]
    answer(f"{report['task']}; {report['facts']} facts, {report['samples']} answers each, T=1")
    answer(table(("system", "rows", "know", "tone", "both", "95 %", "nats"), rows))
    answer("")
    for number, pair in enumerate(report["pairs"], 1):
        if len(report["pairs"]) > 1:
            answer(f"pair {number}")
        for condition in (*pair["preconditions"], *pair["conditions"]):
            mark = {True: "yes", False: "NO", None: "?"}[condition["holds"]]
            answer(f"  {mark:<4} {condition['text']}; measured {condition['value']}")
        for text in pair["negatives"]:
            answer(f"  {text}")
    answer(headline(report))


def _write(out: Path, report: dict[str, Any]) -> None:
    texts = (json.dumps(report, indent=1) + "\n", report_page(report))
    for name, content in zip(_REPORTS, texts, strict=True):
        try:
            write_whole(out / name, content)
        except OSError as exc:
            raise CommandError(
                f"{out / name} cannot be written ({exc.strerror or exc}); the answers are kept, so "
                "the same command has it soon"
            ) from exc


@contextmanager
def _alone_in(out: Path | None) -> Iterator[None]:
    """Make `out` and hold it until the process ends: two runs would write the same files.

    Raises:
        CommandError: it is no folder that can be written into, or another run holds it.
    """
    if out is None:
        yield
        return
    make_folder(out)
    _check_reports(out)
    folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _hold(folder, out)
        yield
    finally:
        os.close(folder)


def _check_reports(out: Path) -> None:
    """Refuse to write over what is no evaluation's; now, and not after hours."""
    is_ours = (out / "answers-0.jsonl").exists()
    for path in (out / name for name in _REPORTS):
        if path.is_dir() or (path.exists() and not is_ours):
            raise CommandError(f"{path} is not what mrss evaluate wrote; give --out another folder")


def _hold(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise CommandError(
            f"another mrss evaluate writes into {out}; wait for it, or give --out another folder"
        ) from exc


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Yield what names the part under way and counts answers, on stderr if it is a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield (lambda name: None), (lambda: None)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        shown = bar.add_task("loading the model")
        yield (
            lambda name: bar.update(shown, description=name),
            lambda: bar.advance(shown),
        )
