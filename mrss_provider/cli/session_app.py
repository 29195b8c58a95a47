"""`mrss session`: options and help. The work is in `session.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

session = typer.Typer(
    name="session",
    help="Conversations that a server keeps: save, fork, move and delete them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Server = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="http://host:port or unix:///path. [MRSS_SOCKET, else port 9000 here]"
    ),
]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="Whose they are. [MRSS_API_KEY]")]
SessionId = Annotated[str, typer.Argument(metavar="ID", show_default=False)]


@session.command()
def save(
    name: Annotated[str, typer.Argument(help="States and weights, or a named mixture.")],
    text: Annotated[
        str | None, typer.Option("-m", "--message", help="What the user says first. [stdin]")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    is_prompt: Annotated[
        bool, typer.Option("--prompt", help="Read the text as it stands, without a template.")
    ] = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Let the server read a text and keep where it ends; print the session's id."""
    from mrss_provider.cli.server_calls import ServerCalls
    from mrss_provider.cli.session import save as command

    if is_prompt and system is not None:
        raise typer.BadParameter("--prompt has no system message; put it into the text")
    said = sys.stdin.read() if text is None else text
    with ServerCalls.to(server, api_key) as calls:
        command(calls, name.removeprefix("mrss/"), said, is_prompt=is_prompt, system=system)


@session.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """List your sessions, the oldest first."""
    from mrss_provider.cli.server_calls import ServerCalls
    from mrss_provider.cli.session import list_sessions

    with ServerCalls.to(server, api_key) as calls:
        list_sessions(calls, as_json=as_json)


@session.command()
def show(session_id: SessionId, server: Server = None, api_key: ApiKey = None) -> None:
    """Show one, as JSON."""
    from mrss_provider.cli.server_calls import ServerCalls
    from mrss_provider.cli.session import show as command

    with ServerCalls.to(server, api_key) as calls:
        command(calls, session_id)


@session.command()
def fork(session_id: SessionId, server: Server = None, api_key: ApiKey = None) -> None:
    """Save one once more under another id, and print it."""
    from mrss_provider.cli.server_calls import ServerCalls
    from mrss_provider.cli.session import fork as command

    with ServerCalls.to(server, api_key) as calls:
        command(calls, session_id)


@session.command()
def export(
    session_id: SessionId,
    file: Annotated[Path, typer.Argument(help="Where to: a .safetensors file.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Write one to a file, to import it elsewhere or later."""
    from mrss_provider.cli.server_calls import ServerCalls
    from mrss_provider.cli.session import export as command

    with ServerCalls.to(server, api_key) as calls:
        command(calls, session_id, file, force=force)


@session.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="What `mrss session export` wrote.")],
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Save an exported one under a new id, and print it."""
    from mrss_provider.cli.server_calls import ServerCalls
    from mrss_provider.cli.session import import_ as command

    with ServerCalls.to(server, api_key) as calls:
        command(calls, file)


@session.command()
def delete(session_id: SessionId, server: Server = None, api_key: ApiKey = None) -> None:
    """Forget one."""
    from mrss_provider.cli.server_calls import ServerCalls
    from mrss_provider.cli.session import delete as command

    with ServerCalls.to(server, api_key) as calls:
        command(calls, session_id)
