"""The name of a mixture: `<terms>[@model][~merge][~gate]`, parsed and in canonical form.

A leaf: standard library only, so that clients can check a name without an engine. Which states
exist is not known here: `engine.state_library` resolves a parsed name against what is loaded.

    >>> parse_mixture("tone:3+knowledge:7").canonical()
    'knowledge+tone:0.4286'
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from mrss_provider.errors import InvalidRequestError

BASE = "base"
"""The untuned model: the checkpoint's own initial state."""

MERGES = ("linear", "geometric", "delta")
"""Merge rules by name; `engine.merge` has one implementation for each (a test compares them)."""

GATES = ("fixed", "novelty")
"""Gates by name; `engine.gates` has one implementation for each (a test compares them)."""

DEFAULT_MERGE = "delta"
DEFAULT_GATE = "novelty"
DEFAULT_CUT = 0.1

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_WEIGHT_PATTERN = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")

# LiteLLM's dispatch looks at these substrings before it asks a custom provider, so a state with
# such a name would send the prompt to another company's API.
HIJACKED_SUBSTRINGS = (
    "replicate",
    "clarifai",
    "ft:gpt-3.5-turbo",
    "ft:babbage-002",
    "ft:davinci-002",
)


@dataclass(frozen=True)
class Term:
    """One state of a mixture and its weight, a ratio (only relations between weights count).

    `position` is where the name begins in the text it was parsed from.
    """

    name: str
    weight: float = 1.0
    position: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Mixture:
    """A parsed name. `terms` are as typed; `canonical` sorts and rescales them.

    `merge` and `gate` are None where the name leaves them to the default or the named mixture.
    """

    terms: tuple[Term, ...]
    model: str | None = None
    merge: str | None = None
    gate: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The terms' names, as typed."""
        return tuple(term.name for term in self.terms)

    def canonical(self) -> str:
        """Return the one spelling of this mixture: it parses back to itself and keys caches.

        Equal names are added up, terms sorted, weights divided by the largest and written with
        4 significant digits (1 is left out). What changes nothing is left out: a term of weight
        0, the default merge and gate, and both of them where a single state remains.
        """
        totals = canonical_weights(self.terms)
        terms = "+".join(
            name if text == "1" else f"{name}:{text}"
            for name, text in ((name, _weight_text(totals[name])) for name in sorted(totals))
        )
        model = f"@{self.model}" if self.model else ""
        if len(totals) == 1:
            return terms + model
        merge = f"~{self.merge}" if self.merge and self.merge != DEFAULT_MERGE else ""
        gate = f"~{self.gate}" if self.gate and self.gate != DEFAULT_GATE else ""
        return terms + model + merge + gate

    def with_weights(self, weights: Mapping[str, float]) -> Mixture:
        """Return this mixture with the named terms' weights replaced.

        A name that was typed twice becomes one term, so that the new weight is its whole weight.

        Raises:
            InvalidRequestError: a name that is not a term, or a bad weight.
        """
        for name in weights:
            if name not in self.names:
                raise InvalidRequestError(
                    f"mrss.weights names {name!r}, which is not a term of "
                    f"{'+'.join(self.names)!r}; name the terms only",
                    param="mrss.weights",
                )
        replaced = {name: check_weight(value, "mrss.weights") for name, value in weights.items()}
        first = {term.name: term for term in reversed(self.terms)}
        kept = [t for t in self.terms if t.name not in replaced or first[t.name] is t]
        terms = tuple(replace(t, weight=replaced.get(t.name, t.weight)) for t in kept)
        check_terms(terms, "mrss.weights")
        return replace(self, terms=terms)


def parse_mixture(text: str) -> Mixture:
    """Parse `<terms>[@model][~merge][~gate]`, e.g. `knowledge:0.7+tone:0.3~linear~fixed`.

    Raises:
        InvalidRequestError: with the position (from 0) of the fault in `text`.
    """
    return _Parser(text).parse()


