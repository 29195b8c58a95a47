"""Train a gate: the NLL of the linear merge on text that needs several states, and little more.

`L = -mean_t log sum_k g_k p_k(x_t) + mu KL(g || prior)`: the linear form needs of each row only the
probability of the token that came, so the model is never part of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mrss_provider.engine.gate_file import SHAPES
from mrss_provider.engine.gating_layer import scores
from mrss_provider.errors import InvalidRequestError
from mrss_provider.tune.gate_data import GateData

MIN_DOCUMENTS = 10
"""Fewer texts cannot be parted into some to learn from, to stop by and to judge by."""

_MIN_SCALE = 1e-3

OnEpoch = Callable[[int, float], None]
"""Called after an epoch with its number from 1 and the stopping part's NLL."""


@dataclass(frozen=True)
class GateConfig:
    """How to train a gate.

    Attributes:
        epochs: passes over the data, at most.
        patience: epochs without a better NLL on the stopping part before the training ends.
        batch_size: tokens a step.
        learning_rate: for AdamW.
        weight_decay: for AdamW.
        prior_strength: mu, of the divergence of the gate from the named weights.
        stop_share: of the texts to learn from, those that say when to stop.
        seed: of the network's first values, of the shuffling and of the parting.
    """

    epochs: int = 200
    patience: int = 20
    batch_size: int = 4096
    learning_rate: float = 0.01
    weight_decay: float = 0.01
    prior_strength: float = 0.01
    stop_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            InvalidRequestError: names the field.
        """
        for name in ("epochs", "patience", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InvalidRequestError(
                    f"{name} must be above 0, got {getattr(self, name)!r}", param=name
                )
        for name in ("weight_decay", "prior_strength"):
            if not getattr(self, name) >= 0:
                raise InvalidRequestError(
                    f"{name} must be 0 or more, got {getattr(self, name)!r}", param=name
                )
        if not 0 < self.stop_share < 1:
            raise InvalidRequestError(
                f"stop_share must be between 0 and 1, got {self.stop_share!r}", param="stop_share"
            )


@dataclass(frozen=True)
class GateResult:
    """A trained network.

    Attributes:
        tensors: by the names that a gate file has, fp32 on the CPU.
        epochs: that were run.
        stop_nll: the least NLL on the stopping part, in nats a token.
    """

    tensors: dict[str, Tensor]
    epochs: int
    stop_nll: float


def split(num_documents: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Part documents by chance into the larger part and a `share` of them, each at least one.

    Raises:
        InvalidRequestError: fewer than two documents.
    """
    if num_documents < 2:
        raise InvalidRequestError(f"{num_documents} text cannot be parted; give more")
    order = torch.randperm(num_documents, generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(num_documents - 1, max(1, round(share * num_documents)))
    return sorted(order[count:]), sorted(order[:count])


def train_gate(
    data: GateData, config: GateConfig, *, on_epoch: OnEpoch | None = None
) -> GateResult:
    """Train a gate on `data`; the same data, config and thread count give the same numbers.

    Args:
        data: to learn from and to stop by; never what the gate is judged by.
        config: how.
        on_epoch: told of progress.

    Raises:
        InvalidRequestError: fewer than `MIN_DOCUMENTS` documents with a token that counts.
    """
    present = torch.unique(data.document).tolist()
    if len(present) < MIN_DOCUMENTS:
        raise InvalidRequestError(
            f"a gate is trained on {MIN_DOCUMENTS} texts or more, got {len(present)}"
        )
    learnt, stopping = split(len(present), config.stop_share, config.seed)
    learner = _Learner(data.part([present[i] for i in learnt]), config)
    stop = data.part([present[i] for i in stopping])
    best, best_nll, best_epoch, epoch = learner.tensors(), learner.nll(stop), 0, 0
    for epoch in range(1, config.epochs + 1):
        learner.run_epoch()
        nll = learner.nll(stop)
        if on_epoch is not None:
            on_epoch(epoch, nll)
        if nll < best_nll:
            best, best_nll, best_epoch = learner.tensors(), nll, epoch
        elif epoch - best_epoch >= config.patience:
            break
    return GateResult(best, epoch, best_nll)


def gated_log_probs(data: GateData, u: Tensor) -> Tensor:
    """Return the linear merge's log-probability of each token [T], from the rows' `u` [T, K]."""
    return torch.logsumexp((data.prior.log() + u).log_softmax(-1) + data.log_probs, dim=-1)


class _Learner:
    """The network's numbers, its optimiser, and the data it learns from."""

    def __init__(self, data: GateData, config: GateConfig) -> None:
        self.data = data
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        seen = data.features.flatten(0, 1)
        self.mean = seen.mean(0)
        self.scale = seen.std(0).clamp_min(_MIN_SCALE)
        width = SHAPES["hidden.weight"][1]
        hidden = torch.randn(SHAPES["hidden.weight"], generator=self.generator) * (2 / width) ** 0.5
        # With a last layer of zeros the gate begins as the named weights.
        self.network = [
            values.requires_grad_()
            for values in (
                hidden,
                torch.zeros(SHAPES["hidden.bias"]),
                torch.zeros(SHAPES["score.weight"]),
            )
        ]
        self.optimizer = torch.optim.AdamW(
            self.network, lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def run_epoch(self) -> None:
        """Take one step for each batch of the shuffled tokens."""
        order = torch.randperm(len(self.data.document), generator=self.generator)
        for batch in torch.split(order, self.config.batch_size):
            self.optimizer.zero_grad()
            self._loss(batch).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    @torch.no_grad()
    def nll(self, data: GateData) -> float:
        """Return nats a token of the linear merge on `data`."""
        return -float(gated_log_probs(data, self._scores(data.features)).mean())

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the numbers, by the names of a gate file."""
        values = (self.mean, self.scale, *self.network)
        return {name: tensor.detach().clone() for name, tensor in zip(SHAPES, values, strict=True)}

    def _loss(self, batch: Tensor) -> Tensor:
        prior = self.data.prior.log()
        gate = (prior + self._scores(self.data.features[batch])).log_softmax(-1)
        nll = -torch.logsumexp(gate + self.data.log_probs[batch], dim=-1)
        drift = (gate.exp() * (gate - prior)).sum(-1)
        return (nll + self.config.prior_strength * drift).mean()

    def _scores(self, features: Tensor) -> Tensor:
        normal = (features - self.mean) / self.scale
        return scores(normal, torch.ones(normal.shape[:2], dtype=torch.bool), *self.network)
