"""`mrss litellm-config`: options and help. The work is in `litellm_config.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mrss_provider.cli.options import takes_config
from mrss_provider.config import EngineConfig


@takes_config(EngineConfig, only=("model", "states", "template"))
def litellm_config(
    overrides: dict[str, Any],
    out: Annotated[Path | None, typer.Option(help="The file to write. [stdout]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite it.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Let LiteLLM validate it before it is written.")
    ] = False,
    api_base: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The engine to ask and to write down: http://host:port or unix:///path. "
            "[the one at MRSS_SOCKET, else this user's, started if need be]",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            help="Sent to that engine; the file names MRSS_API_KEY, never the key. [MRSS_API_KEY]",
        ),
    ] = None,
    input_cost: Annotated[
        float, typer.Option(min=0, help="USD for a million prompt tokens.")
    ] = 0.0,
    output_cost: Annotated[
        float, typer.Option(min=0, help="USD for a million tokens of answers.")
    ] = 0.0,
    name: Annotated[
        list[str] | None,
        typer.Option(help="A mixture that gets an entry of its own; may be repeated."),
    ] = None,
    ab: Annotated[
        list[str] | None,
        typer.Option(help="An A/B group: 'pirates=knowledge+tone:3,tone:1'; may be repeated."),
    ] = None,
    openai_route: Annotated[
        bool, typer.Option("--openai-route", help="Add a way in over OpenAI's wire.")
    ] = False,
) -> None:
    """Write a LiteLLM proxy's configuration from what an engine serves."""
    from mrss_provider.cli import litellm_config as command
    from mrss_provider.cli.connect import connected
    from mrss_provider.cli.litellm_entries import Wishes

    if force and out is None:
        raise typer.BadParameter("--force goes with --out")
    groups = tuple(command.read_group(text) for text in ab or ())
    wishes = Wishes(
        api_base=api_base,
        has_key=bool(api_key or os.environ.get("MRSS_API_KEY")),
        input_cost=input_cost,
        output_cost=output_cost,
        names=tuple(text.removeprefix("mrss/") for text in name or ()),
        groups=groups,
        openai_route=openai_route,
        variables={f"MRSS_{key.upper()}": str(value) for key, value in overrides.items()},
    )
    asked = connected(server=api_base, api_key=api_key, in_process=False, overrides=overrides)
    with asked as (backend, runner):
        cards = runner.run(backend.models())
    command.litellm_config(cards, wishes, out=out, force=force, checked=check)