def check_name(name: str, kind: str = "state") -> str:
    """Return `name` if a state or mixture may be called so.

    Raises:
        InvalidRequestError: a name outside the grammar, reserved, or one that LiteLLM would
            route elsewhere; the message says why.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidRequestError(
            f"a {kind} name is a letter or digit and then at most 63 letters, digits, '_', '.' "
            f"or '-', got {name!r}",
            param="name",
        )
    if name == BASE:
        raise InvalidRequestError(
            f"{BASE!r} is the untuned model, no {kind} may take that name", param="name"
        )
    for taken in HIJACKED_SUBSTRINGS:
        if taken in name.lower():
            raise InvalidRequestError(
                f"a {kind} name must not contain {taken!r}: LiteLLM would send such requests to "
                f"that provider instead of here, got {name!r}",
                param="name",
            )
    return name


def check_weight(value: object, where: str) -> float:
    """Return `value` as a finite weight >= 0.

    Raises:
        InvalidRequestError: not a number, negative, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(f"{where}: a weight is a number, got {value!r}", param=where)
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not math.isfinite(weight) or weight < 0:
        raise InvalidRequestError(
            f"{where}: a weight must be finite and >= 0, got {value!r:.40}", param=where
        )
    return weight


def check_terms(terms: Sequence[Term], where: str) -> None:
    """Refuse an empty mixture and one whose weights are all zero.

    Raises:
        InvalidRequestError: as said.
    """
    if not terms or not any(term.weight > 0 for term in terms):
        raise InvalidRequestError(f"{where}: at least one weight must be above 0", param=where)


def canonical_weights(terms: Sequence[Term]) -> dict[str, float]:
    """Return name -> weight: equal names added, zeros dropped, the largest weight made 1.

    At least one weight is above 0 (`check_terms`).
    """
    # Dividing before adding keeps the sum finite whatever was typed.
    peak = max(term.weight for term in terms)
    totals: dict[str, float] = {}
    for term in terms:
        totals[term.name] = totals.get(term.name, 0.0) + term.weight / peak
    largest = max(totals.values())
    ratios = {name: float(_weight_text(total / largest)) for name, total in totals.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio > 0}


def _weight_text(weight: float) -> str:
    return f"{weight:.4g}"


class _Parser:
    """A hand-written scanner: the grammar is tiny and the error must carry its position."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def parse(self) -> Mixture:
        terms = [self._term()]
        while self._take("+"):
            terms.append(self._term())
        model = self._name("a model name") if self._take("@") else None
        merge: str | None = None
        gate: str | None = None
        while self._take("~"):
            start = self.at
            word = self._name("a merge rule or gate")
            if word in MERGES and merge is None and gate is None:
                merge = word
            elif word in GATES and gate is None:
                gate = word
            else:
                self._fail(
                    start,
                    f"{word!r} is no merge rule or gate here; after '~' comes one of "
                    f"{', '.join(MERGES)}, then '~' and one of {', '.join(GATES)}",
                )
        if self.at < len(self.text):
            self._fail(self.at, f"unexpected {self.text[self.at]!r}; between states comes '+'")
        mixture = Mixture(tuple(terms), model, merge, gate)
        check_terms(mixture.terms, "model")
        return mixture

    def _term(self) -> Term:
        start = self.at
        name = self._name("a state name")
        return Term(name, self._weight() if self._take(":") else 1.0, start)

    def _name(self, what: str) -> str:
        match = NAME_PATTERN.match(self.text, self.at)
        if match is None:
            got = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
            self._fail(self.at, f"expected {what}, got {got}")
        self.at = match.end()
        return match.group()

    def _weight(self) -> float:
        match = _WEIGHT_PATTERN.match(self.text, self.at)
        if match is None:
            self._fail(self.at, "expected a weight such as 0.7 after ':'")
        weight = float(match.group())
        if math.isinf(weight):
            self._fail(self.at, f"the weight {match.group():.20} is too large")
        self.at = match.end()
        return weight

    def _take(self, char: str) -> bool:
        if not self.text.startswith(char, self.at):
            return False
        self.at += 1
        return True

    def _fail(self, position: int, why: str) -> NoReturn:
        raise InvalidRequestError(
            f"bad mixture name {self.text!r} at position {position}: {why}", param="model"
        )
