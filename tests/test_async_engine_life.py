"""AsyncEngine's life over a scripted engine: loading, several loops, failures, closing."""

import asyncio
import threading

import pytest
from script_engine import IDS, TOKENS, WORLD, Library, ScriptEngine, ask, collect, engine_of, joined

from mrss_provider.async_engine import model_slot
from mrss_provider.async_engine.card import Card
from mrss_provider.async_engine.loading import Loaded
from mrss_provider.errors import (
    EngineError,
    EngineUnavailableError,
    ModelFileError,
    RequestTimeoutError,
)


def test_a_failing_step_ends_what_runs_and_not_the_engine(caplog):
    engine = ScriptEngine(IDS("Hello"))

    async def main():
        async with engine_of(engine) as front:
            engine.step_error = ZeroDivisionError("oops")
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                await collect(front, ask())
            return await collect(front, ask())

    assert joined(asyncio.run(main())) == "Hello"
    assert "oops" in caplog.text


def test_a_thread_that_fails_loses_the_engine_and_leaves_nobody_waiting(caplog):
    class Fragile(ScriptEngine):
        """A device that is lost may be met first where an answer is dropped."""

        def abort(self, request_id, index=None):
            raise RuntimeError("an illegal memory access")

    async def main():
        front = engine_of(Fragile(lambda request, _: IDS("Hello") * 10**6))
        await front.start()
        dropped, other = await front.open(ask()), await front.open(ask())
        await dropped.aclose()
        with pytest.raises(EngineUnavailableError, match="illegal memory access"):
            async for _ in other:
                pass
        assert isinstance(await front.until_lost(), EngineUnavailableError)
        with pytest.raises(EngineUnavailableError, match="started again"):
            await front.open(ask())
        await front.aclose()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert "the engine's thread failed" in caplog.text


def test_several_loops_share_an_engine():
    front = engine_of(IDS("Hello", " world") * 20)
    results = {}

    def work(name):
        async def main():
            return await asyncio.gather(*(collect(front, ask(name * 3, n=2)) for _ in range(5)))

        results[name] = asyncio.run(main())

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(front.aclose())
    for name in "abc":
        for deltas in results[name]:
            assert joined(deltas, 1) == "Hello world" * 20


def test_a_loop_that_closes_takes_only_its_own_requests_along():
    engine = ScriptEngine(lambda r, _: IDS("Hello") * (10**6 if r.n == 1 else 3))
    front = engine_of(engine)

    async def leave():
        await front.open(ask())

    asyncio.run(leave())
    engine.wait_aborted(("r0", None))
    assert joined(asyncio.run(collect(front, ask(n=2)))) == "Hello" * 3
    asyncio.run(front.aclose())


def test_closing_the_engine_ends_its_streams_and_refuses_more():
    async def main():
        front = engine_of(IDS("Hello") * 10**6)
        await front.start()
        stream = await front.open(ask())
        await anext(stream)
        await front.aclose()
        with pytest.raises(EngineUnavailableError, match="closed"):
            async for _ in stream:
                pass
        for call in (front.open(ask()), front.start(), front.models()):
            with pytest.raises(EngineUnavailableError, match="closed"):
                await call
        await front.aclose()

    asyncio.run(main())
    assert not any(thread.name == "mrss-engine" for thread in threading.enumerate())


def test_an_engine_that_was_never_started_closes():
    asyncio.run(engine_of([]).aclose())


def test_loading_begins_with_the_first_use_and_happens_once():
    engine = ScriptEngine(IDS("Hello"))
    loads = []

    def load(config):
        loads.append(config)
        return Loaded(engine, Library(), TOKENS, WORLD, Card())

    async def main():
        front = engine_of(engine, loader=load)
        assert loads == []
        await asyncio.gather(front.models(), front.start(), collect(front, ask()))
        await front.aclose()

    asyncio.run(main())
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("failure", "raised", "words"),
    [
        (ModelFileError("no weights in it"), ModelFileError, "no weights in it"),
        (ZeroDivisionError("oops"), EngineError, "could not be loaded"),
    ],
)
def test_a_failed_load_is_told_to_everybody(failure, raised, words):
    def load(config):
        raise failure

    async def main():
        front = engine_of([], loader=load)
        for call in (front.start, front.models, lambda: front.open(ask())):
            with pytest.raises(raised, match=words):
                await call()
        await front.aclose()

    asyncio.run(main())


def test_the_deadline_counts_while_the_model_loads():
    go = threading.Event()

    def load(config):
        go.wait()
        return Loaded(ScriptEngine(IDS("Hello")), Library(), TOKENS, WORLD, Card())

    async def main():
        front = engine_of([], loader=load)
        with pytest.raises(RequestTimeoutError, match="did not take"):
            await front.open(ask(timeout_s=0.05))
        go.set()
        deltas = await collect(front, ask())
        await front.aclose()
        return deltas

    assert joined(asyncio.run(main())) == "Hello"


def test_closing_does_not_wait_for_a_model_that_loads():
    begun, go = threading.Event(), threading.Event()
    front = None

    def load(config):
        begun.set()
        assert go.wait(30)
        return Loaded(ScriptEngine([]), Library(), TOKENS, WORLD, Card())

    async def main():
        starting = asyncio.create_task(front.start())
        await asyncio.to_thread(begun.wait)
        await front.aclose()
        with pytest.raises(EngineUnavailableError, match="closed"):
            await starting

    front = engine_of([], loader=load)
    asyncio.run(main())
    # Nor did the loop's end wait: the thread still loads, and keeps nothing of it.
    assert not go.is_set()
    (thread,) = [t for t in threading.enumerate() if t.name == "mrss-engine"]
    go.set()
    thread.join(30)
    assert front._slot.loaded is None


def test_closing_waits_a_bounded_time_for_a_step(monkeypatch):
    monkeypatch.setattr(model_slot, "EXIT_WAIT_S", 0.01)
    gate = threading.Semaphore(0)

    async def main():
        front = engine_of(ScriptEngine(IDS("Hello"), gate=gate))
        await front.start()
        await front.open(ask())
        await front.aclose()

    asyncio.run(main())
    gate.release(10)


def test_who_is_cancelled_during_admission_leaves_nothing_behind():
    gate = threading.Semaphore(0)
    engine = ScriptEngine(IDS("Hello") * 100, gate=gate)

    async def main():
        front = engine_of(engine)
        await front.start()
        first = await front.open(ask())
        # The engine's thread is inside a step now, so the next admission has to wait.
        second = asyncio.create_task(front.open(ask()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.release(10**4)
        await first.aclose()
        await asyncio.to_thread(engine.wait_aborted, ("r1", None))
        await front.aclose()

    asyncio.run(main())
