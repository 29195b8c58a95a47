"""A trace as one HTML file: text coloured by who spoke, the weights below, numbers on demand.

The page loads nothing and forbids itself to. What a model wrote is text in it, never HTML.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from mrss_provider.backend import AGREED, TokenTrace, TraceSummary
from mrss_provider.mixture import BASE
from mrss_provider.openai_schema.traces import token_trace_to_dict

# Far apart for all eyes; beyond them hues repeat.
HUES = (250, 55, 165, 330, 110, 290, 25, 200)

# Two states that never agree.
_MOST_DISAGREEMENT = math.log(2)
_LEAST_COLOUR = 0.35


def trace_page(
    mixture: str,
    prompt: str,
    trace: Sequence[TokenTrace],
    summary: TraceSummary,
    *,
    is_given: bool,
) -> str:
    """Return the page.

    Args:
        mixture: canonical name.
        prompt: what was asked.
        trace: of the answer's tokens.
        summary: of the whole answer.
        is_given: whether the answer is a given text.
    """
    names = [name for name in summary.spoken_share if name != AGREED]
    hues = state_hues(names)
    template = Template(files(__package__).joinpath("trace_page.html").read_text("utf-8"))
    return template.substitute(
        title=escape(mixture),
        prompt=escape(prompt),
        answer="The given text" if is_given else "The answer",
        legend="".join(_legend_item(name, hues, summary) for name in (*names, AGREED)),
        tokens="".join(_tokens(trace, hues)),
        data=_json_in_html(
            {
                "states": [
                    {"name": name, "kind": _kind(name), "hue": hues.get(name, 0)} for name in names
                ],
                "tokens": [token_trace_to_dict(token) for token in trace],
            }
        ),
    )


def state_hues(names: Sequence[str]) -> dict[str, int]:
    """Give each state a hue, in degrees; the base has none."""
    states = [name for name in names if name != BASE]
    return {name: HUES[i % len(HUES)] for i, name in enumerate(states)}


def token_texts(trace: Sequence[TokenTrace]) -> list[str]:
    """Return each token's text; a character in several tokens is the last one's."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(token.token) for token in trace]


def _legend_item(name: str, hues: Mapping[str, int], summary: TraceSummary) -> str:
    """Write one state's colour, its share of the tokens, and how its influence fades."""
    label = "all agree" if name == AGREED else name
    kind = AGREED if name == AGREED else _kind(name)
    half_life = None if name == AGREED else summary.influence_half_life.get(name)
    fades = "" if half_life is None else f", fades by half in {half_life:.2g} tokens"
    return (
        f'<li><span class="swatch {kind}" style="--hue:{hues.get(name, 0)}"></span>{escape(label)} '
        f"<small>{100 * summary.spoken_share[name]:.3g} %{fades}</small></li>"
    )


def _tokens(trace: Sequence[TokenTrace], hues: Mapping[str, int]) -> list[str]:
    pieces: list[str] = []
    for token, text in zip(trace, token_texts(trace), strict=True):
        hue, colour, strip = hues.get(token.who, 0), _colour(token), _strip(token, hues)
        kind = "token" if token.agreed else f"token {_kind(token.who)}"
        breaks = "\n" * text.count("\n")
        shown = escape(text.replace("\r", "").replace("\n", "↵"))
        if not shown:
            # The end of the text, or a part of a character.
            shown = '<span class="ghost">·</span>'
        pieces.append(
            f'<span class="{kind}" role="button" tabindex="{-1 if pieces else 0}" '
            f'style="--hue:{hue};--d:{colour:.3g};--strip:{strip}">{shown}</span>{breaks}'
        )
    return pieces


def _colour(token: TokenTrace) -> float:
    """Return how strongly a token is coloured, in [0, 1]; 0 where all agree."""
    if token.agreed or token.who == BASE:
        return 0.0
    reached = min(1.0, token.disagreement / _MOST_DISAGREEMENT)
    return _LEAST_COLOUR + (1 - _LEAST_COLOUR) * reached


def _strip(token: TokenTrace, hues: Mapping[str, int]) -> str:
    """Write the weights above 0 as a gradient, stacked from below."""
    heard = {name: weight for name, weight in token.weights.items() if weight > 0}
    total = sum(heard.values())
    stops, reached = [], 0.0
    for name, weight in heard.items():
        start, reached = reached, reached + weight / total
        chroma = 0 if name == BASE else 0.17
        colour = f"oklch(.66 {chroma} {hues.get(name, 0)})"
        stops.append(f"{colour} {100 * start:.3g}% {100 * reached:.3g}%")
    return f"linear-gradient(to top,{','.join(stops)})" if stops else "none"


def _kind(name: str) -> str:
    return "base" if name == BASE else "state"


def _json_in_html(value: object) -> str:
    """Write JSON that no HTML parser mistakes for a tag."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
