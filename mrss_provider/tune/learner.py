"""Learner: the states of several jobs as rows of one batch, their gradient, and Adam.

The model's weights stay as they are. Every number that decides the next step is in `snapshot`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mrss_provider.errors import InvalidRequestError
from mrss_provider.model.memory import forget_frames, lacked_memory
from mrss_provider.tune.config import TuneConfig
from mrss_provider.tune.examples import Batch, Example, make_batch
from mrss_provider.tune.network import Shape, Weights, base_state, logits, read_rows
from mrss_provider.tune.token_loss import TokenLoss, nll

ADAM_BETAS = (0.9, 0.99)
ADAM_EPS = 1e-8


class Parameter:
    """Numbers of R jobs [R, ...] with Adam's moments; each job has a rate and a clip of its own."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.requires_grad_()
        self.mean = torch.zeros_like(values, requires_grad=False)
        self.square = torch.zeros_like(values, requires_grad=False)

    @torch.no_grad()
    def move(self, grad: Tensor, step: int, rates: Sequence[float], clips: Sequence[float]) -> None:
        """Clip each job's gradient by its norm and take step `step` (from 0) of Adam."""
        ones = [1] * (grad.ndim - 1)
        clip, rate = (grad.new_tensor(x) for x in (clips, rates))
        share = (clip / grad.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1)
        grad = grad * share.view(-1, *ones)
        first, second = ADAM_BETAS
        self.mean.lerp_(grad, 1 - first)
        self.square.lerp_(grad * grad, 1 - second)
        mean = self.mean / (1 - first ** (step + 1))
        scale = (self.square / (1 - second ** (step + 1))).sqrt_().add_(ADAM_EPS)
        self.values.sub_(rate.view(-1, *ones) * mean / scale)


@dataclass
class _Sums:
    """Sums of nats, and numbers of tokens, of R jobs: what is learnt, and what is kept."""

    learnt: Tensor
    num_learnt: Tensor
    kept: Tensor
    num_kept: Tensor

    def loss(self) -> Tensor:
        return self.learnt / self.num_learnt.clamp_min(1) + self.kept / self.num_kept.clamp_min(1)


