"""What an answer begins from and leaves behind: states of its rows, to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mrss_provider.model.state import StateSnapshot


@dataclass(frozen=True, eq=False)
class StartPoint:
    """Rows that have read a beginning of a request already.

    With an `answer` they have read the whole prompt and all of it but its last token: what follows
    is what would have followed had nobody stopped.

    Attributes:
        rows: one a row of the mixture, on any device.
        num_read: tokens of the prompt that they have read; at least one is left, or an answer.
        answer: the tokens of the answer so far; `sampling.max_tokens` counts them.
        evidence: log-probabilities [T, K] that the rows gave to what a gate reads.
    """

    rows: tuple[StateSnapshot, ...]
    num_read: int
    answer: tuple[int, ...] = ()
    evidence: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class Captured:
    """The rows of an answer after the prompt and `num_read` tokens of it."""

    num_read: int
    rows: tuple[StateSnapshot, ...]


class Capture:
    """What is wanted of an answer beside its tokens: states of its rows, for a session.

    The engine's thread fills it, and `ended` is done when nothing more will come.

    Attributes:
        answer: the tokens of the answer, perhaps some more than were wanted.
        evidence: log-probabilities [T, K] that the rows gave to what a gate has read.
    """

    def __init__(self, most: int = 3) -> None:
        """Hold the newest `most` states, and the first."""
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()
        self.evidence: NDArray[np.float32] | None = None
        self.answer: tuple[int, ...] = ()
        self._most = most
        self._states: list[Captured] = []

    @property
    def states(self) -> tuple[Captured, ...]:
        """What came, oldest first."""
        return tuple(self._states)

    def add(self, captured: Captured) -> None:
        """Take in a state that is newer than those before."""
        self._states.append(captured)
        if len(self._states) > self._most + 1:
            del self._states[1]

    def end(self, answer: Sequence[int]) -> None:
        """Note that nothing more will come, and the answer."""
        self.answer = tuple(answer)
        if not self.ended.done():
            self.ended.set_result(None)
