"""`mrss states`: options and help. The work is in `states.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mrss_provider.cli.options import takes_config
from mrss_provider.config import EngineConfig

states = typer.Typer(
    name="states",
    help="Look after tuned states: list, show, check, import, average, make from a text.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_FILES = ("model", "states")

Force = Annotated[bool, typer.Option("--force", help="Replace a state of that name.")]
NewName = Annotated[str, typer.Option("--name", help="What requests will call the new state.")]


@states.command("list")
@takes_config(EngineConfig, only=_FILES)
def list_(
    overrides: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List the states and mixtures of the folder, the unusable ones too."""
    from mrss_provider.cli.states import list_states

    list_states(EngineConfig.from_env(overrides), as_json)


@states.command()
@takes_config(EngineConfig, only=_FILES)
def show(
    overrides: dict[str, Any],
    name: Annotated[str, typer.Argument(help="A state, or a named mixture.")],
) -> None:
    """Show what a file says of itself, and the norm of each layer."""
    from mrss_provider.cli.states import show_state

    show_state(EngineConfig.from_env(overrides), name)


@states.command()
@takes_config(EngineConfig, only=_FILES)
def check(
    overrides: dict[str, Any],
    names: Annotated[list[str] | None, typer.Argument(help="[all states]")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A text of the kind the state was tuned on (4096 tokens are read)."),
    ] = None,
) -> None:
    """Read states both ways round and score a text, without changing anything."""
    from mrss_provider.cli.states import check_states

    if not check_states(EngineConfig.from_env(overrides), names or [], text):
        raise typer.Exit(1)


@states.command("import")
@takes_config(EngineConfig, only=_FILES)
def import_(
    overrides: dict[str, Any],
    file: Annotated[Path, typer.Argument(help="RWKV-PEFT .pth, web-rwkv .st, or .safetensors.")],
    name: NewName,
    orientation: Annotated[
        Literal["vk", "kv"] | None,
        typer.Option(help="Of the file. [as it says; kv for .st, else vk]"),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="What it is about: knowledge, tone, ...")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Tuned with a leading token 0.")] = False,
    licence: Annotated[str | None, typer.Option(help="Its licence, an SPDX name.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Chat template, if tuned on another one than its model's.")
    ] = None,
    force: Force = False,
) -> None:
    """Copy a state file into the folder of states, in our form and with what it is."""
    from mrss_provider.cli.states import import_state

    said = {"group": group, "bos": bos or None, "licence": licence, "template": template}
    changes = {key: value for key, value in said.items() if value is not None}
    import_state(EngineConfig.from_env(overrides), file, name, orientation, changes, force=force)


@states.command()
@takes_config(EngineConfig, only=_FILES)
def average(
    overrides: dict[str, Any],
    terms: Annotated[list[str], typer.Argument(help="States and weights: knowledge:0.7 tone:0.3")],
    name: NewName,
    force: Force = False,
) -> None:
    """Make one state from several: one row's cost, and a blunter mixture."""
    from mrss_provider.cli.states import average_into

    average_into(EngineConfig.from_env(overrides), terms, name, force=force)


@states.command("from-prompt")
@takes_config(EngineConfig, only=(*_FILES, "device", "dtype", "quantize", "threads"))
def from_prompt(
    overrides: dict[str, Any],
    text: Annotated[Path, typer.Option(help="A text (UTF-8), read as it stands.")],
    name: NewName,
    start: Annotated[
        str, typer.Option("--from", help="The state that the model begins from.")
    ] = "base",
    group: Annotated[
        str | None, typer.Option(help="What it is about: knowledge, tone, ...")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Its licence, an SPDX name.")] = None,
    force: Force = False,
) -> None:
    """Make a state of what the model knows after a long text: no request reads it again."""
    from mrss_provider.cli.prompt_states import make_from_prompt

    config = EngineConfig.from_env(overrides)
    make_from_prompt(config, text, name, start, group=group, licence=licence, force=force)
