"""Two thousand calls of all kinds leave nothing behind."""

import asyncio
import gc

import litellm
import psutil
import pytest
from fakes import HELLO, Wait, text

from mrss_provider.provider.answers import RunningAnswer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROUND = 500
MAX_GROWTH_BYTES = 5e6 * ROUND / 1000


async def whole():
    await litellm.acompletion("mrss/base", messages=[{"role": "user", "content": "Hi"}])


async def stream(prompt="Hi"):
    return await litellm.acompletion(
        "mrss/base", messages=[{"role": "user", "content": prompt}], stream=True
    )


async def streamed():
    async for _ in await stream():
        pass


async def left():
    chunks = await stream("wait")
    await anext(chunks)
    await chunks.aclose()


async def cancelled():
    async def read():
        async for _ in await stream("wait"):
            reading.set()

    reading = asyncio.Event()
    task = asyncio.create_task(read())
    await reading.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def rounds(backend, count):
    """Return the resident bytes after each round of calls."""
    kinds = [whole, streamed, left, cancelled]
    sizes = []
    for _ in range(count):
        for start in range(0, ROUND, 20):
            await asyncio.gather(*(kinds[i % 4]() for i in range(start, start + 20)))
        assert all(stream.ended.wait(5) for stream in backend.streams)
        backend.requests.clear()
        backend.streams.clear()
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss)
    return sizes


@pytest.mark.usefixtures("provider")
def test_memory_does_not_grow_with_calls(backend):
    backend.script = lambda request: (
        [text("a"), Wait(), text("b")] if request.messages[0].content == "wait" else HELLO
    )
    warm, *sizes = asyncio.run(rounds(backend, 5))
    assert (sizes[-1] - warm) / len(sizes) < MAX_GROWTH_BYTES
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is RunningAnswer]
