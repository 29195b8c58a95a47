"""Engine: requests in, sampled tokens out, one `step` at a time, all on one thread.

No text, no clock, no asyncio. `check` may be called from any thread; nothing else may.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrss_provider.config import EngineConfig
from mrss_provider.engine.request import EngineRequest, EngineStats, TokenOutput
from mrss_provider.engine.scheduler import Batch, Scheduler
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.engine.step_runner import HostRunner, PendingTokens, StepRunner
from mrss_provider.errors import ContextLengthError, EngineError, InvalidRequestError

if TYPE_CHECKING:
    from mrss_provider.model import Model

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching of mixtures over one model.

    Args:
        model: what computes.
        library: the states that requests were resolved against.
        config: limits (`max_rows`, `max_queued`, `prefill_chunk_len`, `max_context_len`).
        allowed_ids: token ids that have a vocabulary entry; no other is ever sampled.
        runner: who carries out the steps; None chooses by the model's device.
    """

    def __init__(
        self,
        model: Model,
        library: StateLibrary,
        config: EngineConfig,
        *,
        allowed_ids: Iterable[int],
        runner: StepRunner | None = None,
    ) -> None:
        self.library = library
        self._config = config
        self._vocab_size = model.config.vocab_size
        self._allowed = frozenset(allowed_ids)
        banned = [i for i in range(self._vocab_size) if i not in self._allowed]
        banned_ids = torch.tensor(banned, dtype=torch.int64, device=model.device)
        self._runner = runner or make_runner(model, config, banned_ids)
        on_host = model.device.type == "cpu"
        self._scheduler = Scheduler(
            max_rows=config.max_rows,
            max_queued=config.max_queued,
            prefill_chunk_len=config.prefill_chunk_len,
            prefill_alone_len=config.prefill_chunk_len if on_host else config.prefill_alone_len,
        )
        # Launched, not committed.
        self._under_way: deque[tuple[Batch, PendingTokens]] = deque()
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_sampled_tokens = 0

    def check(self, request: EngineRequest) -> None:
        """Refuse what can never run. Reads only what never changes.

        Raises:
            ContextLengthError: prompt and answer are longer than the limit.
            InvalidRequestError: too many rows, or token ids outside the vocabulary.
        """
        sampling = request.sampling
        assert sampling.max_tokens is not None, "resolve_sampling comes first"
        total = len(request.prompt) + sampling.max_tokens
        if total > self._config.max_context_len:
            raise ContextLengthError(
                f"prompt and answer must fit in {self._config.max_context_len} tokens, got "
                f"{len(request.prompt)} of prompt and max_tokens {sampling.max_tokens}"
            )
        if request.rows > self._config.max_rows:
            raise InvalidRequestError(
                f"a request may use at most {self._config.max_rows} rows (max_rows), got "
                f"{request.rows}: {request.mixture.rows} for {request.mixture.canonical!r} "
                f"times n = {request.n}"
            )
        self._check_ids("prompt", request.prompt)
        self._check_ids("logit_bias", sampling.logit_bias)
        banned = {i for i, bias in sampling.logit_bias.items() if bias <= -100.0}
        if self._allowed <= banned:
            raise InvalidRequestError("logit_bias must leave a token, got a ban of every one")

    def add(self, request: EngineRequest) -> None:
        """Queue a request whose id no unfinished request has.

        Raises:
            InvalidRequestError: as `check`.
            QueueFullError: too many wait already.
        """
        self.check(request)
        self._scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one of its answers: no output of it follows, its slots are free.

        An unknown id or index is no error: it may just have finished.
        """
        self._scheduler.abort(request_id, index)

    def step(self) -> list[TokenOutput]:
        """Advance every running request: a prompt chunk, or one token for each answer.

        On a GPU the outputs are those of the step before, and the new one is under way. A failure
        ends the requests that had a part in its step, each with an `EngineError`, never the engine.
        """
        outputs: list[TokenOutput] = []
        batch = self._scheduler.schedule()
        if not batch.is_empty:
            if self._runner.needs_tokens(batch):
                outputs += self._commit_all_but(0)
            outputs += self._launch(batch)
        return outputs + self._commit_all_but(0 if batch.is_empty else self._runner.max_ahead)

    def _launch(self, batch: Batch) -> list[TokenOutput]:
        """Begin a step; return the errors of its requests if it cannot."""
        try:
            pending = self._runner.launch(batch)
        except Exception as exc:
            return self._fail(batch, exc)
        self._under_way.append((batch, pending))
        self._num_steps += 1
        self._num_prompt_tokens += sum(chunk.length for chunk in batch.chunks)
        return []

    def _commit_all_but(self, num_ahead: int) -> list[TokenOutput]:
        """Wait for the oldest steps under way until `num_ahead` are left, and commit them."""
        outputs: list[TokenOutput] = []
        while len(self._under_way) > num_ahead:
            batch, pending = self._under_way.popleft()
            try:
                picked = pending.picked()
            except Exception as exc:
                outputs += self._fail(batch, exc)
            else:
                # An answer may have ended since the step was launched: nobody gets its token.
                self._num_sampled_tokens += sum(choice.is_live for choice in batch.sampling)
                outputs += self._scheduler.commit(batch, picked)
        return outputs

    def _fail(self, batch: Batch, exc: Exception) -> list[TokenOutput]:
        """End the requests of a step that failed."""
        error = EngineError(f"the engine failed in this step: {type(exc).__name__}: {exc}")
        outputs = self._scheduler.fail(batch, error)
        log.error("a step failed and ends %d answers", len(outputs), exc_info=exc)
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._scheduler.has_work or self._under_way)

    @property
    def num_free_rows(self) -> int:
        """Slots that nobody holds."""
        return self._scheduler.num_free_rows

    def stats(self) -> EngineStats:
        """Return gauges of this moment and totals since the start."""
        free = self._scheduler.num_free_rows
        return EngineStats(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            num_rows=self._config.max_rows - free,
            num_free_rows=free,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_sampled_tokens=self._num_sampled_tokens,
        )

    def _check_ids(self, field: str, ids: Iterable[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    f"{field} must have token ids in [0, {self._vocab_size}), got {token_id}",
                    param=field,
                )


def make_runner(model: Model, config: EngineConfig, banned_ids: Tensor) -> StepRunner:
    """Return the runner that suits a model: the device's where its decode step is fused."""
    if model.device.type == "cpu" or model.fused is None:
        return HostRunner(model, config.max_rows, banned_ids)
    # Here and not above: a machine without CUDA needs no Triton.
    from mrss_kernels.tail import launch_tail

    from mrss_provider.engine.device_runner import DeviceRunner

    runner = DeviceRunner(model, config, banned_ids, tail=launch_tail)
    runner.prepare(config.prepare_rows)
    return runner
