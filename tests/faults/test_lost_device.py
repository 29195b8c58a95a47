"""A device that takes no more work: its engine says so; its server leaves, to be started again."""

import asyncio
from concurrent.futures import Future
from dataclasses import replace

import pytest
from admin_client import write_folders
from fakes import FakeBackend
from test_async_engine_on_tiny_model import ask, texts_of

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.async_engine.model_slot import Plan
from mrss_provider.engine import engine as engine_module
from mrss_provider.errors import EngineUnavailableError
from mrss_provider.server.app import Losable, create_app
from mrss_provider.server.lifecycle import Lifecycle

LONG = ask("knowledge+tone", max_tokens=150)


def test_every_request_ends_with_the_reason_and_so_does_the_next(tmp_path, monkeypatch):
    async def main():
        async with AsyncEngine(replace(write_folders(tmp_path), max_rows=8)) as engine:
            lost = asyncio.create_task(engine.until_lost())
            await texts_of(engine, ask("tone", max_tokens=2))
            streams = [await engine.open(LONG) for _ in range(2)]
            await anext(streams[0])
            assert not lost.done()
            runner = engine._slot.loaded.engine._runner
            monkeypatch.setattr(engine_module, "takes_work", lambda device: False)
            monkeypatch.setattr(runner, "launch", fail)
            ends = await asyncio.gather(*map(read_on, streams), return_exceptions=True)
            with pytest.raises(EngineUnavailableError) as refused:
                await engine.open(LONG)
            with pytest.raises(EngineUnavailableError):
                await engine.models()
            # Nor another model: it would be loaded on the same device.
            slot = engine._slot
            with pytest.raises(EngineUnavailableError) as kept:
                await slot.replace(Plan(slot.config), drain_s=0)
            return [*ends, refused.value, kept.value, await lost]

    def fail(batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async def read_on(stream):
        async for _ in stream:
            pass

    for error in asyncio.run(asyncio.wait_for(main(), 60)):
        assert type(error) is EngineUnavailableError
        assert "takes no more work" in str(error)
        assert "illegal memory access" in str(error)


class Losing(FakeBackend):
    """Is lost when a test says so."""

    def __init__(self):
        super().__init__()
        self.lost = Future()

    async def until_lost(self):
        return await asyncio.wrap_future(self.lost)


def test_its_server_refuses_and_leaves():
    from starlette.testclient import TestClient

    backend, lifecycle = Losing(), Lifecycle()
    left = Future()
    lifecycle.on_end = lambda: left.set_result(True)
    app = create_app(backend, lifecycle=lifecycle)
    with TestClient(app, base_url="http://127.0.0.1:9000") as client:
        assert client.get("/ready").status_code == 200
        backend.lost.set_result(EngineUnavailableError("the device failed"))
        assert left.result(10)
        refused = client.get("/ready")
        assert refused.status_code == 503
        assert "the device failed" in refused.text
        assert client.get("/health").status_code == 200
    # What the process ends with.
    assert str(lifecycle.failure) == "the device failed"


def test_the_engine_is_one_that_can_be_lost():
    assert isinstance(AsyncEngine(), Losable)
