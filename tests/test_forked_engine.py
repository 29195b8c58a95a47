"""An AsyncEngine in a process that was forked from its own, without its threads."""

import asyncio

import pytest
from script_engine import IDS, ask, collect, engine_of, joined

from mrss_provider.errors import EngineUnavailableError


def test_an_engine_of_the_process_before_a_fork_refuses_at_once(monkeypatch):
    front = engine_of(IDS("Hello"))

    async def use():
        removing = front.admin.remove_model(0.0)
        for asked in (front.start(), front.models(), front.open(ask()), removing):
            with pytest.raises(EngineUnavailableError, match=r"forked .* make an AsyncEngine here"):
                await asked
        await front.aclose()

    assert joined(asyncio.run(collect(front, ask()))) == "Hello"
    with monkeypatch.context() as child:
        child.setattr("os.getpid", lambda: 1)
        asyncio.run(asyncio.wait_for(use(), 2))
    # It is the parent's, and goes on there.
    assert joined(asyncio.run(collect(front, ask()))) == "Hello"
    asyncio.run(front.aclose())


def test_an_engine_that_a_fork_found_unloaded_is_loaded_there(monkeypatch):
    front = engine_of(IDS("Hello"))
    monkeypatch.setattr("os.getpid", lambda: 1)
    assert joined(asyncio.run(collect(front, ask()))) == "Hello"
    asyncio.run(front.aclose())
