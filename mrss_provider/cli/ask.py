"""One request to a backend, its text shown while it arrives; and the list of names."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mrss_provider.backend import (
    Backend,
    FinishReason,
    GenerateRequest,
    ModelCard,
    StreamInfo,
    TokenTrace,
    TraceSummary,
    Usage,
)
from mrss_provider.cli.output import answer, answer_json, printable, table
from mrss_provider.openai_schema.traces import trace_fields
from mrss_provider.sampling_params import SamplingParams


class Show(Protocol):
    """What shows an answer while it comes."""

    def __call__(self, text: str, trace: Sequence[TokenTrace] = ()) -> object:
        """Show a piece of text; `trace` has the tokens that came with it, if asked for."""


@dataclass
class Reply:
    """What has arrived of an answer; readable also after an interrupt."""

    pieces: list[str] = field(default_factory=list)
    info: StreamInfo | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    duration_s: float = 0.0
    trace: list[TokenTrace] = field(default_factory=list)
    trace_summary: TraceSummary | None = None
    thoughts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.pieces)

    def to_json(self) -> dict[str, object]:
        """Return what `--json` prints."""
        usage = self.usage or Usage(0, 0)
        return {
            "mixture": self.info.mixture if self.info else None,
            "rows": self.info.rows if self.info else None,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "duration_s": round(self.duration_s, 3),
            **({"reasoning": "".join(self.thoughts)} if self.thoughts else {}),
            **trace_fields(self.trace, self.trace_summary),
        }

    def summary(self) -> str:
        """Return one line: mixture, rows, tokens, tokens a second."""
        usage = self.usage or Usage(0, 0)
        mixture, rows = (self.info.mixture, self.info.rows) if self.info else ("?", 0)
        rate = usage.completion_tokens / self.duration_s if self.duration_s > 0 else 0.0
        return (
            f"[{mixture}: {rows} row{'s' if rows != 1 else ''}, "
            f"{usage.prompt_tokens}+{usage.completion_tokens} tokens, {rate:.0f} a second]"
        )


async def ask(
    backend: Backend,
    request: GenerateRequest,
    reply: Reply,
    show: Show,
    think: Callable[[str], None] | None = None,
) -> None:
    """Send `request`, fill `reply` (modified) and call `show` with each new piece of text.

    `think` gets what the model thinks before it answers, and "" at the end of the thought.

    Raises:
        MRSSError: as `Backend.open` and its stream do.
    """
    think = think or unsaid
    stream = await backend.open(request)
    # From admission on: the start of an engine is not the answer's time.
    started = time.monotonic()
    reply.info = stream.info
    try:
        async for delta in stream:
            if delta.reasoning:
                reply.thoughts.append(delta.reasoning)
                think(delta.reasoning)
            if delta.text and reply.thoughts and not reply.text:
                think("")
            if delta.text or delta.trace:
                # The tokens of a thought are none of the text's, nor are some of its first piece.
                of_text = delta.trace if reply.text or not reply.thoughts else ()
                reply.pieces.append(delta.text)
                reply.trace += delta.trace
                show(delta.text, of_text)
            reply.finish_reason = delta.finish_reason or reply.finish_reason
            reply.trace_summary = delta.trace_summary or reply.trace_summary
            reply.usage = delta.usage or reply.usage
            reply.duration_s = time.monotonic() - started
    finally:
        await stream.aclose()


def print_reply(
    backend: Backend,
    runner: asyncio.Runner,
    name: str,
    text: str,
    sampling: SamplingParams,
    as_json: bool,
) -> None:
    """Continue `text` and print what comes.

    Raises:
        MRSSError: as `ask`.
    """
    request = GenerateRequest(model=name, sampling=sampling, prompt=text)
    reply = Reply()
    show: Show = ignore if as_json else writer()
    runner.run(ask(backend, request, reply, show))
    if as_json:
        answer_json(reply.to_json())
    else:
        show("\n")


def print_models(cards: Sequence[ModelCard], as_json: bool) -> None:
    """Print the names, one a line."""
    if as_json:
        for card in cards:
            answer_json({"id": f"mrss/{card.id}", "kind": card.kind, **_about(card)})
        return
    rows = [(f"mrss/{card.id}", card.kind, card.description) for card in cards]
    answer(table(("NAME", "KIND", "DESCRIPTION"), rows))


def _about(card: ModelCard) -> dict[str, object]:
    return {
        "description": card.description,
        "context_len": card.context_len,
        "reinject": card.reinject,
    }


def writer() -> Show:
    """Return what shows text on stdout at once; a terminal gets no control characters."""
    is_terminal = sys.stdout.isatty()

    def show(text: str, trace: Sequence[TokenTrace] = ()) -> None:
        sys.stdout.write(printable(text) if is_terminal else text)
        sys.stdout.flush()

    return show


def thinker() -> Callable[[str], None]:
    """Return what shows a thought on stderr, dimmed where that is a terminal; "" ends it."""
    is_terminal = sys.stderr.isatty()

    def think(thought: str) -> None:
        if not thought:
            sys.stderr.write("\n\n")
        elif is_terminal:
            sys.stderr.write(f"\x1b[2m{printable(thought)}\x1b[22m")
        else:
            sys.stderr.write(thought)
        sys.stderr.flush()

    return think


def unsaid(thought: str) -> None:
    """Show nothing of a thought."""


def ignore(text: str, trace: Sequence[TokenTrace] = ()) -> None:
    """Show nothing: the whole answer is printed at its end."""
