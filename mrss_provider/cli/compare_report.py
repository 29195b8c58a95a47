"""`mrss compare report`: tables in the terminal, summary.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mrss_provider.cli.output import CommandError, answer, answer_json, note, printable, table
from mrss_provider.compare.calls import Result
from mrss_provider.compare.folder import Folder, write_whole
from mrss_provider.compare.judge import read_judgements
from mrss_provider.compare.quantiles import number, seconds
from mrss_provider.compare.report import report_page
from mrss_provider.compare.scorers import CHECKS, Scorer, checks, load_scorers
from mrss_provider.compare.summary import Opinions, Summary, summarise
from mrss_provider.compare.votes import read_votes

_MAX_ERRORS_SHOWN = 3


def report_folder(
    path: Path, scorers: tuple[str, ...], judge: str | None, *, as_json: bool
) -> None:
    """Report a comparison anew, from what is in its folder.

    Without scorers or a judge they are those of the report before.

    Raises:
        MRSSError: no comparison there, or a bad scorer.
    """
    folder = Folder.open(path)
    told_scorers, told_judge = _told_before(folder)
    judge = judge or told_judge
    found = {CHECKS: checks, **load_scorers(scorers or told_scorers)}
    write_report(folder, folder.read_results(), found, judge, as_json=as_json)


def _told_before(folder: Folder) -> tuple[tuple[str, ...], str | None]:
    """Return the scorers and the judge of the last summary.json; none without one."""
    try:
        told = json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))
        scorers = tuple(str(name) for name in told["scorers"] if name != CHECKS)
        return scorers, told["judge"] and str(told["judge"]["model"])
    except FileNotFoundError:
        return (), None
    except (ValueError, KeyError, TypeError) as exc:
        raise CommandError(
            f"{folder.path / 'summary.json'} is not what mrss compare writes; remove it"
        ) from exc


def write_report(
    folder: Folder,
    results: Sequence[Result],
    scorers: Mapping[str, Scorer],
    judge: str | None,
    *,
    as_json: bool,
) -> None:
    """Print what was found, and write summary.json and report.html.

    Raises:
        MRSSError: a scorer fails.
    """
    opinions = Opinions(
        judge=judge,
        judgements=None if judge is None else read_judgements(folder, results, judge)[0],
        votes=read_votes(folder, results),
    )
    summary = summarise(folder, results, scorers, opinions)
    write_whole(folder.path / "summary.json", json.dumps(summary.to_dict(), indent=2) + "\n")
    write_whole(folder.path / "report.html", report_page(folder, results, summary))
    if as_json:
        answer_json(summary.to_dict())
    else:
        _print(summary)
        _print_errors(results)
    note(f"wrote {folder.path / 'report.html'}, summary.json and results.jsonl")


def _print(summary: Summary) -> None:
    scores = list(summary.models[0]["scores"])
    header = ["model", "answers", "errors", "ttft", "p95", "tokens/s", "total", "cost", *scores]
    answer(table(header, [_row(row, scores) for row in summary.models]))
    answer("")
    for verdict in summary.verdicts:
        answer(verdict)
    if summary.judge is not None:
        j = summary.judge
        answer(
            f"judge {j['model']}: {j['num_asked']} verdicts, {j['num_unparsable']} could not be "
            f"read, {j['num_failed']} failed, {j['num_inconsistent']} comparisons turned with the "
            f"order, {j['num_ties']} ties"
        )
    if summary.num_done < summary.num_cells:
        answer(f"{summary.num_cells - summary.num_done} of {summary.num_cells} cells are not done")


def _row(row: Mapping[str, Any], scores: Sequence[str]) -> list[str]:
    cost = "unknown" if row["cost"] is None else f"{row['cost']:.4g}"
    return [
        row["model"],
        str(row["num_answers"]),
        str(sum(row["errors"].values())),
        seconds(row["ttft_s"], "p50"),
        seconds(row["ttft_s"], "p95"),
        number(row["tokens_per_s"], "p50"),
        seconds(row["total_s"], "p50"),
        cost,
        *(number(row["scores"][name], "mean") for name in scores),
    ]


def _print_errors(results: Sequence[Result]) -> None:
    failed = [result for result in results if result.error is not None]
    for result in failed[:_MAX_ERRORS_SHOWN]:
        assert result.error is not None
        told = printable(f"{result.error['type']}: {' '.join(result.error['message'].split())}")
        note(f"failed: {result.model} on {result.prompt}, seed {result.seed}: {told}")
    if len(failed) > _MAX_ERRORS_SHOWN:
        note(f"and {len(failed) - _MAX_ERRORS_SHOWN} more; results.jsonl has them all")
    if failed:
        note("--retry-errors asks again what failed")


def report_log(log: Path, feedback: Path | None, group: str | None, *, as_json: bool) -> None:
    """Report the arms of the weighted groups in a proxy's log.

    Raises:
        MRSSError: a file that is not what it should be.
        CommandError: the log holds nothing, or nothing of the group.
    """
    from mrss_provider.compare.arms import read_arms
    from mrss_provider.compare.arms_report import report_arms

    arms = read_arms(log, feedback)
    if not arms.groups:
        raise CommandError(f"{log} holds no call of a weighted group yet; ask the proxy for one")
    if group is not None and group not in arms.groups:
        raise CommandError(
            f"the log has no group {group!r}; it has {', '.join(sorted(arms.groups))}"
        )
    reports = report_arms(arms, group)
    if as_json:
        answer_json(reports)
        return
    for report in reports["groups"]:
        _print_group(report)
    for line in reports["notes"]:
        answer(line)


def _print_group(report: Mapping[str, Any]) -> None:
    answer(f"{report['group']}")
    header = ["arm", "calls", "share", "ttft", "p95", "total", "p95", "errors", "cost", "feedback"]
    rows = [
        [
            arm["arm"],
            str(arm["num_calls"]),
            f"{100 * arm['share']:.0f} %",
            seconds(arm["ttft_s"], "p50"),
            seconds(arm["ttft_s"], "p95"),
            seconds(arm["total_s"], "p50"),
            seconds(arm["total_s"], "p95"),
            str(arm["num_errors"]),
            "unknown" if arm["cost"] is None else f"{arm['cost']:.4g}",
            "-" if arm["feedback"] is None else f"{arm['feedback']:+.2f} ({arm['num_feedback']})",
        ]
        for arm in report["arms"]
    ]
    answer(table(header, rows))
    for sentence in report["verdicts"]:
        answer(f"  {sentence}")
    answer("")
