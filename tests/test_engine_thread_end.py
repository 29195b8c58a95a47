"""What runs when an engine ends: its states are kept, and who saves a session need not wait."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
from fake_model import FakeModel, fake_state, mixture, request
from script_engine import IDS, ScriptEngine, ask, engine_of
from test_device_runner import host_engine

from mrss_provider.async_engine.thread import EngineThread
from mrss_provider.engine.continuation import Capture
from mrss_provider.engine.request import TokenOutput
from mrss_provider.errors import EngineUnavailableError, MRSSError


class Noted(ScriptEngine):
    """An engine whose requests must be dropped before it closes, the newest first."""

    is_lost = False

    def close(self) -> None:
        self.left = list(self.running)
        super().close()

    def step(self):  # type: ignore[no-untyped-def]
        if self.is_lost:
            raise EngineUnavailableError("the device failed")
        return super().step()


def test_what_runs_is_dropped_before_the_engine_closes() -> None:
    engine = Noted(lambda request, _: IDS("Hello") * 10**6)

    async def main() -> None:
        front = engine_of(engine)
        streams = [await front.open(ask()) for _ in range(3)]
        await anext(streams[0])
        await front.aclose()
        for stream in streams:
            with pytest.raises(EngineUnavailableError, match="closed"):
                async for _ in stream:
                    pass

    asyncio.run(main())
    assert engine.aborted == [(request.id, None) for request in reversed(engine.added)]
    assert engine.left == []


def test_nothing_is_asked_of_a_lost_device() -> None:
    engine = Noted(lambda request, _: IDS("Hello") * 10**6)

    async def main() -> None:
        front = engine_of(engine)
        stream = await front.open(ask())
        await anext(stream)
        engine.is_lost = True
        with pytest.raises(EngineUnavailableError, match="the device failed"):
            async for _ in stream:
                pass
        await front.aclose()

    asyncio.run(main())
    assert engine.aborted == []


def test_a_device_whose_loss_is_met_when_an_answer_is_dropped_is_asked_once() -> None:
    class Dead(Noted):
        def step(self):  # type: ignore[no-untyped-def]
            if self.is_lost:
                raise RuntimeError("a defect")
            return super().step()

        def abort(self, request_id, index=None):  # type: ignore[no-untyped-def]
            super().abort(request_id, index)
            raise RuntimeError("the device failed")

    engine = Dead(lambda request, _: IDS("Hello") * 10**6)

    async def main() -> None:
        front = engine_of(engine)
        stream = await front.open(ask())
        await anext(stream)
        engine.is_lost = True
        with pytest.raises(EngineUnavailableError, match="the device failed"):
            async for _ in stream:
                pass
        await front.aclose()

    asyncio.run(main())
    assert len(engine.aborted) == 1


class Outputs:
    """A sink that tells when a few outputs have come."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.have_come = threading.Event()
        self.count = 0

    def on_output(self, output: TokenOutput) -> None:
        self.count += 1
        if self.count == 40:
            self.have_come.set()

    def on_failure(self, error: MRSSError) -> None:
        pass


def test_who_saves_the_session_of_an_answer_that_runs_is_not_kept_waiting() -> None:
    """The answer may have ended for its reader, by a stop string that the engine knows not of."""
    capture = Capture()
    prompt = [3, 1, 4, 1, 5] * 9
    wanted = request("x", prompt, mixture(fake_state("amber")), max_tokens=900)

    async def main() -> None:
        thread = EngineThread(lambda: host_engine(FakeModel()))
        thread.start()
        sink = Outputs()
        thread.add(replace(wanted, capture=capture), sink)
        await asyncio.to_thread(sink.have_come.wait, 30)
        thread.stop()
        await asyncio.to_thread(thread.join, 30)

    asyncio.run(main())
    assert capture.ended.done()
    assert capture.states[-1].num_read == len(capture.answer) - 1 >= 39


def test_closing_ends_the_answers_that_a_change_of_the_model_waits_for() -> None:
    engine = Noted(lambda request, _: IDS("Hello") * 10**6)

    async def main() -> None:
        front = engine_of(engine)
        stream = await front.open(ask(timeout_s=None))
        change = asyncio.create_task(front.admin.remove_model(drain_s=600))
        while front._slot.loaded is not None:
            await anext(stream)
        await asyncio.wait_for(front.aclose(), 10)
        with pytest.raises(EngineUnavailableError, match="closed"):
            async for _ in stream:
                pass
        await asyncio.wait_for(change, 10)

    asyncio.run(asyncio.wait_for(main(), 30))
    assert engine.left == []
