"""Embedder: texts to vectors, each input a request of its own among the engine's others."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from mrss_provider.async_engine.deadlines import within
from mrss_provider.async_engine.loading import Loaded
from mrss_provider.async_engine.model_slot import ModelSlot
from mrss_provider.async_engine.prompting import MAX_INLINE_CHARS
from mrss_provider.async_engine.thread import EngineThread
from mrss_provider.backend import Embeddings, EmbedRequest, MixtureOptions
from mrss_provider.engine.request import (
    EngineRequest,
    Pooling,
    ResolvedMixture,
    TokenOutput,
    resolve_sampling,
)
from mrss_provider.errors import (
    ContextLengthError,
    InvalidRequestError,
    MRSSError,
    QueueFullError,
)
from mrss_provider.sampling_params import SamplingParams

# Inputs of one request that go to the engine at a time: enough to fill a pass over the weights, and
# rows are left for others.
_MOST_AT_ONCE = 16


class Embedder:
    """Embeds with the model of a slot.

    Args:
        slot: where the model is.
        ids: numbers for the engine's requests, unlike any others.
    """

    def __init__(self, slot: ModelSlot, ids: itertools.count[int]) -> None:
        self._slot = slot
        self._ids = ids

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Return the vectors of a request's inputs; cancelling it drops what is left.

        Raises:
            MRSSError: as `Embeds.embed`.
        """
        async with within(request.timeout_s, "the inputs were not read"):
            return await self._embed(request, time.monotonic())

    async def _embed(self, request: EmbedRequest, started: float) -> Embeddings:
        loaded, thread = await self._slot.parts()
        # What is embedded is one turn.
        mixture = loaded.library.resolve(request.model, MixtureOptions(reinject="never"))
        _check_rows(request, mixture)
        inputs = await _encode(request, loaded)
        requests = [self._engine_request(request, ids, mixture) for ids in inputs]
        _check(requests, loaded, request)
        vectors = await _read(requests, thread, request.timeout_s, started)
        return Embeddings(
            mixture.canonical, mixture.fingerprint, tuple(vectors), sum(map(len, inputs))
        )

    def _engine_request(
        self, request: EmbedRequest, token_ids: Sequence[int], mixture: ResolvedMixture
    ) -> EngineRequest:
        sampling = resolve_sampling(SamplingParams(max_tokens=0, seed=0), mixture)
        return EngineRequest(
            id=f"e{next(self._ids)}",
            prompt=tuple(token_ids),
            mixture=mixture,
            sampling=sampling,
            owner=request.owner,
            pooling=Pooling(request.pooling == "mean", request.dimensions or 0),
        )


class _Reading:
    """A `Sink`: the one output of a request that wants its prompt read."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.vector: asyncio.Future[array[float]] = self.loop.create_future()

    def on_output(self, output: TokenOutput) -> None:
        """Take the vector, or the error that came instead."""
        if output.error is not None:
            self.on_failure(output.error)
        elif not self.vector.done():
            assert output.reading is not None
            assert output.reading.vector is not None
            self.vector.set_result(array("f", output.reading.vector.tobytes()))

    def on_failure(self, error: MRSSError) -> None:
        """Learn that none will come."""
        if not self.vector.done():
            self.vector.set_exception(error)


_Pair = tuple[EngineRequest, _Reading]


async def _read(
    requests: Sequence[EngineRequest],
    thread: EngineThread,
    timeout_s: float | None,
    started: float,
) -> list[array[float]]:
    """Read requests, some at a time; all that are left are dropped where one fails.

    A full queue refuses the first of them, and lets the others wait for those before them.
    """
    pending = deque((request, _Reading()) for request in requests)
    readings = [reading for _, reading in pending]
    under_way: list[_Reading] = []
    async with AsyncExitStack() as stack:
        while pending:
            batch = [pending.popleft() for _ in range(min(len(pending), _MOST_AT_ONCE))]
            for request, reading in batch:
                stack.callback(_drop, request, reading, thread)
            within_s = math.inf if timeout_s is None else started + timeout_s - time.monotonic()
            refusals = await _add(batch, thread, within_s)
            added = [pair for pair in batch if pair[0].id not in refusals]
            under_way += [reading for _, reading in added]
            if not under_way:
                raise next(iter(refusals.values()))
            pending.extendleft(pair for pair in reversed(batch) if pair[0].id in refusals)
            # The next ones come while the engine still has some to read.
            under_way = await _leave(under_way, min(_MOST_AT_ONCE // 2, len(under_way) - 1))
        return [await reading.vector for reading in readings]


async def _add(
    batch: Sequence[_Pair], thread: EngineThread, within_s: float
) -> dict[str, QueueFullError]:
    """Hand requests to the engine, all between the same two steps.

    Returns:
        By id, why it has no room for some of them.

    Raises:
        MRSSError: another reason why it does not take one.
    """
    admissions = [asyncio.wrap_future(thread.add(*pair, within_s)) for pair in batch]
    outcomes = await asyncio.gather(*admissions, return_exceptions=True)
    refusals: dict[str, QueueFullError] = {}
    for (request, _), outcome in zip(batch, outcomes, strict=True):
        if isinstance(outcome, QueueFullError):
            refusals[request.id] = outcome
        elif outcome is not None:
            raise outcome
    return refusals


async def _leave(readings: Sequence[_Reading], num: int) -> list[_Reading]:
    """Wait until `num` of `readings` are under way at most, and return these.

    Raises:
        MRSSError: one of them failed.
    """
    while True:
        under_way = [reading for reading in readings if not reading.vector.done()]
        if len(under_way) <= num:
            return under_way
        done, _ = await asyncio.wait(
            [reading.vector for reading in under_way], return_when=asyncio.FIRST_COMPLETED
        )
        for vector in done:
            vector.result()


def _drop(request: EngineRequest, reading: _Reading, thread: EngineThread) -> None:
    """Let go of a request, if it is still with the engine."""
    if not reading.vector.done():
        thread.abort(request.id)
        reading.vector.cancel()
    elif not reading.vector.cancelled():
        # Somebody has looked at it, so that asyncio does not complain.
        reading.vector.exception()


def _check_rows(request: EmbedRequest, mixture: ResolvedMixture) -> None:
    if mixture.rows != 1:
        raise InvalidRequestError(
            f"an embedding is of one recurrent state, and {mixture.canonical!r} has "
            f"{mixture.rows}; name one state or 'base', got {request.model!r}",
            param="model",
        )


def _check(requests: Sequence[EngineRequest], loaded: Loaded, asked: EmbedRequest) -> None:
    """Refuse inputs before any of them is read."""
    for i, request in enumerate(requests):
        num_tokens = len(request.prompt)
        if asked.max_prompt_len and num_tokens > asked.max_prompt_len:
            raise ContextLengthError(
                f"an input may have {asked.max_prompt_len} tokens here, got {num_tokens} in "
                f"input[{i}]; send less",
                param="input",
            )
        try:
            loaded.engine.check(request)
        except InvalidRequestError as exc:
            if exc.param != "dimensions":
                raise type(exc)(f"input[{i}]: {exc.message}", param="input") from exc
            raise


async def _encode(request: EmbedRequest, loaded: Loaded) -> list[Sequence[int]]:
    """Return the tokens of each input."""
    encode: Callable[[str], list[int]] = loaded.tokenizer.encode

    def encode_all() -> list[Sequence[int]]:
        return [encode(text) if isinstance(text, str) else text for text in request.inputs]

    is_short = sum(map(len, request.inputs)) <= MAX_INLINE_CHARS
    return encode_all() if is_short else await asyncio.to_thread(encode_all)
