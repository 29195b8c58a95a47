"""StepRunner: who carries out the steps that the scheduler plans; and the plain one, `HostRunner`.

A step is launched, and its tokens are asked for later: a runner on a GPU has the next step under
way by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mrss_provider.engine.batch import Batch, Choice
from mrss_provider.engine.constraint import MaskWorkers
from mrss_provider.engine.model_runner import ModelRunner
from mrss_provider.engine.tail import Pick, Picked, pick_tokens

if TYPE_CHECKING:
    from mrss_provider.model import Model, StatePool


class PendingTokens(Protocol):
    """The tokens of a step that was launched."""

    def go_on(self) -> object:
        """Launch what is left of the step, if anything; all steps before are committed.

        Raises:
            Exception: what it met; `picked` raises it again.
        """
        ...

    def picked(self) -> list[Picked]:
        """Wait for the step; return one for each answer of `Batch.sampling`."""
        ...


class StepRunner(Protocol):
    """Runs batches on recurrent states by slot.

    Attributes:
        max_ahead: steps that may be launched before the tokens of an earlier one were asked for.
    """

    max_ahead: int

    @property
    def pool(self) -> StatePool:
        """The states of all rows; what is launched changes them."""
        ...

    def needs_tokens(self, batch: Batch) -> bool:
        """Tell whether all steps before must be committed before this batch is launched."""
        ...

    def launch(self, batch: Batch) -> PendingTokens:
        """Begin a step; the states of all its rows move on by what they read.

        The step before has gone on (`PendingTokens.go_on`).
        """
        ...

    def forget(self) -> None:
        """Know nothing of the answers any more: a step failed halfway, nothing is under way."""
        ...


@dataclass(frozen=True)
class ReadyTokens:
    """Tokens that are there already."""

    tokens: list[Picked]

    def go_on(self) -> None:
        """Do nothing: nothing is left."""

    def picked(self) -> list[Picked]:
        """Return them."""
        return self.tokens


class HostRunner:
    """Runs a step to its end: the model on its device, the tail in torch and numpy."""

    max_ahead = 0

    def __init__(self, model: Model, num_slots: int, banned_ids: Tensor) -> None:
        """Allocate the states of `num_slots` rows.

        Args:
            model: what computes.
            num_slots: rows that may be held at once.
            banned_ids: int64 [M], ids that no request may get.
        """
        self._rows = ModelRunner(model, num_slots, banned_ids)
        self._banned_ids = banned_ids
        self._masks = MaskWorkers()

    @property
    def pool(self) -> StatePool:
        """The states of all rows."""
        return self._rows.pool

    def needs_tokens(self, batch: Batch) -> bool:
        """Return False: nothing is ever under way."""
        return False

    @torch.inference_mode()
    def launch(self, batch: Batch) -> ReadyTokens:
        """Run a step."""
        return ReadyTokens(run_step(self._rows, batch, self._banned_ids, self._masks))

    def forget(self) -> None:
        """Do nothing: nothing is known."""


def run_step(
    runner: ModelRunner, batch: Batch, banned_ids: Tensor, masks: MaskWorkers
) -> list[Picked]:
    """Run a step whose answers' last tokens are all committed; return their next ones."""
    with masks.looking([choice.allowed for choice in batch.sampling]):
        logits, rows = runner.forward(batch)
    batch.look()
    picks = [_pick(choice, own) for choice, own in zip(batch.sampling, rows, strict=True)]
    return pick_tokens(logits, picks, banned_ids) if picks else []


def _pick(choice: Choice, rows: range | list[int]) -> Pick:
    request = choice.owner.request
    return Pick(
        rows=rows,
        mixture=choice.mixture,
        sampling=request.sampling,
        bias=choice.owner.bias,
        occurrences=choice.occurrences,
        choice=choice.index,
        position=choice.num_sampled,
        trace=request.trace,
        forced=request.forced[choice.num_sampled] if request.forced else None,
        probe=choice.is_probed,
        allowed=choice.allowed,
    )
