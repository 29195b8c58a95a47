"""AsyncEngine.embed on a tiny model: beside other work, within the queue, and let go of at once."""

import asyncio
import math
import threading

import pytest
from tiny_model import write_model_folder, write_state

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import EmbedRequest, GenerateRequest
from mrss_provider.config import EngineConfig
from mrss_provider.errors import (
    ContextLengthError,
    EngineUnavailableError,
    QueueFullError,
    RequestTimeoutError,
    StateFileError,
)
from mrss_provider.sampling_params import SamplingParams

TEXTS = tuple(f"hello world {i} the cat" for i in range(40))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "states").mkdir()
    write_state(folder / "states" / "tone.pth")
    return EngineConfig(
        model=write_model_folder(folder / "model"),
        states=folder / "states",
        device="cpu",
        dtype="fp32",
        threads=1,
        max_rows=2,
        max_queued=1,
        prefill_chunk_len=16,
    )


@pytest.fixture(scope="module")
def engine(config):
    engine = AsyncEngine(config)
    yield engine
    asyncio.run(engine.aclose())


def running(engine):
    stats = engine.stats()
    return stats.num_running + stats.num_waiting


async def until_idle(engine):
    """Wait for the engine to have nothing to do, by asking it for something short."""
    for _ in range(100):
        if not running(engine):
            return
        await engine.embed(EmbedRequest("base", ("x",)))
    raise AssertionError("the engine goes on")


def endless(engine):
    return engine.open(
        GenerateRequest(
            "base", SamplingParams(max_tokens=100_000, ignore_eos=True), prompt="x", n=2
        )
    )


def test_more_inputs_than_the_queue_holds_wait_for_each_other(engine):
    async def main():
        together = await engine.embed(EmbedRequest("tone", TEXTS))
        alone = [await engine.embed(EmbedRequest("tone", (text,))) for text in TEXTS[::13]]
        assert together.vectors[::13] == tuple(each.vectors[0] for each in alone)
        assert len(together.vectors) == len(TEXTS)
        assert (together.mixture, together.num_tokens % 1) == ("tone", 0)
        assert math.hypot(*together.vectors[0]) == pytest.approx(1, abs=1e-6)

    asyncio.run(main())


def test_a_full_engine_refuses_and_a_deadline_ends_what_is_left(engine):
    async def main():
        stream = await endless(engine)
        waiting = asyncio.create_task(engine.embed(EmbedRequest("base", ("a",))))
        await asyncio.sleep(0)
        while not engine.stats().num_waiting:
            await anext(stream)
        with pytest.raises(QueueFullError):
            await engine.embed(EmbedRequest("base", ("b",)))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(RequestTimeoutError, match=r"within 0\.02 s"):
            await engine.embed(EmbedRequest("base", TEXTS, timeout_s=0.02))
        await stream.aclose()
        await until_idle(engine)

    asyncio.run(main())


def test_who_leaves_takes_all_inputs_along(engine):
    async def main():
        task = asyncio.create_task(engine.embed(EmbedRequest("base", ("x " * 3000,) * 20)))
        while not running(engine):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_idle(engine)
        assert engine.stats().num_free_rows == 2

    asyncio.run(main())


def test_an_owners_limit_is_said_of_the_input_that_is_over_it(engine):
    with pytest.raises(ContextLengthError, match=r"5 tokens here, got 6 in input\[1\]") as caught:
        asyncio.run(engine.embed(EmbedRequest("base", ((1,) * 5, (1,) * 6), max_prompt_len=5)))
    assert caught.value.param == "input"


def test_closing_the_engine_ends_it(config):
    async def main():
        engine = AsyncEngine(config)
        task = asyncio.create_task(engine.embed(EmbedRequest("base", ("x " * 3000,) * 9)))
        await engine.start()
        while not running(engine):
            await asyncio.sleep(0)
        await engine.aclose()
        with pytest.raises(EngineUnavailableError):
            await task

    asyncio.run(main())


def test_inputs_wait_for_the_model_no_longer_than_they_may():
    may_end = threading.Event()

    def load(config):
        may_end.wait(10)
        raise StateFileError("never mind")

    async def main():
        engine = AsyncEngine(EngineConfig(), loader=load)
        try:
            with pytest.raises(RequestTimeoutError, match=r"within 0\.01 s"):
                await engine.embed(EmbedRequest("base", ("x",), timeout_s=0.01))
        finally:
            may_end.set()
            await engine.aclose()

    asyncio.run(main())
