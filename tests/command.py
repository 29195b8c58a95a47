"""Run the command line inside this process, where torch is already loaded."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

import typer

from mrss_provider.cli.app import app
from mrss_provider.cli.output import run


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@functools.cache
def command() -> Any:
    """Return the commands, made once; an app makes all of them anew each time that it is called."""
    return typer.main.get_command(app)


def mrss(*args: object, stdin: str = "") -> Result:
    """Run `mrss ARGS` and return its exit status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["mrss", *map(str, args)]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run(lambda: command()(prog_name="mrss"))
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1 if exc.code else 0
    return Result(code, out.getvalue(), err.getvalue())
