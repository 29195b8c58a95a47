"""The mixtures of `mrss tune`: the one that a state is tuned inside, the one that it imitates."""

from __future__ import annotations

from collections.abc import Sequence

from mrss_provider.cli.states import read_config
from mrss_provider.cli.terms import read_terms
from mrss_provider.config import EngineConfig
from mrss_provider.engine.gates import gate_of, make_gate
from mrss_provider.engine.merges import make_merge
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture import BASE, GATES, check_signs, parse_method
from mrss_provider.model import TunedState
from mrss_provider.tune.network import Weights
from mrss_provider.tune.token_loss import Beside, FrozenRows, Imitation

_MERGES = ("linear", "geometric", "product", "power", "delta")
"""Rules that have a gradient everywhere, and no weight below 0."""


def beside_loss(
    engine: EngineConfig, beside: Sequence[str], merge: str, gate: str, weights: Weights
) -> Beside:
    """Return the loss of a new state, of weight 1, in a mixture with `beside`.

    Args:
        engine: where the states are.
        beside: a state each, maybe with its weight: `knowledge`, `knowledge:0.7`.
        merge: rule by name.
        gate: by name.
        weights: of the model.

    Raises:
        MRSSError: an unknown state, or a rule or gate that no state is tuned under.
    """
    rule_name = parse_method(merge, "merge", "merge")
    if rule_name.name not in _MERGES:
        raise InvalidRequestError(
            f"a state is tuned beside others under {', '.join(_MERGES)}, got {merge!r}",
            param="merge",
        )
    gate_name = parse_method(gate, "gate", "gate")
    if "file" in {parameter.kind for parameter in GATES[gate_name.name]}:
        raise InvalidRequestError(
            f"a state is tuned under gates that need no training, got {gate!r}", param="gate"
        )
    rule, weigh = make_merge(rule_name), make_gate(gate_name)
    terms = read_terms(beside, "--beside", "beside")
    check_signs(terms, rule_name, "beside")
    library = StateLibrary(engine.states, read_config(engine.model), strict=engine.strict)
    has_base = rule.anchored or weigh.needs_base or any(term.name == BASE for term in terms)
    others = [term for term in terms if term.name != BASE]
    states: list[TunedState | None] = [library.get(term.name) for term in others]
    named = [term.weight for term in terms if term.name == BASE]
    ratios = [*(term.weight for term in others), 1.0]
    if has_base:
        states.insert(0, None)
        ratios.insert(0, named[0] if named else 0.0)
    largest = max(ratios)
    scaled = rule.scale([ratio / largest for ratio in ratios], base_named=bool(named))
    return Beside(FrozenRows(weights, states), rule, weigh, scaled)


def imitation_of(engine: EngineConfig, name: str, weights: Weights) -> Imitation:
    """Return the loss of a state that imitates the mixture `name`.

    Raises:
        MRSSError: no such mixture, or one whose rows depend on more than the tokens: its gate
            on what the user wrote, or its states on where turns begin.
    """
    library = StateLibrary(engine.states, read_config(engine.model), strict=engine.strict)
    mixture = library.resolve(name)
    if mixture.reinject != "never":
        raise InvalidRequestError(
            f"a state imitates mixtures without reinject, got {name!r}, which has reinject "
            f"{mixture.reinject!r}; name its terms instead",
            param="distill",
        )
    return Imitation(weights, mixture, make_merge(mixture.merge), gate_of(mixture))
