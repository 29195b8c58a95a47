"""`mrss session`: conversations that a server keeps, from the terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mrss_provider.cli.output import CommandError, answer, answer_json, note, size, table
from mrss_provider.cli.server_calls import ServerCalls
from mrss_provider.replacing import replace_file

_SESSIONS = "/v1/sessions"


def save(calls: ServerCalls, model: str, text: str, *, is_prompt: bool, system: str | None) -> None:
    """Let the server read a text, and print the new session's id.

    Raises:
        MRSSError: the server refuses it.
    """
    body: dict[str, Any] = {"model": model}
    if is_prompt:
        body["prompt"] = text
    else:
        opening = [{"role": "system", "content": system}] if system else []
        body["messages"] = [*opening, {"role": "user", "content": text}]
    _made(calls.json("POST", _SESSIONS, body))


def list_sessions(calls: ServerCalls, *, as_json: bool) -> None:
    """Print the caller's sessions, one a line.

    Raises:
        MRSSError: the server refuses it.
    """
    sessions = calls.json("GET", _SESSIONS)["data"]
    if as_json:
        for session in sessions:
            answer_json(session)
        return
    rows = [
        (
            session["id"],
            session["mixture"],
            str(session["num_tokens"]),
            size(session["num_bytes"]),
            _when(session["updated"]),
        )
        for session in sessions
    ]
    answer(table(("ID", "MIXTURE", "TOKENS", "SIZE", "UPDATED"), rows))


def show(calls: ServerCalls, session_id: str) -> None:
    """Print what there is to know of one.

    Raises:
        MRSSError: there is none, or the server refuses it.
    """
    answer_json(calls.json("GET", _path(session_id)))


def fork(calls: ServerCalls, session_id: str) -> None:
    """Save one once more, and print the new id.

    Raises:
        MRSSError: there is none, or the server refuses it.
    """
    _made(calls.json("POST", f"{_path(session_id)}/fork"))


def export(calls: ServerCalls, session_id: str, file: Path, *, force: bool) -> None:
    """Write one to a file, whole or not at all.

    Raises:
        MRSSError: there is none, or the server refuses it.
        CommandError: the file exists, or is no regular file.
    """
    if file.exists() and not force:
        raise CommandError(f"{file} exists; choose another name, or replace it with --force")
    if file.exists() and not file.is_file():
        raise CommandError(f"{file} is no regular file; choose another name")
    data = calls.download(f"{_path(session_id)}/export")
    # A link stays, and leads to the new file.
    replace_file(file.resolve(), data, mode=0o600)
    answer(str(file))
    note(f"{size(len(data))}; it has what the conversation left in the model: keep it as private")


def import_(calls: ServerCalls, file: Path) -> None:
    """Save what `export` wrote, and print the new id.

    Raises:
        MRSSError: the server refuses it.
    """
    _made(calls.upload(f"{_SESSIONS}/import", file.read_bytes()))


def delete(calls: ServerCalls, session_id: str) -> None:
    """Forget one.

    Raises:
        MRSSError: there is none, or the server refuses it.
    """
    calls.json("DELETE", _path(session_id))


def _made(session: dict[str, Any]) -> None:
    answer(session["id"])
    note(
        f"{session['num_tokens']} tokens of {session['mixture']}; go on with it in a request: "
        f'"mrss": {{"session": "{session["id"]}", "save": true}}'
    )


def _path(session_id: str) -> str:
    return f"{_SESSIONS}/{quote(session_id, safe='')}"


def _when(unix_time: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_time))
