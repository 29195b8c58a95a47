"""State tuning: learn the initial state of every head, and nothing else, by gradient.

The model's weights stay as they are. Several states can be learnt at once: they share the forward
pass as rows of one batch and nothing more, so each comes out as if it had been tuned alone.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mrss_provider.errors import InvalidRequestError
from mrss_provider.tune.examples import Batch, Example, ExampleSource, make_batch
from mrss_provider.tune.network import Shape, Weights, base_state, forward, logits, start_state

LossOn = Literal["answer", "all"]

ADAM_BETAS = (0.9, 0.99)
ADAM_EPS = 1e-8


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
    max_len: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            InvalidRequestError: names the field.
        """
        positive = ("steps", "batch_size", "learning_rate", "grad_clip", "max_len")
        for name in positive:
            if not getattr(self, name) > 0:
                raise InvalidRequestError(
                    f"{name} must be above 0, got {getattr(self, name)!r}", param=name
                )
        for name in ("warmup_steps", "locality"):
            if not getattr(self, name) >= 0:
                raise InvalidRequestError(
                    f"{name} must be 0 or more, got {getattr(self, name)!r}", param=name
                )
        if self.loss_on not in ("answer", "all"):
            raise InvalidRequestError(
                f"loss_on must be 'answer' or 'all', got {self.loss_on!r}", param="loss_on"
            )

    def rate_at(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        span = max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / span))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


@dataclass(frozen=True)
class TuneJob:
    """One state to learn.

    Attributes:
        source: what from.
        config: how.
        initial: [L, H, N, N], where to start: a state to tune further; None starts at the base,
            which is zeros or the `time_state` that the weights bring.
    """

    source: ExampleSource
    config: TuneConfig
    initial: Tensor | None = None


@dataclass(frozen=True)
class TuneResult:
    """A learnt state.

    Attributes:
        wkv: [L, H, N, N] fp32 on the CPU, [V, K].
        losses: one a step, in nats a token.
        seconds: wall clock of the whole run (shared by states that were learnt together).
    """

    wkv: Tensor
    losses: tuple[float, ...]
    seconds: float


Progress = Callable[[int, int, Sequence[float]], None]
"""Called after a step with its number from 1, the number of steps, and each state's loss."""


def tune_state(
    weights: Weights,
    source: ExampleSource,
    config: TuneConfig,
    *,
    initial: Tensor | None = None,
    on_step: Progress | None = None,
) -> TuneResult:
    """Learn one state; see `TuneJob` and `tune_states`."""
    return tune_states(weights, [TuneJob(source, config, initial)], on_step=on_step)[0]


def tune_states(
    weights: Weights, jobs: Sequence[TuneJob], *, on_step: Progress | None = None
) -> list[TuneResult]:
    """Learn the states of `jobs` at once.

    Args:
        weights: RWKV-7 in official names, on the device and in the dtype to compute in; only read.
            A `time_state` among them is the base, for the start and for locality.
        jobs: all with the same `steps`.
        on_step: told of progress.

    Raises:
        InvalidRequestError: no job, different `steps`, an initial state of another shape, a batch
            without a token to learn for some job, or a loss that is no longer finite.
    """
    if not jobs or len({job.config.steps for job in jobs}) > 1:
        raise InvalidRequestError(
            "states that are tuned together need the same steps, and there must be at least one"
        )
    began = time.perf_counter()
    learner = _Learner(weights, jobs)
    losses: list[list[float]] = [[] for _ in jobs]
    for step in range(jobs[0].config.steps):
        for record, loss in zip(losses, learner.step(step), strict=True):
            record.append(loss)
        if on_step is not None:
            on_step(step + 1, jobs[0].config.steps, [record[-1] for record in losses])
    seconds = time.perf_counter() - began
    learnt = learner.states.detach().float().cpu()
    return [
        TuneResult(learnt[i].clone(), tuple(record), seconds) for i, record in enumerate(losses)
    ]


