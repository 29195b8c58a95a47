"""How states are tuned: settings, what is learnt from, and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mrss_provider.errors import InvalidRequestError
from mrss_provider.tune.examples import ExampleSource

LossOn = Literal["answer", "all"]


@dataclass(frozen=True)
class TuneConfig:
    """How to tune one state.

    Attributes:
        steps: batches.
        batch_size: examples a batch.
        learning_rate: peak, for Adam; states want 0.1 to 1.5, far more than weights do.
        warmup_steps: linear warm-up; then a cosine down to `final_rate` of the peak.
        final_rate: share of the peak at the end.
        grad_clip: largest norm of the state's gradient.
        loss_on: tokens that are learnt: the assistant's, or all.
        locality: 0 learns every one of those tokens; above 0 learns the facts among them, and
            keeps the others at the base model's distribution with this strength (KL).
        offsets: learn a `time_offset` beside the state.
        offset_rate: peak learning rate of the offsets; they are shares of 1, so a small one.
        max_len: examples are cut after so many tokens.
        seed: of the examples' draw.
    """

    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 1.0
    warmup_steps: int = 20
    final_rate: float = 0.02
    grad_clip: float = 1.0
    loss_on: LossOn = "answer"
    locality: float = 0.0
    offsets: bool = False
    offset_rate: float = 0.01
    max_len: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            InvalidRequestError: names the field.
        """
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidRequestError(
                    f"{name} must be above 0, got {getattr(self, name)!r}", param=name
                )
        for name in ("warmup_steps", "locality", "final_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidRequestError(
                    f"{name} must be 0 or more, got {getattr(self, name)!r}", param=name
                )
        if self.loss_on not in ("answer", "all"):
            raise InvalidRequestError(
                f"loss_on must be 'answer' or 'all', got {self.loss_on!r}", param="loss_on"
            )

    def rate_at(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0."""
        return self.learning_rate * self.share_at(step)

    def share_at(self, step: int) -> float:
        """Return the share of the peak rate that `step`, counted from 0, has."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        span = max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / span))
        return self.final_rate + (1 - self.final_rate) * cosine


_POSITIVE = ("steps", "batch_size", "learning_rate", "grad_clip", "offset_rate", "max_len")


@dataclass(frozen=True)
class TuneJob:
    """One state to learn.

    Attributes:
        source: what from.
        config: how.
        initial: [L, H, N, N], where to start: a state to tune further; None starts at the base,
            which is zeros or the `time_state` that the weights bring.
        initial_offset: [L, C], where its offsets start, if `config` learns any; None is zeros.
    """

    source: ExampleSource
    config: TuneConfig
    initial: Tensor | None = None
    initial_offset: Tensor | None = None


@dataclass(frozen=True)
class TuneResult:
    """A learnt state.

    Attributes:
        wkv: [L, H, N, N] fp32 on the CPU, [V, K] for RWKV-7, [K, V] for RWKV-6.
        losses: one a step, in nats a token.
        seconds: wall clock of the whole run (shared by states that were learnt together).
        time_offset: [L, C] fp32 on the CPU, if it was learnt.
    """

    wkv: Tensor
    losses: tuple[float, ...]
    seconds: float
    time_offset: Tensor | None = None
