"""StateLibrary: names -> tuned states and named mixtures, and the resolution of what is typed.

A folder holds state files (the file's stem is the state's name) and `mixtures.toml`; both share
one namespace. A bad file never hides: it is in `problems`, and naming it raises what is wrong.
Lookups read one immutable snapshot, so they may come from any thread.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mrss_provider.backend import MixtureOptions, ModelCard
from mrss_provider.engine.gates import GATES
from mrss_provider.engine.merge import MERGE_RULES
from mrss_provider.engine.mixtures_file import MIXTURES_FILE, NamedMixture, check_cut
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.state_folder import STATE_SUFFIXES, Entries, Problem, load_folder
from mrss_provider.errors import InvalidRequestError, UnknownNameError
from mrss_provider.mixture import (
    BASE,
    DEFAULT_CUT,
    DEFAULT_GATE,
    DEFAULT_MERGE,
    Mixture,
    Term,
    canonical_weights,
    check_terms,
    check_weight,
    parse_mixture,
)

if TYPE_CHECKING:
    from mrss_provider.model import ModelConfig, TunedState

log = logging.getLogger(__name__)

__all__ = ["STATE_SUFFIXES", "Problem", "StateLibrary"]

_MAX_NAMES_IN_MESSAGE = 20


class StateLibrary:
    """The tuned states and named mixtures of one loaded model.

    Args:
        folder: holds state files and `mixtures.toml`; an empty one leaves `base`.
        model_config: of the loaded model.
        model_name: what `@model` may say; None takes the configuration's.
        max_states: terms that one mixture may have.
        context_len: for the cards.
        strict: refuse states that were tuned on other weights of the same shape.

    Raises:
        ConfigError: the folder does not exist.
    """

    def __init__(
        self,
        folder: Path,
        model_config: ModelConfig,
        *,
        model_name: str | None = None,
        max_states: int = 16,
        context_len: int = 0,
        strict: bool = False,
    ) -> None:
        self._model_config = model_config
        self._model_name = model_name or model_config.name
        self._max_states = max_states
        self._context_len = context_len
        self._entries = load_folder(folder, model_config, strict=strict)
        for problem in self._entries.problems:
            log.warning("%s: %s", problem.path.name, problem.error)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What could not be loaded, and why."""
        return self._entries.problems

    @property
    def states(self) -> Mapping[str, TunedState]:
        """The loaded states by name."""
        return self._entries.states

    @property
    def mixtures(self) -> Mapping[str, NamedMixture]:
        """The named mixtures by name."""
        return self._entries.mixtures

    def get(self, name: str) -> TunedState:
        """Return a loaded state.

        Raises:
            UnknownNameError: nothing has that name, or a mixture has.
            MRSSError: the file of that name is bad; what is wrong with it.
        """
        entries = self._entries
        _raise_problem(entries, name)
        if name not in entries.states:
            raise _unknown(entries, name, text=name, position=0)
        return entries.states[name]

    def cards(self) -> list[ModelCard]:
        """Return what `/v1/models` lists: `base`, then states, then mixtures, by name."""
        entries = self._entries
        cards = [ModelCard(BASE, "base", f"{self._model_name} without a tuned state")]
        for name in sorted(entries.states):
            metadata = entries.states[name].metadata
            about = metadata.display_name or (f"a {metadata.group} state" if metadata.group else "")
            cards.append(ModelCard(name, "state", about))
        for name in sorted(entries.mixtures):
            named = entries.mixtures[name]
            cards.append(ModelCard(name, "mixture", named.description))
        return [
            replace(card, created=entries.created.get(card.id, 0), context_len=self._context_len)
            for card in cards
        ]

    def resolve(self, text: str, options: MixtureOptions | None = None) -> ResolvedMixture:
        """Make a typed name and a request's options concrete.

        Raises:
            UnknownNameError: a state, mixture or model that is not loaded, with its position in
                `text` and the nearest names.
            InvalidRequestError: a malformed name or option.
            MRSSError: a name whose file is bad.
        """
        entries = self._entries
        options = options or MixtureOptions()
        typed = parse_mixture(text)
        self._check_model(typed, text)
        named = _named_mixture(entries, typed)
        terms = named.terms if named else typed.terms
        self._check_terms(entries, terms, text)
        terms = _weighted(terms, options)
        merge = _chosen("merge", typed.merge, options.merge, MERGE_RULES)
        gate = _chosen("gate", typed.gate, options.gate, GATES)
        merge = merge or (named and named.merge) or DEFAULT_MERGE
        gate = gate or (named and named.gate) or DEFAULT_GATE
        cut = _cut(merge, len(terms), options.cut, named)
        resolved = self._rows(entries, Mixture(terms, None, merge, gate), cut)
        if named is None:
            return resolved
        return replace(
            resolved,
            temperature=named.temperature,
            top_p=named.top_p,
            sampling_order=named.sampling_order,
        )

    def _check_model(self, typed: Mixture, text: str) -> None:
        if typed.model is not None and typed.model != self._model_name:
            raise UnknownNameError(
                f"unknown model {typed.model!r} in {text!r}: this engine has loaded "
                f"{self._model_name!r} (leave out '@{typed.model}')",
                position=text.rindex("@") + 1,
                suggestions=(self._model_name,),
            )

    def _check_terms(self, entries: Entries, terms: Sequence[Term], text: str) -> None:
        for term in terms:
            _raise_problem(entries, term.name)
            if term.name in entries.mixtures:
                inner = "+".join(t.name for t in entries.mixtures[term.name].terms)
                raise InvalidRequestError(
                    f"{term.name!r} at position {term.position} of {text!r} is a named mixture "
                    f"and cannot be a term or have a weight; write its terms ({inner}) instead",
                    param="model",
                )
            if term.name != BASE and term.name not in entries.states:
                raise _unknown(entries, term.name, text=text, position=term.position)
        num_states = len({term.name for term in terms})
        if num_states > self._max_states:
            raise InvalidRequestError(
                f"a mixture has at most {self._max_states} states (max_states), got {num_states}",
                param="model",
            )

    def _rows(self, entries: Entries, mixture: Mixture, cut: float) -> ResolvedMixture:
        """Lay out the rows: the base first if it is named or needed, then the states by name."""
        ratios = canonical_weights(mixture.terms)
        names = sorted(name for name in ratios if name != BASE)
        states: tuple[TunedState | None, ...] = tuple(entries.states[name] for name in names)
        merge, gate = mixture.merge or DEFAULT_MERGE, mixture.gate or DEFAULT_GATE
        has_base = BASE in ratios
        weights: tuple[float, ...] = (1.0,)
        if len(ratios) == 1:
            # One row comes back as it is under every rule and gate.
            merge, gate, cut = "linear", "fixed", 0.0
            states = (None,) if has_base else states
        else:
            rule = MERGE_RULES[merge]
            weights, base_weight = rule.scale([ratios[n] for n in names], ratios.get(BASE, 0.0))
            has_base = has_base or rule.anchored or GATES[gate].needs_base
            if has_base:
                states, weights = (None, *states), (base_weight, *weights)
        return ResolvedMixture(
            canonical=mixture.canonical(),
            states=states,
            weights=weights,
            merge=merge,
            gate=gate,
            cut=cut,
            base_row=0 if has_base else None,
            fingerprint=self._fingerprint(states, weights, merge, gate, cut),
        )

    def _fingerprint(self, states: Sequence[TunedState | None], *rest: object) -> str:
        hashes = [(state.sha256, state.metadata.bos) if state else BASE for state in states]
        text = repr((self._model_config.fingerprint, hashes, rest))
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _named_mixture(entries: Entries, typed: Mixture) -> NamedMixture | None:
    """Return the mixture that the whole name means, if it is one."""
    if len(typed.terms) != 1 or typed.terms[0].weight != 1.0:
        return None
    return entries.mixtures.get(typed.terms[0].name)


