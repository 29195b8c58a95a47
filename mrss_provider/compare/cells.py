"""The cells of a comparison: their order, and how they are asked.

Models take turns at every prompt, so that whatever drifts while it runs meets all of them alike.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, TypeVar

from mrss_provider.compare.calls import Call, Connection, Result, ask, call_of
from mrss_provider.compare.folder import Settings
from mrss_provider.compare.jsonl import JsonLines
from mrss_provider.compare.prompts import Prompt

T = TypeVar("T")
U = TypeVar("U")

# The order is a function of the settings alone.
_ORDER_SEED = 20_240_229
# Their orders are 24.
_MAX_DEALT = 4


@dataclass(frozen=True)
class Cell:
    """Attributes: the prompt, the model's name and the seed."""

    prompt: Prompt
    model: str
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """As of `Result`."""
        return self.prompt.id, self.model, self.seed


@dataclass(frozen=True)
class Pace:
    """How fast to ask.

    Attributes:
        concurrency: most calls at a time.
        rate_per_s: most calls begun a second; 0 is no limit.
        timeout_s: for a whole answer.
    """

    concurrency: int = 4
    rate_per_s: float = 0.0
    timeout_s: float = 600.0


class Metronome:
    """Lets callers on at even distances, in the order in which they come.

    Args:
        rate_per_s: how many a second; 0 is no limit.
        clock: monotonic seconds.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        rate_per_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._step_s = 1 / rate_per_s if rate_per_s else 0.0
        self._clock = clock
        self._sleep = sleep
        self._next_s = clock()

    async def beat(self) -> None:
        """Return when it is this caller's turn."""
        now = self._clock()
        turn = max(now, self._next_s)
        self._next_s = turn + self._step_s
        if turn > now:
            await self._sleep(turn - now)


def plan(prompts: Sequence[Prompt], models: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Return all cells, in the order in which they are asked.

    Seed after seed the prompts are shuffled; each is put to every model before the next one is, in
    an order of the models that is drawn.
    """
    rng = random.Random(_ORDER_SEED)
    cells: list[Cell] = []
    orders = _orders(models, rng)
    for seed in seeds:
        for prompt in rng.sample(prompts, len(prompts)):
            cells += [Cell(prompt, model, seed) for model in next(orders)]
    return cells


def _orders(models: Sequence[str], rng: random.Random) -> Iterator[Sequence[str]]:
    """Yield orders of the models, in which none has its place, or who it follows, by rule.

    Of a few models all orders are dealt before one comes again.
    """
    if len(models) > _MAX_DEALT:
        while True:
            yield rng.sample(models, len(models))
    deck = list(permutations(models))
    while True:
        rng.shuffle(deck)
        yield from deck


def left_to_do(
    cells: Sequence[Cell], results: Collection[Result], *, retry_errors: bool
) -> list[Cell]:
    """Return the cells that have no result yet; with `retry_errors` those that failed, too."""
    done = {r.key for r in results if not (retry_errors and r.error is not None)}
    return [cell for cell in cells if cell.key not in done]


async def wake(connection: Connection, calls: Sequence[Call]) -> None:
    """Ask for one token of each call, so that what the first one costs is nobody's latency."""
    for call in calls:
        await ask(connection, replace(call, params={**call.params, "max_tokens": 1}), "")


async def ask_all(
    cells: Sequence[Cell],
    connection: Connection,
    settings: Settings,
    pace: Pace,
    file: JsonLines,
    on_result: Callable[[Result], None],
) -> None:
    """Ask every cell and append what comes; what is under way when this is cancelled is lost.

    Args:
        cells: in the order in which they are begun.
        connection: where to.
        settings: the parameters of each call.
        pace: how fast.
        file: where results go.
        on_result: called after a result is on the disk.

    Raises:
        StorageError: a result cannot be written.
    """

    async def answered(cell: Cell) -> Result:
        call = call_of(cell.prompt, cell.model, cell.seed, settings.params, pace.timeout_s)
        return await ask(connection, call, cell.prompt.id)

    await append_each(cells, answered, pace, file, Result.to_dict, on_result)


async def append_each(
    waiting: Sequence[T],
    answer: Callable[[T], Awaitable[U]],
    pace: Pace,
    file: JsonLines,
    line_of: Callable[[U], Mapping[str, Any]],
    on_line: Callable[[U], None],
) -> None:
    """Have everything answered, at a pace, and append a line for each answer as it comes.

    Args:
        waiting: in the order in which they are begun.
        answer: what to do with each.
        pace: how fast.
        file: where the lines go.
        line_of: an answer's.
        on_line: called after a line is on the disk.

    Raises:
        StorageError: a line cannot be written.
    """
    left = iter(waiting)
    metronome = Metronome(pace.rate_per_s)
    writing = asyncio.Lock()

    async def work() -> None:
        for one in left:
            await metronome.beat()
            answered = await answer(one)
            # fsync takes milliseconds, which would be counted as others' latency.
            async with writing:
                await to_the_end(asyncio.to_thread(file.append, line_of(answered)))
            on_line(answered)

    await together([work() for _ in range(min(pace.concurrency, len(waiting)))])


async def together(workers: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Await workers; what one of them raises ends the others, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker)
    except ExceptionGroup as exc:
        raise exc.exceptions[0] from exc


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await what must not be left half done, also when this task is cancelled."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
