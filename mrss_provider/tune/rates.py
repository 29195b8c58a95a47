"""The learning rate of a state, found by trying: several at once, as rows of one batch.

Public failures to store facts came from rates a thousand times too low, and no rate is right for
every model and data set, so a short run of each is worth its cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mrss_provider.tune.config import TuneConfig
from mrss_provider.tune.learner import Learner
from mrss_provider.tune.network import Weights
from mrss_provider.tune.token_loss import TokenLoss
from mrss_provider.tune.training import BatchOf, Examples

RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""What a sweep tries unless told otherwise."""


@dataclass(frozen=True)
class RateTrial:
    """One learning rate of a sweep.

    Attributes:
        rate: peak learning rate.
        loss: on the held-out text after the sweep's steps, nats a token; infinite if it blew up.
    """

    rate: float
    loss: float

    def to_json(self) -> dict[str, Any]:
        """Return it for metadata; JSON has no number for a loss that blew up, which is null."""
        loss = round(self.loss, 5) if math.isfinite(self.loss) else None
        return {"rate": self.rate, "loss": loss}


def sweep(
    weights: Weights,
    config: TuneConfig,
    batch_of: BatchOf,
    held_out: Examples,
    *,
    token_loss: TokenLoss,
    rates: Sequence[float] = RATES,
    allow_idle: bool = True,
    initial: Tensor | None = None,
    initial_offset: Tensor | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[RateTrial]:
    """Try every rate on the same batches and return their held-out losses, in the rates' order.

    Args:
        weights: of the model.
        config: of each trial, but for its rate; `steps` are the sweep's.
        batch_of: what each step learns from.
        held_out: what the rates are judged by.
        token_loss: what a token costs.
        rates: to try.
        allow_idle: as `Learner`.
        initial: where every trial starts, [L, H, N, N]; None is the base.
        initial_offset: where its offsets start, [L, C]; None is zeros.
        on_step: told of the step, from 1, and of all.
    """
    configs = [replace(config, learning_rate=rate) for rate in rates]
    learner = Learner(
        weights,
        configs,
        [initial] * len(rates),
        token_loss=token_loss,
        allow_idle=allow_idle,
        initial_offsets=[initial_offset] * len(rates),
    )
    for step in range(config.steps):
        examples = batch_of(step)
        learner.step(step, [examples] * len(rates))
        if on_step is not None:
            on_step(step + 1, config.steps)
    with torch.no_grad():
        losses = learner.evaluate(held_out)
    return [
        RateTrial(rate, loss if math.isfinite(loss) else math.inf)
        for rate, loss in zip(rates, losses, strict=True)
    ]


def best_rate(trials: Sequence[RateTrial]) -> float:
    """Return the rate with the least held-out loss."""
    return min(trials, key=lambda trial: trial.loss).rate
