"""Gate: what every gate is. Two halves, each of which may do nothing.

The *prior* runs on the host and looks at the past: what the user wrote, how far the answer is. The
*weights* look at the rows of this token, on the device. Neither sees what will be sampled, and
both treat all states alike: permuting the states permutes what they say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider.engine.merges import Rows

if TYPE_CHECKING:
    from mrss_provider.engine.request import ResolvedMixture


def _nothing() -> NDArray[np.float32]:
    return np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Heard:
    """What a prior may know of one answer at one moment.

    Attributes:
        position: tokens of the answer so far.
        turn: user turns in the prompt, from 1.
        log_probs: [T, K] float32, of the user's last tokens under each row, for gates that read
            the prompt; those of the answer follow for gates that read it too. T may be 0.
    """

    position: int = 0
    turn: int = 1
    log_probs: NDArray[np.float32] = field(default_factory=_nothing)


class Gate:
    """How the rows weigh. Parameters are arguments of the class, by name.

    Attributes:
        name: what a mixture's name says after `~`.
        needs_base: row 0 must be the base.
        reads_prompt: `prior` wants the user's text scored by every row.
        reads_answer: `prior` wants each sampled token scored by every row, too.
        moves_prior: what `prior` returns changes during an answer.
    """

    name: ClassVar[str]
    needs_base: bool = False
    reads_prompt: bool = False
    reads_answer: bool = False
    moves_prior: bool = False

    def check(self, mixture: ResolvedMixture) -> None:
        """Refuse a mixture that this gate has no meaning for.

        Raises:
            InvalidRequestError: says what is expected.
        """

    def candidates(self, mixture: ResolvedMixture) -> frozenset[str]:
        """Return the names of the rows that `prior` compares by what was read."""
        return frozenset()

    def prior(self, mixture: ResolvedMixture, heard: Heard) -> tuple[float, ...]:
        """Return ratios of all rows, instead of `mixture.ratios`."""
        return mixture.ratios

    def weights(self, rows: Rows, *, sums_to_one: bool) -> Tensor:
        """Return weights [G, K] for the next token.

        Args:
            rows: of this token; `rows.named` are the weights to multiply. The prior is in them.
            sums_to_one: whether the merge rule wants shares; otherwise the weights are strengths,
                and the row that has most to say keeps what the name says.
        """
        return rows.named