class Learner:
    """The states [R, L, H, N, N] of R jobs, and how they are learnt.

    Args:
        weights: official names, on the device and in the dtype to compute in; only read. A
            `time_state` among them is the base, for the start and for locality.
        configs: one a job.
        initial: where each starts, [L, H, N, N]; None is the base.
        token_loss: what a token costs.
        allow_idle: whether a batch may have no token to learn.
        initial_offsets: where the offsets of each start, [L, C]; None, and none at all, is zeros.

    Raises:
        InvalidRequestError: an initial state of another shape.
    """

    def __init__(
        self,
        weights: Weights,
        configs: Sequence[TuneConfig],
        initial: Sequence[Tensor | None],
        *,
        token_loss: TokenLoss = nll,
        allow_idle: bool = False,
        initial_offsets: Sequence[Tensor | None] = (),
    ) -> None:
        self.weights = {name: tensor.detach() for name, tensor in weights.items()}
        self.configs = configs
        self.shape = shape = Shape.of(weights)
        self.device = weights["emb.weight"].device
        self.base = base_state(self.weights)
        self._token_loss = token_loss
        self._allow_idle = allow_idle
        states = self.base.repeat(len(configs), 1, 1, 1, 1)
        for i, start in enumerate(initial):
            if start is not None:
                states[i] = _checked(start, shape.state_size)
        self.states = Parameter(states)
        self.offsets: Parameter | None = None
        if any(config.offsets for config in configs):
            size = len(configs), shape.num_layers, shape.hidden_size
            offsets = torch.zeros(size, device=self.device)
            for i, start in enumerate(initial_offsets):
                if start is not None:
                    offsets[i] = _checked(start, size[1:])
            self.offsets = Parameter(offsets)

    def step(self, step: int, batches: Sequence[Sequence[Example]]) -> list[float]:
        """Move every state by one batch, and return the losses [R] before the move.

        Args:
            step: from 0.
            batches: one a job; examples are cut to the job's `max_len`.

        Raises:
            InvalidRequestError: a batch without a token to learn, unless that is allowed, or one
                that the device has no memory for.
        """
        parameters = [p for p in (self.states, self.offsets) if p is not None]
        with self._told_of_memory(batches):
            losses = self._sums(*self._batch(batches)).loss()
            grads = torch.autograd.grad(
                losses.sum(), [p.values for p in parameters], allow_unused=True
            )
        values: list[float] = losses.tolist()
        clips = [config.grad_clip for config in self.configs]
        rates = [
            [config.rate_at(step) for config in self.configs],
            [c.offset_rate * c.share_at(step) * c.offsets for c in self.configs],
        ]
        for parameter, grad, rate in zip(parameters, grads, rates, strict=False):
            if grad is not None:
                parameter.move(grad, step, rate, clips)
        return values

    def require_finite(self, losses: Sequence[float]) -> None:
        """Refuse losses that are no longer finite.

        Raises:
            InvalidRequestError: names the learning rates.
        """
        if not all(math.isfinite(value) for value in losses):
            raise InvalidRequestError(
                "the loss is no longer finite; lower the learning rate, got "
                f"{[config.learning_rate for config in self.configs]}",
                param="learning_rate",
            )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Sequence[Example]]) -> list[float]:
        """Return every job's loss [R] on the same examples, over all of their tokens.

        Raises:
            InvalidRequestError: the device has no memory for a batch.
        """
        total: _Sums | None = None
        for examples in batches:
            same = [examples] * len(self.configs)
            with self._told_of_memory(same):
                sums = self._sums(*self._batch(same))
            total = sums if total is None else _Sums(
                total.learnt + sums.learnt, total.num_learnt + sums.num_learnt,
                total.kept + sums.kept, total.num_kept + sums.num_kept,
            )  # fmt: skip
        assert total is not None
        losses: list[float] = total.loss().tolist()
        return losses

    def wkv(self, job: int) -> Tensor:
        """Return a copy of a job's state [L, H, N, N], fp32 on the CPU."""
        return self.states.values[job].detach().float().cpu().clone()

    def time_offset(self, job: int) -> Tensor | None:
        """Return a copy of a job's offsets [L, C], if it learns any."""
        if self.offsets is None or not self.configs[job].offsets:
            return None
        return self.offsets.values[job].detach().float().cpu().clone()

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies, on the CPU, of all that changes from step to step."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Take every number from a snapshot of a learner with the same jobs."""
        for name, tensor in self._tensors().items():
            tensor.copy_(snapshot[name])

    def _tensors(self) -> dict[str, Tensor]:
        named = {"states": self.states, "offsets": self.offsets}
        return {
            f"{name}.{part}": getattr(parameter, part)
            for name, parameter in named.items()
            if parameter is not None
            for part in ("values", "mean", "square")
        }

    def _batch(self, batches: Sequence[Sequence[Example]]) -> tuple[Batch, Tensor]:
        """Return the rows of all jobs and the job of each row [B]."""
        longest = max(config.max_len for config in self.configs)
        # A job's own `max_len` may be below another's.
        cut = [
            example.cut(config.max_len)
            for config, examples in zip(self.configs, batches, strict=True)
            for example in examples
        ]
        counts = torch.tensor([len(examples) for examples in batches], device=self.device)
        jobs = torch.arange(len(batches), device=self.device).repeat_interleave(counts)
        return make_batch(cut, longest, self.device), jobs

    @contextlib.contextmanager
    def _told_of_memory(self, batches: Sequence[Sequence[Example]]) -> Iterator[None]:
        """Say which batch has no room on the device, if one has none."""
        try:
            yield
        except Exception as error:
            if not lacked_memory(error):
                raise
            # Whoever tries a smaller batch is to have the memory of this one.
            forget_frames(error)
            sizes = [
                min(len(example.token_ids), config.max_len)
                for config, examples in zip(self.configs, batches, strict=True)
                for example in examples
            ]
            raise InvalidRequestError(
                f"the device has no memory for a batch of {len(sizes)} examples of up to "
                f"{max(sizes)} tokens; lower --batch-size or --max-len",
                param="batch_size",
            ) from error

    def _sums(self, batch: Batch, job_of_row: Tensor) -> _Sums:
        """Return what each job pays for a batch, differentiable in the states and offsets."""
        wkv = self.states.values[job_of_row]
        offsets = None if self.offsets is None else self.offsets.values[job_of_row]
        hidden = read_rows(self.weights, batch.inputs, batch.lengths, wkv, offsets=offsets)

        on_all = self._per_row([float(c.loss_on == "all") for c in self.configs], job_of_row)
        locality = self._per_row([c.locality for c in self.configs], job_of_row)[:, None]
        counted = torch.where(on_all[:, None] > 0, batch.real, batch.answer)
        learnt = counted & (batch.fact | (locality == 0))
        kept = counted & ~batch.fact & (locality > 0)
        self._require_tokens(learnt, job_of_row)

        own = logits(self.weights, hidden[learnt])
        costs = self._token_loss(own, batch, learnt) if len(own) else own.sum(-1)
        drift = self._drift(hidden, batch, kept) * locality.expand_as(kept)[kept]
        return _Sums(
            *self._by_job(costs, learnt, job_of_row), *self._by_job(drift, kept, job_of_row)
        )

    def _drift(self, hidden: Tensor, batch: Batch, kept: Tensor) -> Tensor:
        """Return `KL(base || state)` of the true elements of `kept`, in nats."""
        rows = kept.any(1)
        if not bool(rows.any()):
            return hidden.new_zeros(0, dtype=torch.float32)
        with torch.no_grad():
            lengths = [n for n, read in zip(batch.lengths, rows.tolist(), strict=True) if read]
            states = self.base.expand(len(lengths), *self.base.shape)
            base_hidden = read_rows(self.weights, batch.inputs[rows], lengths, states)
            base = logits(self.weights, base_hidden[kept[rows]]).log_softmax(-1)
        own = logits(self.weights, hidden[kept]).log_softmax(-1)
        return (base.exp() * (base - own)).sum(-1)

    def _require_tokens(self, mask: Tensor, job_of_row: Tensor) -> None:
        """Refuse a batch in which some job has no true element of `mask` [B, T]."""
        learning = set(job_of_row[mask.any(1)].tolist())
        idle = [number for number in range(len(self.configs)) if number not in learning]
        if idle and not self._allow_idle:
            raise InvalidRequestError(
                f"a batch has no token to learn for job {idle[0] + 1} of {len(self.configs)}: its "
                "examples need answers (and facts, with locality), or max_len cuts them off",
                param="max_len",
            )

    def _by_job(self, values: Tensor, mask: Tensor, job_of_row: Tensor) -> tuple[Tensor, Tensor]:
        """Return each job's sum and number of `values`, one a true element of `mask`."""
        jobs = job_of_row[:, None].expand_as(mask)[mask]
        total = values.new_zeros(len(self.configs)).index_add(0, jobs, values)
        count = values.new_zeros(len(self.configs)).index_add(0, jobs, torch.ones_like(values))
        return total, count

    def _per_row(self, values: list[float], job_of_row: Tensor) -> Tensor:
        return torch.tensor(values, device=self.device)[job_of_row]


def _checked(initial: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(initial.shape) != shape:
        raise InvalidRequestError(
            f"the initial state has a part of shape {list(initial.shape)}, where this model needs "
            f"{list(shape)}",
            param="initial",
        )
    return initial
