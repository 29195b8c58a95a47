"""Tune states on examples that are drawn: learn the initial state of every head, and nothing else.

Several states can be learnt at once: they share the forward pass as rows of one batch and nothing
more, so each comes out as if it had been tuned alone. `training.py` tunes one state on a data set.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from mrss_provider.errors import InvalidRequestError
from mrss_provider.tune.config import TuneConfig, TuneJob, TuneResult
from mrss_provider.tune.examples import ExampleSource
from mrss_provider.tune.learner import Learner
from mrss_provider.tune.network import Weights

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
        weights: in official names, on the device and in the dtype to compute in; only read.
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
    learner = Learner(
        weights,
        [job.config for job in jobs],
        [job.initial for job in jobs],
        initial_offsets=[job.initial_offset for job in jobs],
    )
    rngs = [random.Random(job.config.seed) for job in jobs]
    losses: list[list[float]] = [[] for _ in jobs]
    for step in range(jobs[0].config.steps):
        drawn = [
            [job.source(rng) for _ in range(job.config.batch_size)]
            for job, rng in zip(jobs, rngs, strict=True)
        ]
        found = learner.step(step, drawn)
        learner.require_finite(found)
        for record, loss in zip(losses, found, strict=True):
            record.append(loss)
        if on_step is not None:
            on_step(step + 1, jobs[0].config.steps, [record[-1] for record in losses])
    seconds = time.perf_counter() - began
    return [
        TuneResult(learner.wkv(i), tuple(record), seconds, learner.time_offset(i))
        for i, record in enumerate(losses)
    ]
