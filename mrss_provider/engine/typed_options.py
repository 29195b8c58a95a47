"""What a typed name and a request's options say together: terms, merge rule, gate and cut.

>>> chosen_method("merge", None, "linear").text
'linear'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mrss_provider.backend import MixtureOptions
from mrss_provider.engine.merges import make_merge
from mrss_provider.engine.mixtures_file import NamedMixture, check_cut
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.state_folder import Entries, SamplingDefaults
from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture import (
    DEFAULT_CUT,
    Kind,
    Method,
    Mixture,
    Term,
    canonical_weights,
    check_terms,
    check_weight,
    parse_method,
)


def named_mixture(entries: Entries, typed: Mixture) -> NamedMixture | None:
    """Return the mixture that the whole name means, if it is one."""
    return entries.mixtures.get(typed.terms[0].name) if _is_one_name(typed) else None


def sampling_of(entries: Entries, typed: Mixture) -> SamplingDefaults | None:
    """Return the defaults of the state that the whole name means, if it has any."""
    return entries.sampling.get(typed.terms[0].name) if _is_one_name(typed) else None


def _is_one_name(typed: Mixture) -> bool:
    return len(typed.terms) == 1 and typed.terms[0].weight == 1.0


def weighted(terms: tuple[Term, ...], options: MixtureOptions) -> tuple[Term, ...]:
    """Return `terms` with the weights that the request's options give.

    Raises:
        InvalidRequestError: weights that do not fit the terms, or two ways of giving them.
    """
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
    given = tuple(
        replace(term, weight=check_weight(weight, "mrss_gatingweight"))
        for term, weight in zip(terms, options.gating_weights, strict=True)
    )
    check_terms(given, "mrss_gatingweight")
    return given


def chosen_method(kind: Kind, typed: Method | None, option: str | None) -> Method | None:
    """Return the merge rule or gate that the name or the options say; None if neither does.

    Raises:
        InvalidRequestError: they say different ones, or one that there is not.
    """
    if option is None:
        return typed
    chosen = parse_method(option, kind, f"mrss.{kind}")
    if typed is not None and typed != chosen:
        raise InvalidRequestError(
            f"the name says '~{typed.text}' and mrss.{kind} says {chosen.text!r}; say one of them",
            param=f"mrss.{kind}",
        )
    return chosen


def of_heard(gate: Method, terms: Sequence[Term]) -> Method:
    """Return `gate` without what it says of terms that weigh nothing, as the rows are without them.

    That is a schedule's points; one that has none left is `fixed`.
    """
    points = gate.parameters.get("points")
    if not isinstance(points, tuple):
        return gate
    silent = {term.name for term in terms} - canonical_weights(terms).keys()
    kept = tuple((name, curve) for name, curve in points if name not in silent)
    if not kept:
        return Method("fixed")
    return replace(
        gate, values=tuple((key, kept if key == "points" else v) for key, v in gate.values)
    )


def chosen_template(mixture: ResolvedMixture, named: NamedMixture | None) -> str | None:
    """Return the chat template that a mixture asks for; None is the model's.

    Raises:
        InvalidRequestError: its states ask for different ones, and the mixture for none.
    """
    if named is not None and named.template is not None:
        return named.template
    asked = {
        state.metadata.template: state.name
        for state in mixture.states
        if state is not None and state.metadata.template is not None
    }
    if len(asked) > 1:
        told = ", ".join(f"{name!r} was tuned on {template!r}" for template, name in asked.items())
        raise InvalidRequestError(
            f"the states want different chat templates ({told}); make a named mixture of them "
            "that has one",
            param="model",
        )
    return next(iter(asked), None)


def chosen_cut(merge: Method, num_terms: int, option: object, named: NamedMixture | None) -> float:
    """Return the cut of a mixture of `num_terms`: the request's, the named mixture's, or ours.

    Raises:
        InvalidRequestError: no cut, or one for a rule that has none.
    """
    rule = make_merge(merge)
    if option is not None:
        cut = check_cut(option, "mrss.cut")
        if cut > 0 and num_terms > 1 and not rule.has_cut:
            raise InvalidRequestError(
                f"the merge rule {merge.text!r} has no cut; leave out mrss.cut", param="mrss.cut"
            )
        return cut
    if not rule.has_cut:
        return 0.0
    return DEFAULT_CUT if named is None or named.cut is None else named.cut
