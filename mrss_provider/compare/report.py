"""report.html: a comparison as one file that loads nothing and forbids itself to.

What a model wrote is text in it, never HTML.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from mrss_provider.compare.calls import Result
from mrss_provider.compare.charts import intervals, spread
from mrss_provider.compare.comparison import SPEED, Comparison
from mrss_provider.compare.folder import Folder
from mrss_provider.compare.judge import conversation
from mrss_provider.compare.quantiles import number, seconds
from mrss_provider.compare.summary import Summary

_UNITS = {"ttft_s": "s", "total_s": "s", "tokens_per_s": ""}
# A word with the white space before it, which is compared with nothing: it would be everywhere.
_WORDS = re.compile(r"\s*(?:\w+|[^\w\s])|\s+$")
# Texts with more pairs of equal words are shown without marks: finding them takes as much time.
_MAX_MATCHES = 50_000


def report_page(folder: Folder, results: Sequence[Result], summary: Summary) -> str:
    """Return the page."""
    page = Template(files(__package__).joinpath("report.html").read_text("utf-8"))
    script = files(__package__).joinpath("report.js").read_text("utf-8")
    settings = folder.settings
    text = page.substitute(
        title=escape(" · ".join(settings.models)),
        # The one script that may run, whatever else got in.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        script=script,
        about=escape(_about(folder, summary)),
        verdicts="".join(_verdict(c) for c in summary.comparisons)
        or "<li>Nothing to compare.</li>",
        notes="".join(f"<p>{escape(note)}</p>" for note in _notes(summary)),
        table=_table(summary.models),
        spreads="".join(_spreads(folder, results)),
        intervals="".join(_intervals(summary.comparisons)),
        prompts="".join(_prompts(folder, results, summary)),
    )
    # Half of a surrogate pair, which a model may send, is no character of a file.
    return text.encode("utf-8", "replace").decode()


def marked(text: str, reference: str) -> str:
    """Return `text` as HTML, with the words marked that `reference` does not have there."""
    pieces = _WORDS.findall(text)
    words, others = ([one.strip() for one in all_] for all_ in (pieces, _WORDS.findall(reference)))
    counts = Counter(others)
    if sum(counts[word] for word in words) > _MAX_MATCHES:
        return escape(text)
    matcher = difflib.SequenceMatcher(None, others, words, autojunk=False)
    parts = []
    for kind, _, _, start, end in matcher.get_opcodes():
        piece = "".join(pieces[start:end])
        said = piece.strip()
        if kind == "equal" or not said:
            parts.append(escape(piece))
        else:
            before, _, after = piece.partition(said)
            parts.append(f"{before}<mark>{escape(said)}</mark>{after}")
    return "".join(parts)


def _about(folder: Folder, summary: Summary) -> str:
    settings = folder.settings
    where = settings.base_url or "LiteLLM's SDK"
    params = ", ".join(f"{key}={value}" for key, value in settings.params.items()) or "defaults"
    return (
        f"{len(folder.prompts.prompts)} prompts (sha256 {settings.prompts_sha256[:12]}), seeds "
        f"{', '.join(map(str, settings.seeds))}, {params}, through {where}. "
        f"{summary.num_done} of {summary.num_cells} cells are done."
    )


def _verdict(comparison: Comparison) -> str:
    kind = "found" if comparison.winner else "unfound"
    return f'<li class="{kind}">{escape(comparison.sentence)}</li>'


def _notes(summary: Summary) -> Iterable[str]:
    yield (
        f"A winner is named where the interval, corrected over the pairs of a measure (Holm), "
        f"leaves out the value of no difference: of measures without one, at most "
        f"{100 * summary.alpha:g} % are called a finding. Each measure stands for itself. Prompts "
        "are the sample; answers to one prompt count once."
    )
    if summary.judge is not None:
        j = summary.judge
        yield (
            f"Judge {j['model']}: {j['num_asked']} verdicts, {j['num_unparsable']} could not be "
            f"read, {j['num_failed']} failed; of the comparisons {j['num_inconsistent']} turned "
            f"with the order and {j['num_ties']} are ties."
        )
    if summary.num_votes:
        yield f"People voted on {summary.num_votes} comparisons, without seeing names."


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    scores = list(rows[0]["scores"]) if rows else []
    head = ["model", "answers", "errors", "TTFT p50", "p95", "tokens/s", "gap p95", "total p50"]
    head += ["tokens", "cost", *scores]
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    for row in rows:
        cells = [
            row["model"],
            str(row["num_answers"]),
            ", ".join(f"{kind}: {n}" for kind, n in row["errors"].items()) or "0",
            seconds(row["ttft_s"], "p50"),
            seconds(row["ttft_s"], "p95"),
            number(row["tokens_per_s"], "p50"),
            seconds(row["gap_s"], "p95"),
            seconds(row["total_s"], "p50"),
            str(row["completion_tokens"]),
            "unknown" if row["cost"] is None else f"{row['cost']:.4g}",
            *(number(row["scores"][name], "mean") for name in scores),
        ]
        lines.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    return "".join(f"<tr>{line}</tr>" for line in lines)


def _spreads(folder: Folder, results: Sequence[Result]) -> Iterable[str]:
    for measure in SPEED:
        rows = []
        for model in folder.settings.models:
            own = (measure.value(r) for r in results if r.model == model and r.error is None)
            rows.append((model, [value for value in own if value is not None]))
        drawn = spread(f"{measure.name} of each answer", rows, _UNITS[measure.name])
        if drawn:
            yield f"<h3>{escape(measure.name)}</h3>{drawn}"


def _intervals(comparisons: Sequence[Comparison]) -> Iterable[str]:
    by_measure: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_measure.setdefault(comparison.measure, []).append(comparison)
    for name, of_measure in by_measure.items():
        kind = of_measure[0].kind
        title = f"{name}: {kind} of the first model to the second, with its interval"
        yield f"<h3>{escape(name)}</h3>{intervals(title, of_measure)}"


def _prompts(folder: Folder, results: Sequence[Result], summary: Summary) -> Iterable[str]:
    found = {result.key: result for result in results}
    for prompt in folder.prompts.prompts:
        asked = conversation(prompt)
        group = f" <small>{escape(prompt.group)}</small>" if prompt.group else ""
        rows = []
        for seed in folder.settings.seeds:
            cells = [found.get((prompt.id, model, seed)) for model in folder.settings.models]
            if any(cells):
                rows.append(_answers(seed, cells, folder.settings.models, summary))
        haystack = " ".join((prompt.id, prompt.group, asked)).lower()
        yield (
            f'<details class="prompt" data-text="{escape(haystack)}"><summary>'
            f"{escape(prompt.id)}{group}</summary><pre>{escape(asked)}</pre>{''.join(rows)}"
            "</details>"
        )


def _answers(
    seed: int, cells: Sequence[Result | None], models: Sequence[str], summary: Summary
) -> str:
    """Write the answers of all models to one prompt; marks are against the first that answered."""
    reference = next((c.text for c in cells if c is not None and c.error is None), "")
    parts = []
    for model, cell in zip(models, cells, strict=True):
        body = "<p><small>not asked yet</small></p>" if cell is None else _answer(cell, reference)
        numbers = "" if cell is None else escape(_facts_of(cell, summary))
        parts.append(
            f"<article><h4>{escape(model)}</h4>{body}<p><small>{numbers}</small></p></article>"
        )
    return f'<h3>seed {seed}</h3><div class="answers">{"".join(parts)}</div>'


def _answer(cell: Result, reference: str) -> str:
    thought = ""
    if cell.reasoning:
        thought = (
            f"<details><summary>reasoning</summary><pre>{escape(cell.reasoning)}</pre></details>"
        )
    error = ""
    if cell.error is not None:
        told = f"{cell.error['type']}: {cell.error['message']}"
        error = f'<p class="error">{escape(told)}</p>'
    return f'{thought}<div class="text">{marked(cell.text, reference)}</div>{error}'


def _facts_of(cell: Result, summary: Summary) -> str:
    facts = [cell.finish_reason or "unfinished", f"{cell.total_s:.3g} s"]
    if cell.completion_tokens is not None:
        facts.append(f"{cell.completion_tokens} tokens")
    if cell.model_id:
        facts.append(cell.model_id)
    facts += [f"{name} {value:g}" for name, value in summary.scores.get(cell.key, {}).items()]
    return " · ".join(facts)
