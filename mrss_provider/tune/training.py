"""Training: a state learnt from batches, watched on held-out text, left and gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mrss_provider.tune.examples import Example
from mrss_provider.tune.learner import Learner
from mrss_provider.tune.run_file import Record

BatchOf = Callable[[int], Sequence[Example]]
"""The examples of a step, from 0: the same for the same step."""

Examples = Sequence[Sequence[Example]]

OnStep = Callable[[Record], None]


@dataclass(frozen=True)
class Plan:
    """When to look, and when to end.

    Attributes:
        steps: batches, at most.
        eval_every: steps between two looks at the held-out text.
        patience: looks without a better loss before the run ends; 0 never ends it early.
    """

    steps: int
    eval_every: int
    patience: int


@dataclass
class Training:
    """A run: its learner, what it has done, and its best numbers so far.

    Attributes:
        learner: of one job.
        batch_of: what each step learns from.
        held_out: to be judged by; empty for none.
        plan: when to look and to end.
        record: what it has done.
        best: `Learner.snapshot` at the best look; empty without held-out text.
    """

    learner: Learner
    batch_of: BatchOf
    held_out: Examples
    plan: Plan
    record: Record
    best: Mapping[str, Tensor]

    @property
    def is_done(self) -> bool:
        """Whether no step is left, or the held-out loss has stopped falling."""
        record, plan = self.record, self.plan
        looks = [step for step, _ in record.held_out if step > record.best_step]
        return record.step >= plan.steps or 0 < plan.patience <= len(looks)

    def run(
        self,
        *,
        on_step: OnStep | None = None,
        stop: Callable[[], bool] | None = None,
        save: Callable[[], None] | None = None,
        save_every_s: float = 30.0,
    ) -> None:
        """Go on until it is done or `stop` says so; both are looked at between two steps.

        Args:
            on_step: told after every step.
            stop: whether to leave off.
            save: writes the run down; called at the start, now and then, and at the end.
            save_every_s: seconds between two calls of `save`.

        Raises:
            InvalidRequestError: the loss is no longer finite.
        """
        if not self.record.held_out:
            self._look()
        if save is not None:
            save()
        saved = time.monotonic()
        while not self.is_done:
            if stop is not None and stop():
                break
            self._step()
            if on_step is not None:
                on_step(self.record)
            if save is not None and time.monotonic() - saved >= save_every_s:
                save()
                saved = time.monotonic()
        if save is not None:
            save()

    def finish(self) -> None:
        """Take the numbers of the best look."""
        if self.best:
            self.learner.restore(self.best)

    def _step(self) -> None:
        began = time.perf_counter()
        record = self.record
        batch = self.batch_of(record.step)
        losses = self.learner.step(record.step, [batch])
        self.learner.require_finite(losses)
        record.losses += losses
        record.step += 1
        record.tokens += sum(len(example.token_ids) - 1 for example in batch)
        if record.step % self.plan.eval_every == 0 or record.step == self.plan.steps:
            self._look()
        record.seconds += time.perf_counter() - began

    def _look(self) -> None:
        if not self.held_out:
            return
        record = self.record
        (loss,) = self.learner.evaluate(self.held_out)
        least = min((one for _, one in record.held_out), default=float("inf"))
        record.held_out.append((record.step, loss))
        if loss < least:
            record.best_step = record.step
            self.best = self.learner.snapshot()
