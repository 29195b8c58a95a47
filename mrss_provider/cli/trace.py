"""`mrss trace`: one answer, or a given text, with the state that spoke at every token."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mrss_provider.backend import Backend, GenerateRequest
from mrss_provider.cli.ask import Reply, ask, ignore
from mrss_provider.cli.output import CommandError, answer_json, note
from mrss_provider.cli.spoken import Painter, print_legend
from mrss_provider.cli.trace_page import trace_page
from mrss_provider.replacing import write_output


def trace(
    backend: Backend,
    runner: asyncio.Runner,
    request: GenerateRequest,
    *,
    html: Path | None,
    as_json: bool,
) -> None:
    """Answer a traced request: as a page, as JSON, or coloured in the terminal.

    Raises:
        CommandError: the page has no folder to go to.
        MRSSError: as `ask`.
    """
    if html is not None and not html.parent.is_dir():
        raise CommandError(f"{html.parent} is no folder; make it, or give --html another path")
    reply = Reply()
    show = ignore if html is not None or as_json else Painter()
    runner.run(ask(backend, request, reply, show))
    assert reply.info is not None
    assert reply.trace_summary is not None
    if html is not None:
        page = trace_page(
            reply.info.mixture,
            _prompt(request),
            reply.trace,
            reply.trace_summary,
            is_given=request.given is not None,
        )
        write_output(html, page.encode())
        note(f"wrote {html}")
    if as_json:
        answer_json(reply.to_json())
    else:
        show("\n")
        print_legend(reply.trace_summary)


def _prompt(request: GenerateRequest) -> str:
    if request.messages is not None:
        return request.messages[-1].content
    assert isinstance(request.prompt, str)
    return request.prompt