class _Learner:
    """The states [R, L, H, N, N] of R jobs, their generators, and Adam's moments."""

    def __init__(self, weights: Weights, jobs: Sequence[TuneJob]) -> None:
        self.weights = {name: tensor.detach() for name, tensor in weights.items()}
        self.jobs = jobs
        self.shape = shape = Shape.of(weights)
        self.device = weights["emb.weight"].device
        self.base = base_state(self.weights)
        self.states = self.base.repeat(len(jobs), 1, 1, 1, 1)
        for i, job in enumerate(jobs):
            if job.initial is not None:
                self.states[i] = _checked(job.initial, shape.state_size)
        self.states.requires_grad_()
        self._mean = torch.zeros_like(self.states, requires_grad=False)
        self._square = torch.zeros_like(self.states, requires_grad=False)
        self._rngs = [random.Random(job.config.seed) for job in jobs]

    def step(self, step: int) -> list[float]:
        """Draw a batch for every job, move every state, and return the losses before the move."""
        drawn = [self._draw(job, rng) for job, rng in zip(self.jobs, self._rngs, strict=True)]
        batch = make_batch(
            [example for examples in drawn for example in examples],
            max(job.config.max_len for job in self.jobs),
            self.device,
        )
        rows = torch.tensor([len(examples) for examples in drawn], device=self.device)
        losses = self._losses(batch, rows)
        (grad,) = torch.autograd.grad(losses.sum(), self.states)
        values: list[float] = losses.tolist()
        if not all(math.isfinite(value) for value in values):
            raise InvalidRequestError(
                f"the loss at step {step + 1} is no longer finite; lower the learning rate, got "
                f"{[job.config.learning_rate for job in self.jobs]}",
                param="learning_rate",
            )
        self._move(grad, step)
        return values

    def _draw(self, job: TuneJob, rng: random.Random) -> list[Example]:
        """Draw a job's batch, cut to its own `max_len`, which may be below another job's."""
        return [job.source(rng).cut(job.config.max_len) for _ in range(job.config.batch_size)]

    def _losses(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return each job's loss [R], differentiable in the states."""
        job_of_row = torch.arange(len(self.jobs), device=self.device).repeat_interleave(rows)
        dtype = self.weights["emb.weight"].dtype
        start = start_state(self.shape, self.states[job_of_row], dtype)
        hidden, _ = forward(self.weights, batch.inputs, start)

        configs = [job.config for job in self.jobs]
        on_all = self._per_row([float(c.loss_on == "all") for c in configs], job_of_row)
        locality = self._per_row([c.locality for c in configs], job_of_row)
        learnt = torch.where(on_all[:, None] > 0, batch.real, batch.answer)
        is_local = locality[:, None] > 0
        learnt_fact = torch.where(is_local, learnt & batch.fact, learnt)
        kept = is_local & learnt & ~batch.fact

        self._require_tokens(learnt_fact, job_of_row)
        nll = self._mean_by_job(self._nll(hidden, batch, learnt_fact), learnt_fact, job_of_row)
        if not bool(kept.any()):
            return nll
        rows_kept = kept.any(1)
        base_rows = self.base.expand(int(rows_kept.sum()), *self.base.shape)
        base = start_state(self.shape, base_rows, dtype)
        with torch.no_grad():
            base_hidden, _ = forward(self.weights, batch.inputs[rows_kept], base)
            base_probs = logits(self.weights, base_hidden[kept[rows_kept]]).log_softmax(-1)
        own = logits(self.weights, hidden[kept]).log_softmax(-1)
        drift = (base_probs.exp() * (base_probs - own)).sum(-1) * self._expand(locality, kept)
        return nll + self._mean_by_job(drift, kept, job_of_row)

    def _require_tokens(self, mask: Tensor, job_of_row: Tensor) -> None:
        """Refuse a batch in which some job has no true element of `mask` [B, T]."""
        learning = set(job_of_row[mask.any(1)].tolist())
        idle = [number for number in range(len(self.jobs)) if number not in learning]
        if idle:
            raise InvalidRequestError(
                f"a batch has no token to learn for job {idle[0] + 1} of {len(self.jobs)}: its "
                "examples need answers (and facts, with locality), or max_len cuts them off",
                param="max_len",
            )

    def _nll(self, hidden: Tensor, batch: Batch, mask: Tensor) -> Tensor:
        return F.cross_entropy(
            logits(self.weights, hidden[mask]), batch.targets[mask], reduction="none"
        )

    def _mean_by_job(self, values: Tensor, mask: Tensor, job_of_row: Tensor) -> Tensor:
        """Average `values` (one a true element of `mask`) within each job."""
        jobs = job_of_row[:, None].expand_as(mask)[mask]
        total = values.new_zeros(len(self.jobs)).index_add(0, jobs, values)
        count = values.new_zeros(len(self.jobs)).index_add(0, jobs, torch.ones_like(values))
        return total / count.clamp_min(1)

    def _per_row(self, values: list[float], job_of_row: Tensor) -> Tensor:
        return torch.tensor(values, device=self.device)[job_of_row]

    def _expand(self, per_row: Tensor, mask: Tensor) -> Tensor:
        return per_row[:, None].expand_as(mask)[mask]

    @torch.no_grad()
    def _move(self, grad: Tensor, step: int) -> None:
        """Clip each state's gradient and take one step of Adam."""
        clip = torch.tensor([job.config.grad_clip for job in self.jobs], device=self.device)
        rate = torch.tensor([job.config.rate_at(step) for job in self.jobs], device=self.device)
        norm = grad.flatten(1).norm(dim=1)
        grad = grad * (clip / norm.clamp_min(1e-12)).clamp_max(1)[:, None, None, None, None]
        first, second = ADAM_BETAS
        self._mean.lerp_(grad, 1 - first)
        self._square.lerp_(grad * grad, 1 - second)
        mean = self._mean / (1 - first ** (step + 1))
        scale = (self._square / (1 - second ** (step + 1))).sqrt_().add_(ADAM_EPS)
        self.states.sub_(rate[:, None, None, None, None] * mean / scale)


def _checked(initial: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(initial.shape) != shape:
        raise InvalidRequestError(
            f"the initial state has shape {list(initial.shape)}, this model needs {list(shape)}",
            param="initial",
        )
    return initial
