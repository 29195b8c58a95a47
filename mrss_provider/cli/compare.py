"""`mrss compare`: ask, go on after a kill, judge, and write the report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mrss_provider.cli.compare_jobs import Asking, connected, exit_status
from mrss_provider.cli.compare_report import write_report
from mrss_provider.cli.folders import make_folder
from mrss_provider.cli.output import note
from mrss_provider.compare.calls import Connection, Result, call_of
from mrss_provider.compare.cells import Cell, ask_all, left_to_do, plan, wake
from mrss_provider.compare.folder import Folder, Settings
from mrss_provider.compare.http import parse_base_url
from mrss_provider.compare.jsonl import JsonLines
from mrss_provider.compare.judge import judge_all, questions, read_judgements
from mrss_provider.compare.prompts import read_prompts
from mrss_provider.compare.scorers import CHECKS, Scorer, checks, load_scorers

_WARM_UP_S = 120.0


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        asking: whom, and how.
        prompts: the prompt file.
        seeds: of the answers.
        out: folder of results.
        scorers: names.
        judge: a model's name, or None.
        retry_errors: ask again what failed.
        warm_up: ask each model for one token first.
        as_json: print the summary as JSON.
    """

    asking: Asking
    prompts: Path
    seeds: tuple[int, ...]
    out: Path
    scorers: tuple[str, ...] = ()
    judge: str | None = None
    retry_errors: bool = False
    warm_up: bool = True
    as_json: bool = False


def run(job: Job) -> int:
    """Compare, report, and return the exit status.

    Raises:
        CommandError: a folder that cannot be written into.
        MRSSError: a bad prompt file or scorer, or a folder of another comparison.
        KeyboardInterrupt: Ctrl-C; what came is kept.
    """
    scorers: Mapping[str, Scorer] = {CHECKS: checks, **load_scorers(job.scorers)}
    if job.asking.base_url is not None:
        parse_base_url(job.asking.base_url)
    settings = Settings(
        models=job.asking.models,
        seeds=job.seeds,
        params=dict(job.asking.params),
        base_url=job.asking.base_url,
        prompts_sha256=read_prompts(job.prompts).sha256,
    )
    make_folder(job.out)
    folder = Folder.begin(job.out, settings, job.prompts)
    cells = plan(folder.prompts.prompts, settings.models, settings.seeds)
    with JsonLines(folder.results) as file:
        results = folder.read_results()
        left = left_to_do(cells, results, retry_errors=job.retry_errors)
        if len(left) < len(cells):
            note(f"{len(cells) - len(left)} of {len(cells)} cells are done; going on")
        try:
            asyncio.run(_ask(job, folder, left, file))
        except KeyboardInterrupt:
            done = len(cells) - len(left_to_do(cells, folder.read_results(), retry_errors=False))
            note(f"stopped with {done} of {len(cells)} cells; the same command goes on")
            raise
    results = folder.read_results()
    write_report(folder, results, scorers, job.judge, as_json=job.as_json)
    return exit_status(results)


async def _ask(job: Job, folder: Folder, left: list[Cell], file: JsonLines) -> None:
    """Ask what is left, then the judge; one connection for all."""
    async with connected(job.asking) as connection:
        if left:
            if job.warm_up:
                settings, first = folder.settings, left[0]
                calls = [
                    call_of(first.prompt, model, first.seed, settings.params, _WARM_UP_S)
                    for model in settings.models
                ]
                await wake(connection, calls)
            with progress("asking", len(left)) as advance:
                await ask_all(left, connection, folder.settings, job.asking.pace, file, advance)
        if job.judge is not None:
            await _judge(job, job.judge, folder, connection)


async def _judge(job: Job, judge: str, folder: Folder, connection: Connection) -> None:
    results = folder.read_results()
    _, answered = read_judgements(folder, results, judge)
    waiting = [q for q in questions(folder, results) if q.key not in answered]
    with JsonLines(folder.judgements) as file, progress("judging", len(waiting)) as advance:
        await judge_all(
            waiting,
            judge,
            connection,
            {"temperature": 0.0},
            job.asking.pace,
            file,
            lambda: advance(None),
        )


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[Result | None], None]]:
    """Yield what moves a bar on stderr by one, if that is a terminal; it counts errors too."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    num_failed = 0
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=total)

        def advance(result: Result | None) -> None:
            nonlocal num_failed
            num_failed += result is not None and result.error is not None
            failed = f", {num_failed} failed" if num_failed else ""
            bar.update(task, advance=1, description=title + failed)

        yield advance
