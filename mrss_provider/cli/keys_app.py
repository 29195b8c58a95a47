"""`mrss keys`: options and help. The work is in `keys.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

keys = typer.Typer(
    name="keys",
    help="Make and revoke the API keys of a server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

KeysFile = Annotated[
    Path,
    typer.Option("--keys-file", envvar="MRSS_KEYS_FILE", help="Where the server finds them."),
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="Who it is for.")]


@keys.command()
def create(
    key_id: KeyId,
    file: KeysFile,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may change what is served, and see the metrics.")
    ] = False,
    max_concurrent: Annotated[int, typer.Option(min=0, help="Requests under way.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(min=0, help="Of prompts and answers.")] = 0,
    max_prompt_len: Annotated[int, typer.Option(min=0, help="Longest prompt, in tokens.")] = 0,
    max_answer_len: Annotated[int, typer.Option(min=0, help="Most tokens of an answer.")] = 0,
) -> None:
    """Make a key and print it, this once: the file has its hash only.

    0 is no limit of its own. A running server takes the key within a second.
    """
    from mrss_provider.cli.keys import create as command
    from mrss_provider.server.keys import Limits

    limits = Limits(max_concurrent, tokens_per_minute, max_prompt_len, max_answer_len)
    command(file, key_id, "admin" if admin else "user", limits)


@keys.command("list")
def list_(
    file: KeysFile,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List the keys of a file, which are not in it, and their limits."""
    from mrss_provider.cli.keys import list_keys

    list_keys(file, as_json)


@keys.command()
def revoke(key_id: KeyId, file: KeysFile) -> None:
    """Remove a key; a running server refuses it within a second."""
    from mrss_provider.cli.keys import revoke as command

    command(file, key_id)
