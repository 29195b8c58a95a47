"""Gates: what each row weighs for the next token. A file each, a line here each."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from mrss_provider.engine.gates.confidence import Confidence
from mrss_provider.engine.gates.fixed import Fixed
from mrss_provider.engine.gates.gate import Gate, Heard
from mrss_provider.engine.gates.learned import Learned
from mrss_provider.engine.gates.novelty import Novelty
from mrss_provider.engine.gates.posterior import Posterior
from mrss_provider.engine.gates.posterior_novelty import PosteriorNovelty
from mrss_provider.engine.gates.schedule import Schedule
from mrss_provider.engine.merges import make_merge
from mrss_provider.mixture import Method

if TYPE_CHECKING:
    from mrss_provider.engine.request import ResolvedMixture

__all__ = ["GATES", "Gate", "Heard", "Learned", "gate_of", "make_gate", "named_weights"]

GATES: dict[str, Callable[..., Gate]] = {
    "fixed": Fixed,
    "schedule": Schedule,
    "novelty": Novelty,
    "confidence": Confidence,
    "posterior": Posterior,
    "posterior-novelty": PosteriorNovelty,
}
"""The class of every gate that needs no training, by name: the one place for registering one.

A `Learned` one comes from a file, which `StateLibrary` loads.
"""


@lru_cache(maxsize=256)
def make_gate(method: Method) -> Gate:
    """Return the gate that `method` names, with its parameters.

    Raises:
        KeyError: a gate that is read from a file.
    """
    return GATES[method.name](**method.parameters)


def gate_of(mixture: ResolvedMixture) -> Gate:
    """Return the gate of a mixture: the trained one that it carries, or the one that it names."""
    return mixture.trained_gate or make_gate(mixture.gate)


def named_weights(mixture: ResolvedMixture, heard: Heard) -> tuple[float, ...]:
    """Return the weights [K] that `Rows.named` begins with, with the gate's prior in them.

    Without a prior they are `mixture.weights`.
    """
    ratios = gate_of(mixture).prior(mixture, heard)
    return make_merge(mixture.merge).scale(ratios, base_named=mixture.base_named)
