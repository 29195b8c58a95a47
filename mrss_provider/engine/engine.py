"""Engine: requests in, sampled tokens out, one `step` at a time, all on one thread.

No text, no clock, no asyncio. `check` and `stats` may be called from any thread; nothing else may.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrss_provider.backend import EngineStats
from mrss_provider.config import EngineConfig
from mrss_provider.engine.batch import Batch
from mrss_provider.engine.copy_stream import pinned
from mrss_provider.engine.lazy_rows import LazyPolicy
from mrss_provider.engine.logits_processors import BAN
from mrss_provider.engine.request import EngineRequest, TokenOutput
from mrss_provider.engine.scheduler import Scheduler
from mrss_provider.engine.snapshots import make_keeper
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.engine.step_runner import HostRunner, PendingTokens, StepRunner
from mrss_provider.engine.token_ids import refusal, to_array
from mrss_provider.errors import (
    ContextLengthError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
)
from mrss_provider.model.memory import (
    device_memory,
    forget_frames,
    lacked_memory,
    release_memory,
    takes_work,
)

if TYPE_CHECKING:
    from mrss_provider.model import Model, ModelConfig, StateSnapshot

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
        self._model_config = model.config
        self._device = model.device
        self._vocab_size = model.config.vocab_size
        self._allowed = frozenset(allowed_ids)
        banned = [i for i in range(self._vocab_size) if i not in self._allowed]
        banned_ids = torch.tensor(banned, dtype=torch.int64, device=model.device)
        self._runner = runner or make_runner(model, config, banned_ids)
        self._keeper = make_keeper(model, self._runner.pool, config)
        on_host = model.device.type == "cpu"
        is_lazy = config.lazy_rows == "on" or (config.lazy_rows == "auto" and on_host)
        self._scheduler = Scheduler(
            max_rows=config.max_rows,
            max_queued=config.max_queued,
            prefill_chunk_len=config.prefill_chunk_len,
            prefill_alone_len=config.prefill_chunk_len if on_host else config.prefill_alone_len,
            lazy=LazyPolicy(probe_len=config.reprobe_tokens) if is_lazy else None,
            keeper=self._keeper,
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
        self._check_prompt(request)
        self._check_forced(request)
        self._check_pooling(request)
        self.check_ids("logit_bias", sampling.logit_bias)
        banned = {i for i, bias in sampling.logit_bias.items() if bias <= BAN}
        if self._allowed <= banned:
            raise InvalidRequestError("logit_bias must leave a token, got a ban of every one")

    def check_ids(self, field: str, ids: Collection[int]) -> None:
        """Return if the vocabulary has all of `ids`; `field` is the key that they came with.

        Raises:
            InvalidRequestError: an id outside it, or what is no id.
        """
        # A long prompt must not hold up the event loop, nor a step.
        try:
            found = to_array(tuple(ids))
            is_known = not len(found) or (found.min() >= 0 and found.max() < self._vocab_size)
        except (OverflowError, TypeError):
            is_known = False
        if not is_known:
            raise refusal(field, ids, self._vocab_size)

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
        Where memory was short it ends the newer half of them, each with an `OverloadedError`.

        Raises:
            EngineUnavailableError: the device is lost, and every request with it.
        """
        outputs = self._go_on() + self._scheduler.take_unbegun()
        batch = self._scheduler.schedule()
        if not batch.is_empty:
            if self._runner.needs_tokens(batch):
                outputs += self._commit_all_but(0)
            outputs += self._launch(batch)
        return outputs + self._commit_all_but(0 if batch.is_empty else self._runner.max_ahead)

    @property
    def model_config(self) -> ModelConfig:
        """What the loaded checkpoint is."""
        return self._model_config

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the recurrent states."""
        return self._runner.pool.wkv.dtype

    def load_cached(self, request: EngineRequest) -> None:
        """Bring what is in files of the states that a request can begin from to memory.

        It reads files: from any thread but the engine's.
        """
        self._keeper.load_files(request)

    def at_hand(self, rows: Sequence[StateSnapshot]) -> tuple[StateSnapshot, ...]:
        """Return rows on the host as the device takes them without holding up a step.

        It may copy them: from any thread but the engine's.
        """
        if self._device.type != "cuda":
            return tuple(rows)
        try:
            return tuple([pinned(row) for row in rows])
        except RuntimeError as exc:
            log.warning("no pinned memory is left for the states of a session: %s", exc)
            return tuple(rows)

    def close(self) -> None:
        """Write what is to outlive the engine, and let go of the cache. Nothing runs any more."""
        self._keeper.close()

    def _go_on(self) -> list[TokenOutput]:
        """Launch what is left of the last step; commit the step at once if it cannot be.

        Before the next one is planned, which so has no part in the failure.
        """
        if not self._under_way:
            return []
        _, pending = self._under_way[-1]
        try:
            pending.go_on()
        except Exception:
            # Told when its tokens are asked for.
            return self._commit_all_but(0)
        return []

    def _launch(self, batch: Batch) -> list[TokenOutput]:
        """Begin a step; return the errors of its requests if it cannot."""
        try:
            pending = self._runner.launch(batch)
        except Exception as exc:
            return self._shed(batch, exc) if lacked_memory(exc) else self._fail(batch, exc)
        self._under_way.append((batch, pending))
        for choice in batch.sampling:
            choice.num_launched += 1
        self._keeper.read(batch.chunks)
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
                # Steps launched since have read what this one did not leave.
                is_last = not self._under_way
                is_short = is_last and lacked_memory(exc)
                outputs += self._shed(batch, exc) if is_short else self._fail(batch, exc)
            else:
                given = self._scheduler.commit(batch, picked)
                # An answer may have ended since the step was launched: nobody gets its token.
                self._num_sampled_tokens += len(given)
                self._num_sampled_tokens -= [output.token_id for output in given].count(None)
                outputs += given
        return outputs

    def _fail(self, batch: Batch, exc: Exception) -> list[TokenOutput]:
        """End the requests of a step that failed; all of them where the device has."""
        if not takes_work(self._device):
            raise EngineUnavailableError(
                f"the device failed and takes no more work ({type(exc).__name__}: {exc}); the "
                "engine has to be started again"
            ) from exc
        error = EngineError(f"the engine failed in this step: {type(exc).__name__}: {exc}")
        outputs = self._scheduler.fail(batch, error)
        log.error("a step failed and ends %d answers", len(outputs), exc_info=exc)
        return outputs

    def _shed(self, batch: Batch, exc: Exception) -> list[TokenOutput]:
        """End the newest requests of a step that had too little memory, and give memory back."""
        outputs = self._commit_all_but(0)
        self._runner.forget()
        self._keeper.shed()
        error = OverloadedError(
            "the engine had no memory left for this step and ended its newest requests; try again "
            "later, or start it with fewer max_rows"
        )
        shed = self._scheduler.shed(batch, error)
        log.error("out of memory: %d answers end, the others go on (%s)", len(shed), exc)
        forget_frames(exc)
        release_memory()
        return outputs + shed

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._scheduler.has_work or self._under_way)

    @property
    def num_free_rows(self) -> int:
        """Slots that nobody holds."""
        return self._scheduler.num_free_rows

    @property
    def num_waiting(self) -> int:
        """Requests that wait for rows."""
        return self._scheduler.num_waiting

    @property
    def num_started(self) -> int:
        """Requests that got rows, since the start."""
        return self._scheduler.num_started

    def num_before(self, owner: str) -> int:
        """Return about how many requests would get rows before one that `owner` adds now."""
        return self._scheduler.num_before(owner)

    def stats(self) -> EngineStats:
        """Return gauges of this moment and totals since the start."""
        free = self._scheduler.num_free_rows
        device_bytes, device_bytes_total = device_memory(self._device)
        return EngineStats(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            num_rows=self._config.max_rows - free,
            num_free_rows=free,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_sampled_tokens=self._num_sampled_tokens,
            cache=self._keeper.cache.stats(),
            device_bytes=device_bytes,
            device_bytes_total=device_bytes_total,
        )

    def _check_prompt(self, request: EngineRequest) -> None:
        try:
            smallest, largest = request.prompt_bounds
            is_known = smallest >= 0 and largest < self._vocab_size
        except (OverflowError, TypeError):
            is_known = False
        if not is_known:
            raise refusal("prompt", request.prompt, self._vocab_size)

    def _check_forced(self, request: EngineRequest) -> None:
        assert not request.forced or len(request.forced) == request.sampling.max_tokens
        self.check_ids("mrss.given", request.forced)
        bias = request.sampling.logit_bias
        for token_id in request.forced:
            if token_id not in self._allowed or bias.get(token_id, 0.0) <= BAN:
                raise InvalidRequestError(
                    f"given must have tokens that may be drawn, got {token_id}, which is banned",
                    param="mrss.given",
                )

    def _check_pooling(self, request: EngineRequest) -> None:
        if request.pooling is None:
            return
        wanted, size = request.pooling.num_dimensions, self._model_config.hidden_size
        if wanted > size:
            raise InvalidRequestError(
                f"dimensions must be an integer in [1, {size}] with this model, got {wanted}",
                param="dimensions",
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
