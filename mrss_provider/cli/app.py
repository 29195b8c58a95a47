"""The commands' names, options and help. Each parses and builds; its module does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="mrss",
    help="Mixtures of recurrent RWKV states: serve them, talk to them, look after the files.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from mrss_provider import __version__
        from mrss_provider.cli.output import answer

        answer(f"mrss {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def pull(
    what: Annotated[str | None, typer.Argument(metavar="REPO_OR_ALIAS", show_default=False)] = None,
    file: Annotated[
        str | None, typer.Option(help="A file of the repository, or a pattern like '*0.4b*'.")
    ] = None,
    to: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("models"),
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    list_aliases: Annotated[bool, typer.Option("--list", help="List the aliases.")] = False,
) -> None:
    """Fetch a model from the Hugging Face hub; run it again to resume."""
    from mrss_provider.cli import pull as command
    from mrss_provider.cli.output import answer

    if list_aliases:
        answer(command.aliases_table())
        return
    if what is None:
        raise typer.BadParameter("give a repository or an alias (--list shows them)")
    answer(str(command.pull(what, file=file, to=to, revision=revision)))
