"""What `mrss tune` shows: the data, the rates, a bar while it learns, a summary, a curve."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mrss_provider.cli.output import note, table
from mrss_provider.replacing import write_output
from mrss_provider.tune.dataset import Findings
from mrss_provider.tune.rates import RateTrial
from mrss_provider.tune.run_file import Record

_BAR_WIDTH = 40
_MAX_NUMBERS = 10
_LINES = 10

Advance = Callable[[int, int], None]


def show_findings(found: Findings) -> None:
    """Say what the data is and what is odd about it."""
    note(
        f"{found.examples} examples, {found.tokens} tokens, {found.answer_tokens} of them answers; "
        f"{found.held_out} held out"
    )
    most = max(found.lengths.values())
    for end, count in found.lengths.items():
        bar = "#" * max(1, round(_BAR_WIDTH * count / most))
        note(f"  up to {end:>6} tokens {count:>6}  {bar}")
    if found.cut:
        note(f"warning: {found.cut} examples are longer than --max-len and are cut at their end")
    if found.nothing_left:
        note(f"warning: {found.nothing_left} examples have nothing to learn and are left out")
    if found.duplicates:
        note(f"warning: {found.duplicates} examples repeat another one")
    if found.leaked:
        shown = ", ".join(map(str, found.leaked[:_MAX_NUMBERS]))
        more = f" and {len(found.leaked) - _MAX_NUMBERS} more" * (len(found.leaked) > _MAX_NUMBERS)
        note(
            f"warning: {len(found.leaked)} held-out examples are among those to learn from, so the "
            f"held-out loss flatters (lines {shown}{more})"
        )


def show_rates(trials: Sequence[RateTrial], start: str, before: float, steps: int) -> None:
    """Print the table of a sweep of learning rates; `start` had a loss of `before`."""
    best = min(trials, key=lambda trial: trial.loss)
    rows = [
        (
            f"{trial.rate:g}",
            f"{trial.loss:.4f}",
            f"{trial.loss - before:+.4f}",
            "<" * (trial is best),
        )
        for trial in trials
    ]
    note(f"learning rates, {steps} steps each; {start} has {before:.4f} nats a token held out")
    note(table(("  RATE", "HELD OUT", "GAIN", ""), [(f"  {rate}", *rest) for rate, *rest in rows]))
    if best in (trials[0], trials[-1]):
        note("the best rate is at the end of the grid; one beyond it may be better (--lr FLOAT)")


@contextmanager
def counting(title: str) -> Iterator[Advance]:
    """Yield what moves a bar on stderr, if that is a terminal, to `done` of `total`."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def watching(steps: int, began_at: int) -> Iterator[Callable[[Record], None]]:
    """Yield what shows a run on stderr: a bar in a terminal, a line now and then elsewhere.

    Args:
        steps: of the whole run.
        began_at: where this part of it begins.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        every = max(1, steps // _LINES)
        yield lambda record: _tell(record, steps) if record.step % every == 0 else None
        return
    columns = (
        TextColumn("step {task.completed} of {task.total}"),
        BarColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=steps, completed=began_at, said="")
        yield lambda record: bar.update(task, completed=record.step, said=_state_of(record))


def _tell(record: Record, steps: int) -> None:
    each = record.seconds / record.step
    left = (steps - record.step) * each
    note(f"step {record.step} of {steps}: {_state_of(record)}, {left:.0f} s left")


def _state_of(record: Record) -> str:
    held_out = f", held out {record.held_out[-1][1]:.4f}" if record.held_out else ""
    rate = record.tokens / max(record.seconds, 1e-9)
    return f"loss {record.losses[-1]:.4f}{held_out}, {rate:.0f} tokens/s"


def draw_curve(path: Path, record: Record, title: str) -> bool:
    """Draw the losses of a run as a PNG; return False where matplotlib is not installed.

    Raises:
        OSError: it cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(record.losses) + 1), record.losses, lw=0.8, alpha=0.6, label="training")
    if record.held_out:
        steps, losses = zip(*record.held_out, strict=True)
        axes.plot(steps, losses, "o-", ms=3, label="held out")
        best = dict(record.held_out)[record.best_step]
        axes.plot(record.best_step, best, "*", ms=10, label="kept")
    axes.set(xlabel="step", ylabel="nats a token", title=title)
    axes.legend()
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(png, dpi=120, format="png")
    write_output(path, png.getvalue())
    return True


def show_summary(summary: dict[str, Any]) -> list[str]:
    """Return the lines that tell how a run went."""
    held = summary["held_out"]
    lines = [
        f"{summary['steps']} steps, {summary['tokens']} tokens in {summary['seconds']:.0f} s "
        f"({summary['tokens_per_s']:.0f} tokens/s), learning rate {summary['learning_rate']:g}"
    ]
    if held:
        lines.append(
            f"held out: {held['start' if 'from' in summary else 'base']:.4f} nats a token at the "
            f"start, {held['best']:.4f} at step {summary['best_step']}, which is kept"
        )
    for kind, gap in (summary.get("gap") or {}).items():
        interval = f"[{gap['low']:.4f}, {gap['high']:.4f}] " if "low" in gap else ""
        lines.append(
            f"gap to the mixture, {kind} prompts: {gap['kl']:.4f} nats a token {interval}"
            f"(the base: {gap['base']:.4f}), same likeliest token {gap['agreement']:.1%}, "
            f"{gap['prompts']} prompts"
        )
    return lines
