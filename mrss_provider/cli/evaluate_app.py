"""`mrss evaluate`: options and help. The work is in `evaluate.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mrss_provider.cli.options import takes_config
from mrss_provider.config import EngineConfig

_OPTIONS = ("model", "states", "device", "dtype", "threads", "max_rows")


@takes_config(EngineConfig, only=_OPTIONS)
def evaluate(
    overrides: dict[str, Any],
    knowledge: Annotated[str, typer.Option(help="The state that knows.")] = "knowledge",
    tone: Annotated[str, typer.Option(help="The state that has the manner.")] = "tone",
    pair: Annotated[
        list[Path] | None,
        typer.Option(help="A folder with both states; once for each tuning seed. [--states]"),
    ] = None,
    baselines: Annotated[
        list[Path] | None,
        typer.Option(help="A folder of one-row states to compare with; one for each pair."),
    ] = None,
    knowledge_data: Annotated[
        Path | None, typer.Option(help="Your questions: JSON Lines of question, answers, wrong.")
    ] = None,
    tone_data: Annotated[
        Path | None, typer.Option(help="Your manner: JSON Lines of text, tone, or markers.")
    ] = None,
    voice: Annotated[str | None, typer.Option(help="Of the bundled world's. [pirate]")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Answers a fact. [8, --quick: 2]")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of questions and draws. [5]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look, in a minute.")] = False,
    jobs: Annotated[
        int, typer.Option(min=1, max=64, help="Pairs measured at once, a process each.")
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="A folder for report.html; a run goes on where it stopped.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure whether a mixture has both the knowledge and the tone of its states.

    Out of the box: the bundled model, or one with its vocabulary, and questions about its world. On
    any other model and states: your own --knowledge-data and --tone-data.
    """
    if (knowledge_data is None) != (tone_data is None):
        raise typer.BadParameter("--knowledge-data and --tone-data go together")
    if pair and "states" in overrides:
        raise typer.BadParameter("--pair names the folders of the states: leave --states out")
    from mrss_provider.cli.evaluate import evaluate as command

    data = None if knowledge_data is None or tone_data is None else (knowledge_data, tone_data)
    command(
        EngineConfig.from_env(overrides),
        knowledge=knowledge,
        tone=tone,
        pairs=pair or [],
        baselines=baselines or [],
        data=data,
        voice=voice,
        samples=samples,
        seed=seed,
        is_quick=quick,
        jobs=jobs,
        out=out,
        as_json=as_json,
    )
