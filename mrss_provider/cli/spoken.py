"""An answer in the terminal, coloured by the state that spoke."""

from __future__ import annotations

import codecs
import colorsys
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.style import Style

from mrss_provider.backend import AGREED, TokenTrace, TraceSummary
from mrss_provider.cli.output import printable
from mrss_provider.cli.trace_page import state_hues
from mrss_provider.mixture import BASE


class Painter:
    """Shows text as it comes, in the hue of who spoke; plain where all agree or the base did.

    A stream that is no terminal gets the text as it is.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = _console(stream or sys.stdout)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # What tokens say and the text has not yet shown: it may hold back a stop string.
        self._ahead: deque[tuple[str, TokenTrace]] = deque()
        self._styles: Mapping[str, Style] = {}
        self._has_begun = False

    def __call__(self, text: str, trace: Sequence[TokenTrace] = ()) -> None:
        """Show a piece of an answer, with the traces that came with it."""
        if trace and not self._styles:
            self._styles = state_styles(tuple(trace[0].weights))
        for token in trace:
            if decoded := self._decoder.decode(token.token):
                self._ahead.append((decoded, token))
        if text and not self._has_begun:
            self._has_begun = True
            self._skip_lead(text)
        while text:
            piece, style = self._next_piece(text)
            text = text[len(piece) :]
            self._console.out(_shown(piece, self._console), style=style, highlight=False, end="")

    def _next_piece(self, text: str) -> tuple[str, Style | None]:
        """Return the beginning of `text` that one token said, and its style."""
        if not self._ahead:
            return text, None
        said, token = self._ahead.popleft()
        if len(said) > len(text):
            self._ahead.appendleft((said[len(text) :], token))
        return text[: len(said)], None if token.agreed else self._styles.get(token.who)

    def _skip_lead(self, text: str) -> None:
        """Drop the blank that a model writes before its answer, which is no part of the text."""
        said = "".join(said for said, _ in self._ahead)
        length = min(len(said), len(text))
        if said[:length] != text[:length] and self._ahead:
            first, token = self._ahead.popleft()
            if first[1:]:
                self._ahead.appendleft((first[1:], token))


def print_legend(summary: TraceSummary) -> None:
    """Write one line to stderr: each state in its colour, and its share of the tokens."""
    console = _console(sys.stderr)
    styles = state_styles([name for name in summary.spoken_share if name != AGREED])
    for i, (name, share) in enumerate(summary.spoken_share.items()):
        text = f"{'all agree' if name == AGREED else name} {100 * share:.0f} %"
        console.out("  " if i else "", end="", highlight=False)
        console.out(text, style=styles.get(name), end="", highlight=False)
    console.out("")


def state_styles(names: Sequence[str]) -> dict[str, Style]:
    """Return each state's style: the hue that it has in the HTML page, readable on any ground."""
    return {name: Style(color=_rgb(hue)) for name, hue in state_hues(names).items() if name != BASE}


def _console(stream: TextIO) -> Console:
    return Console(file=stream, soft_wrap=True, highlight=False)


def _shown(text: str, console: Console) -> str:
    return printable(text) if console.is_terminal else text


def _rgb(hue: int) -> str:
    # The page's hues are of another wheel, where they lie some 20 degrees further.
    red, green, blue = colorsys.hls_to_rgb(((hue - 25) % 360) / 360, 0.52, 0.75)
    return f"rgb({255 * red:.0f},{255 * green:.0f},{255 * blue:.0f})"
