"""The grammar of names: `<terms>[@model][~merge][~gate]`, parsed and in canonical form.

Which states exist is not known here: `engine.state_library` resolves a parsed name against what
is loaded.

    >>> parse_mixture("tone:3+knowledge:7").canonical()
    'knowledge+tone:0.4286'
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mrss_provider.backend import AGREED
from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture.methods import (
    DEFAULT_GATE,
    DEFAULT_MERGE,
    GATES,
    MERGES,
    Method,
    read_method,
)
from mrss_provider.mixture.scanner import NAME_PATTERN, Scanner

BASE = "base"
"""The untuned model: the checkpoint's own initial state."""

DEFAULT_CUT = 0.1

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
    merge: Method | None = None
    gate: Method | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The terms' names, as typed."""
        return tuple(term.name for term in self.terms)

    def canonical(self) -> str:
        """Return the one spelling of this mixture: it parses back to itself and keys caches.

        Equal names are added up, terms sorted, weights divided by the largest in absolute value
        and written with 4 significant digits (1 is left out). What changes nothing is left out: a
        term of weight 0, defaults of merge and gate, and both of them for a single state.
        """
        totals = canonical_weights(self.terms)
        terms = "+".join(
            name if text == "1" else f"{name}:{text}"
            for name, text in ((name, _weight_text(totals[name])) for name in sorted(totals))
        )
        model = f"@{self.model}" if self.model else ""
        if len(totals) == 1:
            return terms + model
        merge = f"~{self.merge.text}" if self.merge not in (None, DEFAULT_MERGE) else ""
        gate = f"~{self.gate.text}" if self.gate not in (None, DEFAULT_GATE) else ""
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

    Whether weights may be negative is known once the merge rule is (`check_signs`); a name that
    says the rule is checked here.

    Raises:
        InvalidRequestError: with the position (from 0) of the fault in `text`.
    """
    scanner = Scanner(text, what="mixture name", param="model")
    terms = [_read_term(scanner)]
    while scanner.take("+"):
        terms.append(_read_term(scanner))
    model = scanner.match(NAME_PATTERN, "a model name") if scanner.take("@") else None
    merge: Method | None = None
    gate: Method | None = None
    while scanner.take("~"):
        start = scanner.at
        word = scanner.match(NAME_PATTERN, "a merge rule or gate")
        scanner.at = start
        if word in MERGES and merge is None and gate is None:
            merge = read_method(scanner, "merge")
        elif word in GATES and gate is None:
            gate = read_method(scanner, "gate")
        else:
            scanner.fail(
                start,
                f"{word!r} is no merge rule or gate here; after '~' comes one of "
                f"{', '.join(MERGES)}, then '~' and one of {', '.join(GATES)}",
            )
    hint = "between states comes '+'"
    if text[scanner.at : scanner.at + 1].isspace():
        hint += " alone, and GET /models lists the names that have spaces"
    scanner.end(hint)
    check_terms(terms, "model")
    if merge is not None:
        check_signs(terms, merge, "model")
    return Mixture(tuple(terms), model, merge, gate)


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
    if name == AGREED:
        raise InvalidRequestError(
            f"{AGREED!r} is what traces call a token that all states agree on, no {kind} may take "
            "that name",
            param="name",
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
    """Return `value` as a finite weight; `check_signs` says whether it may be negative.

    Raises:
        InvalidRequestError: not a number, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(f"{where}: a weight is a number, got {value!r}", param=where)
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not math.isfinite(weight):
        raise InvalidRequestError(
            f"{where}: a weight must be finite, got {value!r:.40}", param=where
        )
    return weight


def check_terms(terms: Sequence[Term], where: str) -> None:
    """Refuse an empty mixture and one without a weight above zero.

    Raises:
        InvalidRequestError: as said.
    """
    if not any(total > 0 for total in _totals(terms).values()):
        raise InvalidRequestError(f"{where}: at least one weight must be above 0", param=where)


def check_signs(terms: Sequence[Term], merge: Method, where: str) -> None:
    """Refuse negative weights where the merge rule has no meaning for them.

    Raises:
        InvalidRequestError: as said.
    """
    for term in terms:
        if term.weight < 0 and merge.name != "contrast":
            raise InvalidRequestError(
                f"{where}: the weight {_weight_text(term.weight)} of {term.name!r} is below 0, "
                f"which only the merge rule 'contrast' understands, got {merge.text!r}",
                param=where,
            )
        if term.weight < 0 and term.name == BASE:
            raise InvalidRequestError(
                f"{where}: states are pushed away from, {BASE!r} is not; its weight must be "
                f">= 0, got {_weight_text(term.weight)}",
                param=where,
            )


def canonical_weights(terms: Sequence[Term]) -> dict[str, float]:
    """Return name -> weight: equal names added, zeros dropped, the largest made 1.

    The largest is that in absolute value. At least one weight is above 0 (`check_terms`).
    """
    totals = _totals(terms)
    largest = max(abs(total) for total in totals.values())
    ratios = {name: float(_weight_text(total / largest)) for name, total in totals.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio != 0}


def _totals(terms: Sequence[Term]) -> dict[str, float]:
    """Add up equal names, on a scale on which the largest weight is 1 or all are 0."""
    # Dividing before adding keeps the sum finite whatever was typed.
    peak = max((abs(term.weight) for term in terms), default=0.0) or 1.0
    totals: dict[str, float] = {}
    for term in terms:
        totals[term.name] = totals.get(term.name, 0.0) + term.weight / peak
    return totals


def _read_term(scanner: Scanner) -> Term:
    start = scanner.at
    name = scanner.match(NAME_PATTERN, "a state name")
    weight = scanner.number("a weight such as 0.7 after ':'") if scanner.take(":") else 1.0
    return Term(name, weight, start)


def _weight_text(weight: float) -> str:
    return f"{weight:.4g}"
