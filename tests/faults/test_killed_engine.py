"""SIGKILL of an engine under load: clients get a clean error, the next request starts another."""

import asyncio
import os
import signal

import pytest
from engine_place import ENDLESS, ask, own_place, read_on

from mrss_provider.errors import EngineUnavailableError

NUM_CLIENTS = 24


@pytest.fixture
def place():
    with own_place() as found:
        yield found


async def busy(engine, killed):
    """Ask one short answer after the other; return them, up to the first error after the kill."""
    answers = []
    while True:
        try:
            answers.append(await ask(engine))
        except EngineUnavailableError:
            return answers
        if killed.is_set():
            return answers


def test_under_load_clients_get_a_clean_error_and_the_next_request_is_served(place):
    async def main():
        engines = [place.engine() for _ in range(3)]
        streams = [await engines[i % 3].open(ENDLESS) for i in range(NUM_CLIENTS)]
        begun = [await anext(stream) for stream in streams]
        killed = asyncio.Event()
        loads = [asyncio.create_task(busy(engines[i % 3], killed)) for i in range(6)]
        await asyncio.sleep(0.3)
        os.kill(place.pids[0], signal.SIGKILL)
        killed.set()
        ends = await asyncio.gather(*map(read_on, streams), return_exceptions=True)
        short = await asyncio.gather(*loads)
        again = await asyncio.gather(*(ask(engines[i % 3]) for i in range(NUM_CLIENTS)))
        for engine in engines:
            await engine.aclose()
        return begun, ends, short, again

    begun, ends, short, again = asyncio.run(main())
    assert all(delta.text for delta in begun)
    assert [type(end) for end in ends] == [EngineUnavailableError] * NUM_CLIENTS
    assert all("broke off" in str(end) for end in ends)
    assert all(short), "there was a load"
    assert {text for answers in short for text in answers} == {"Hello, world"}
    assert again == ["Hello, world"] * NUM_CLIENTS
    assert len(place.pids) == 2, "all of them share the new engine"
