"""`mrss compare --live`: two to four answers to one prompt, side by side as they come."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import typer

from mrss_provider.cli.compare_jobs import ALL_FAILED, Asking, connected, exit_status
from mrss_provider.cli.output import CommandError, answer, note, printable
from mrss_provider.compare.calls import Call, Piece, Result, ask
from mrss_provider.compare.cells import wake

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_MAX_PANES = 4
_REFRESHES_PER_S = 20


class Panes:
    """The answers so far.

    Args:
        models: one pane each.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self.models = models
        self._texts = [""] * len(models)
        self._ends: list[Result | None] = [None] * len(models)

    def taker(self, i: int) -> Callable[[Piece], None]:
        """Return what adds a piece to pane `i`."""

        def take(piece: Piece) -> None:
            self._texts[i] += printable(piece.reasoning + piece.text)

        return take

    def end(self, i: int, result: Result) -> None:
        """Say how the answer in pane `i` ended."""
        self._ends[i] = result

    def table(self, console: Console) -> Table:
        """Return the panes as rich draws them, each as long as the terminal lets it be."""
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        width = max(16, console.width // len(self.models) - 4)
        height = max(3, console.height - 5)
        grid = Table.grid(expand=True)
        panes = []
        for model, text, end in zip(self.models, self._texts, self._ends, strict=True):
            grid.add_column(ratio=1)
            # What came last is what people read.
            lines = Text(text).wrap(console, width)[-height:]
            panes.append(
                Panel(Text("\n").join(lines), title=Text(model), subtitle=Text(status(end)))
            )
        grid.add_row(*panes)
        return grid


def compare_live(asking: Asking, prompt: str, seed: int) -> int:
    """Stream the answers, print each whole at the end where stdout is no terminal.

    Returns:
        The exit status.

    Raises:
        typer.BadParameter: more models than panes.
        CommandError: nobody answered.
    """
    if len(asking.models) > _MAX_PANES:
        raise typer.BadParameter(f"--live shows 2 to {_MAX_PANES} models, got {len(asking.models)}")
    results = asyncio.run(_stream(asking, prompt, seed))
    if not sys.stdout.isatty():
        for result in results:
            answer(f"[{result.model}] {status(result)}\n{printable(result.text)}\n")
    code = exit_status(results)
    if code == ALL_FAILED:
        raise CommandError("no model answered")
    return code


async def _stream(asking: Asking, prompt: str, seed: int) -> list[Result]:
    from rich.console import Console
    from rich.live import Live

    panes = Panes(asking.models)
    console = Console()
    shown = (
        Live(
            get_renderable=lambda: panes.table(console),
            console=console,
            refresh_per_second=_REFRESHES_PER_S,
        )
        if console.is_terminal
        else nullcontext()
    )
    messages = [{"role": "user", "content": prompt}]
    calls = [
        Call(model, messages, None, asking.params, seed, asking.timeout_s)
        for model in asking.models
    ]
    async with connected(asking) as connection:
        # What starting an engine takes is nobody's latency.
        note("waking the models ...")
        await wake(connection, calls)

        async def one(i: int, call: Call) -> Result:
            result = await ask(connection, call, "live", on_piece=panes.taker(i))
            panes.end(i, result)
            return result

        with shown:
            return list(await asyncio.gather(*(one(i, call) for i, call in enumerate(calls))))


def status(result: Result | None) -> str:
    """Return how an answer ended, in a few words; "..." while it has not."""
    if result is None:
        return "..."
    if result.error is not None:
        return printable(f"{result.error['type']}: {result.error['message']}")[:200]
    words = [result.finish_reason or "unfinished"]
    if result.ttft_s is not None:
        words.append(f"first text after {1000 * result.ttft_s:.0f} ms")
    if result.tokens_per_s is not None:
        words.append(f"{result.tokens_per_s:.0f} tokens/s")
    return ", ".join([*words, f"{result.total_s:.2f} s"])
