"""A step on its way to the host: its tokens arrive in pinned memory, and can be waited for.

Where a token's mask depends on the tokens before it, the step is launched in two halves, and the
second one waits until the host has seen them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mrss_provider.engine.batch import Batch
from mrss_provider.engine.step_runner import PendingTokens
from mrss_provider.engine.tail import Picked
from mrss_provider.errors import MRSSError


@dataclass(frozen=True)
class Received:
    """Host memory that a step's tokens arrive in."""

    ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Wanted:
    """Places of the answers that want log-probabilities, and of those that want top tokens too."""

    log_probs: list[int]
    top: list[int]

    @classmethod
    def of(cls, batch: Batch) -> Wanted:
        """Look at the answers of a step."""
        samplings = [choice.owner.request.sampling for choice in batch.sampling]
        log_probs = [g for g, sampling in enumerate(samplings) if sampling.logprobs]
        return cls(log_probs, [g for g in log_probs if samplings[g].top_logprobs])


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of the answers that want them: each [n, M], likeliest first."""

    places: list[int]
    values: Tensor
    ids: Tensor


@dataclass(frozen=True)
class PendingStep:
    """A step whose tokens are on their way to the host.

    Attributes:
        batch: what the step does.
        received: where its tokens arrive.
        wanted: who wants more than tokens.
        top: the likeliest tokens, if anybody wants them.
        arrived: happens when all is there; None if it is.
        errors: by their places, of answers that a grammar leaves no token.
    """

    batch: Batch
    received: Received
    wanted: Wanted
    top: TopTokens | None
    arrived: torch.cuda.Event | None
    errors: Mapping[int, MRSSError]

    def go_on(self) -> None:
        """Do nothing: all of it is launched."""

    def picked(self) -> list[Picked]:
        """Wait for the step; return one for each answer of `Batch.sampling`."""
        if self.arrived is not None:
            self.arrived.synchronize()
        count = len(self.batch.sampling)
        ids: list[int] = self.received.ids[:count].tolist()
        picked = list(map(Picked, ids))
        if ids and min(ids) < 0:
            picked = [Picked(token if token >= 0 else None) for token in ids]
        for g, error in self.errors.items():
            picked[g] = Picked(None, error=error)
        if not self.wanted.log_probs:
            return picked
        log_probs: list[float] = self.received.log_probs[:count].tolist()
        for g in self.wanted.log_probs:
            if ids[g] >= 0:
                picked[g] = Picked(ids[g], log_probs[g])
        if self.top is not None:
            for n, g in enumerate(self.top.places):
                if ids[g] >= 0:
                    picked[g] = Picked(ids[g], log_probs[g], self._top_of(n, g))
        return picked

    def _top_of(self, n: int, g: int) -> tuple[tuple[int, float], ...]:
        assert self.top is not None
        count = self.batch.sampling[g].owner.request.sampling.top_logprobs or 0
        best = zip(self.top.ids[n].tolist(), self.top.values[n].tolist(), strict=True)
        return tuple((i, value) for i, value in best if value > -torch.inf)[:count]


class WaitingStep:
    """A step whose model is launched, and whose tokens are picked when those before are known."""

    def __init__(self, pick: Callable[[], PendingTokens]) -> None:
        """Wait with `pick`, which launches the rest of the step."""
        self._pick = pick
        self._picked: PendingTokens | None = None
        self._error: Exception | None = None

    def go_on(self) -> PendingTokens:
        """Launch the rest of the step if that is not done; all steps before are committed.

        Raises:
            Exception: what it met, each time: it may have got halfway.
        """
        if self._error is not None:
            raise self._error
        if self._picked is None:
            try:
                self._picked = self._pick()
            except Exception as exc:
                self._error = exc
                raise
        return self._picked

    def picked(self) -> list[Picked]:
        """Wait for the step; return one for each answer of `Batch.sampling`."""
        return self.go_on().picked()


def to_host(tensor: Tensor) -> Tensor:
    """Copy to host memory, not waiting for it on CUDA."""
    if tensor.device.type == "cpu":
        return tensor
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return out.copy_(tensor, non_blocking=True)
