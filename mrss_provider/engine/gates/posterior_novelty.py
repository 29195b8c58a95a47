"""`posterior-novelty`: a posterior chooses within each group of states, novelty across groups.

Two states of knowledge are each confidently wrong outside their facts: how much a state differs
from the base does not tell which of them is right, what the user asked does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from mrss_provider.engine.gates.gate import Heard
from mrss_provider.engine.gates.novelty import Novelty, of_largest
from mrss_provider.engine.gates.posterior import choose

if TYPE_CHECKING:
    from mrss_provider.engine.request import ResolvedMixture


class PosteriorNovelty(Novelty):
    """`novelty` on the ratios that the groups' posteriors leave.

    A state without a group is a group of its own, and so is the base. Strengths are
    `w_k (w_k d_k) / max_j (w_j d_j)`: a state that the posterior turned down must not silence the
    others by how far it is from the base.
    """

    name = "posterior-novelty"
    reads_prompt = True

    def __init__(self, share: float, tau: float) -> None:
        super().__init__(tau)
        self._share = share

    def candidates(self, mixture: ResolvedMixture) -> frozenset[str]:
        """Return the rows that share a group with another one."""
        groups = [
            group if ratio > 0 else ""
            for group, ratio in zip(mixture.groups, mixture.ratios, strict=True)
        ]
        rows = zip(mixture.names, groups, strict=True)
        return frozenset(name for name, group in rows if group and groups.count(group) > 1)

    def prior(self, mixture: ResolvedMixture, heard: Heard) -> tuple[float, ...]:
        """Return each group's largest ratio times each row's share of belief in the group."""
        ratios = np.array(mixture.ratios, dtype=np.float64)
        named = ratios > 0
        groups = np.array(mixture.groups)
        for group in sorted(set(mixture.groups) - {""}):
            ratios = choose(ratios, named & (groups == group), heard.log_probs, self._share)
        return tuple(ratios.tolist())

    def _voice(self, divergence: Tensor, named: Tensor) -> Tensor:
        return of_largest(named.abs() * divergence)
