"""StateLibrary: names -> tuned states and named mixtures, and the resolution of what is typed.

A folder holds state files (the file's stem is the state's name) and `mixtures.toml`; both share
one namespace. A bad file never hides: it is in `problems`, and naming it raises what is wrong.
Lookups read one immutable snapshot, so they may come from any thread; `change` replaces it by
another, and who has resolved a name keeps the states that it meant.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mrss_provider.backend import MixtureOptions, ModelCard, Reinject
from mrss_provider.engine.gates import Gate, Learned, make_gate
from mrss_provider.engine.merges import make_merge
from mrss_provider.engine.mixtures_file import MIXTURES_FILE, NamedMixture
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.state_folder import (
    STATE_SUFFIXES,
    Entries,
    Problem,
    SamplingDefaults,
    load_folder,
    problem_of_gate,
)
from mrss_provider.engine.typed_options import (
    chosen_cut,
    chosen_method,
    chosen_template,
    named_mixture,
    of_heard,
    sampling_of,
    weighted,
)
from mrss_provider.errors import InvalidRequestError, UnknownNameError
from mrss_provider.mixture import (
    BASE,
    DEFAULT_GATE,
    DEFAULT_MERGE,
    Method,
    Mixture,
    Term,
    canonical_weights,
    check_signs,
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
        self._changing = threading.Lock()
        loaded = load_folder(folder, model_config, strict=strict)
        self._entries = replace(loaded, view=self._model_name)
        self._deaf: set[str] = set()
        for problem in self._entries.problems:
            log.warning("%s: %s", problem.path.name, problem.error)

    @property
    def entries(self) -> Entries:
        """The present view, which never changes."""
        return self._entries

    @property
    def model_config(self) -> ModelConfig:
        """Of the loaded model."""
        return self._model_config

    @property
    def max_states(self) -> int:
        """Terms that one mixture may have."""
        return self._max_states

    @property
    def model_name(self) -> str:
        """What `@model` may say."""
        return self._model_name

    def change(
        self, edit: Callable[[Entries], Entries], commit: Callable[[], None] | None = None
    ) -> None:
        """Replace the view by `edit` of it; one change at a time, from any thread.

        Args:
            edit: returns the new view, or raises.
            commit: makes the change last (writes a file), or raises; the view is replaced after it.
        """
        with self._changing:
            entries = edit(self._entries)
            if commit is not None:
                commit()
            self._entries = entries

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

    @property
    def gates(self) -> Mapping[str, Learned]:
        """The trained gates by name."""
        return self._entries.gates

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
        return self.resolve_in(self._entries, text, options)

    def resolve_in(
        self, entries: Entries, text: str, options: MixtureOptions | None = None
    ) -> ResolvedMixture:
        """Do as `resolve` does in another view, such as one that is not shown yet.

        Raises:
            MRSSError: as `resolve`.
        """
        options = options or MixtureOptions()
        text = entries.aliases.get(text, text)
        typed = parse_mixture(text)
        self._check_model(typed, text)
        named = named_mixture(entries, typed)
        terms = named.terms if named else typed.terms
        self._check_terms(entries, terms, text)
        terms = weighted(terms, options)
        merge = chosen_method("merge", typed.merge, options.merge)
        gate = chosen_method("gate", typed.gate, options.gate)
        merge = merge or (named and named.merge) or DEFAULT_MERGE
        gate = of_heard(gate or (named and named.gate) or DEFAULT_GATE, terms)
        where = "mrss.weights" if options.gating_weights is None else "mrss_gatingweight"
        check_signs(terms, merge, "model" if terms == typed.terms else where)
        cut = chosen_cut(merge, len(terms), options.cut, named)
        reinject = options.reinject or (named and named.reinject) or "never"
        mixture = Mixture(terms, None, merge, gate)
        defaults = named or sampling_of(entries, typed)

        def with_rows(reinject: Reinject) -> ResolvedMixture:
            rows = self._rows(entries, mixture, cut, reinject)
            resolved = replace(rows, template=chosen_template(rows, named))
            return _with_sampling(resolved, defaults) if defaults else resolved

        resolved = with_rows(reinject)
        if options.reinject is None and resolved.reinject != "never":
            resolved = replace(resolved, without_reinject=with_rows("never"))
        return resolved

    def _check_model(self, typed: Mixture, text: str) -> None:
        if typed.model is not None and typed.model != self._model_name:
            raise UnknownNameError(
                f"unknown model {typed.model!r} in {text!r}: this engine has loaded "
                f"{self._model_name!r} (leave out '@{typed.model}')",
                position=text.index("@") + 1,
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

    def _rows(
        self, entries: Entries, mixture: Mixture, cut: float, reinject: Reinject
    ) -> ResolvedMixture:
        """Lay out the rows: the base first if it is named or needed, then the states by name."""
        ratios = canonical_weights(mixture.terms)
        names = sorted(ratios, key=lambda name: (name != BASE, name))
        merge, method = mixture.merge or DEFAULT_MERGE, mixture.gate or DEFAULT_GATE
        if len(ratios) == 1:
            # One row comes back as it is under every rule and gate.
            merge, method, cut = Method("linear"), Method("fixed"), 0.0
        rule, gate = make_merge(merge), _gate(entries, method)
        trained = gate if isinstance(gate, Learned) else None
        base_named = BASE in ratios
        if names == [BASE]:
            # There is nothing to give it anew.
            reinject = "never"
        if not base_named and (rule.anchored or gate.needs_base or reinject != "never"):
            names.insert(0, BASE)
        states = tuple(None if name == BASE else entries.states[name] for name in names)
        in_order = tuple(ratios.get(name, 0.0) for name in names)
        weights = rule.scale(in_order, base_named=base_named)
        groups = tuple(state.metadata.group or "" if state else "" for state in states)
        heard = (groups,) if gate.reads_prompt else ()
        file = (trained.sha256,) if trained else ()
        # A schedule says by name which state it means.
        scheduled = (tuple(names),) if "points" in method.parameters else ()
        given_anew = (reinject,) if reinject != "never" else ()
        resolved = ResolvedMixture(
            canonical=mixture.canonical(),
            states=states,
            names=tuple(names),
            groups=groups,
            ratios=in_order,
            weights=weights,
            merge=merge,
            gate=method,
            cut=cut,
            base_row=0 if BASE in names else None,
            fingerprint=self._fingerprint(
                states,
                weights,
                *(merge.text, method.text, cut),
                *(*heard, *file, *scheduled, *given_anew),
            ),
            reinject=reinject,
            trained_gate=trained,
        )
        gate.check(resolved)
        compared = gate.candidates(resolved)
        self._warn_of_deaf([state for state in states if state and state.name in compared])
        return resolved

    def _fingerprint(self, states: Sequence[TunedState | None], *rest: object) -> str:
        hashes = [(state.sha256, state.metadata.bos) if state else BASE for state in states]
        weights = self._model_config.fingerprint
        if self._model_config.quantize != "none":
            weights += "+" + self._model_config.quantize
        text = repr((weights, hashes, rest))
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:16]

    def _warn_of_deaf(self, states: Sequence[TunedState]) -> None:
        """Tell once of each state whose tuning taught it nothing of what users write."""
        for state in states:
            if state.metadata.loss_on == "answer" and state.name not in self._deaf:
                self._deaf.add(state.name)
                log.warning(
                    "the state %r was tuned with a loss on answers only: a posterior learns "
                    "next to nothing from it",
                    state.name,
                )


def _with_sampling(
    mixture: ResolvedMixture, defaults: NamedMixture | SamplingDefaults
) -> ResolvedMixture:
    return replace(
        mixture,
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        sampling_order=defaults.sampling_order,
    )


def _gate(entries: Entries, method: Method) -> Gate:
    """Return the gate that `method` names: one with its parameters, or one of the folder."""
    if "file" not in method.parameters:
        return make_gate(method)
    name = method.get("file")
    for problem in entries.problems:
        if problem.name == problem_of_gate(str(name)):
            raise type(problem.error)(f"{method.text!r} cannot be used: {problem.error.message}")
    trained = entries.gates.get(str(name))
    if trained is None:
        known = ", ".join(sorted(entries.gates)) or "none"
        raise InvalidRequestError(
            f"mrss.gate: there is no trained gate {name!r}; known are {known}", param="mrss.gate"
        )
    return trained


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