def _weighted(terms: tuple[Term, ...], options: MixtureOptions) -> tuple[Term, ...]:
    """Return `terms` with the weights that the request's options give."""
    if options.gating_weights is None:
        return Mixture(terms).with_weights(options.weights).terms if options.weights else terms
    if options.weights:
        raise InvalidRequestError(
            "give mrss.weights or mrss_gatingweight, not both", param="mrss_gatingweight"
        )
    if len(options.gating_weights) != len(terms):
        raise InvalidRequestError(
            f"mrss_gatingweight must have one weight for each of {len(terms)} terms "
            f"({'+'.join(term.name for term in terms)}), got {len(options.gating_weights)}",
            param="mrss_gatingweight",
        )
    weighted = tuple(
        replace(term, weight=check_weight(weight, "mrss_gatingweight"))
        for term, weight in zip(terms, options.gating_weights, strict=True)
    )
    check_terms(weighted, "mrss_gatingweight")
    return weighted


def _chosen(
    what: str, typed: str | None, option: str | None, known: Mapping[str, object]
) -> str | None:
    """Return the merge rule or gate that the name or the options say."""
    if option is not None and option not in known:
        raise InvalidRequestError(
            f"mrss.{what} must be one of {', '.join(known)}, got {option!r:.40}",
            param=f"mrss.{what}",
        )
    if typed is not None and option is not None and typed != option:
        raise InvalidRequestError(
            f"the name says '~{typed}' and mrss.{what} says {option!r}; say one of them",
            param=f"mrss.{what}",
        )
    return typed or option


def _cut(merge: str, num_terms: int, option: object, named: NamedMixture | None) -> float:
    rule = MERGE_RULES[merge]
    if option is not None:
        cut = check_cut(option, "mrss.cut")
        if cut > 0 and num_terms > 1 and not rule.has_cut:
            raise InvalidRequestError(
                f"the merge rule {merge!r} has no cut; leave out mrss.cut", param="mrss.cut"
            )
        return cut
    if not rule.has_cut:
        return 0.0
    return DEFAULT_CUT if named is None or named.cut is None else named.cut


def _raise_problem(entries: Entries, name: str) -> None:
    for problem in entries.problems:
        # A bad file called `base.pth` does not take the untuned model away.
        if problem.name == name != BASE:
            raise type(problem.error)(f"{name!r} cannot be used: {problem.error.message}")


def _unknown(entries: Entries, name: str, *, text: str, position: int) -> UnknownNameError:
    """Build the error for a name that nothing loaded has."""
    names = entries.names
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "known are"
    if not near:
        shown = names[:_MAX_NAMES_IN_MESSAGE]
        more = len(names) - len(shown)
        hint += f" {', '.join(shown)}" + (f" and {more} more" if more else "")
    unreadable = [p.error.message for p in entries.problems if p.name == MIXTURES_FILE]
    aside = f" ({unreadable[0]})" if unreadable else ""
    return UnknownNameError(
        f"unknown state or mixture {name!r} at position {position} of {text!r}: {hint}{aside}",
        position=position,
        suggestions=near,
    )
