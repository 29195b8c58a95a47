"""Several tasks, or threads, that read one stream."""

import asyncio
import threading

import pytest
from fakes import Wait, text
from test_streams import HI, WAIT_S, contents, finish_reasons


@pytest.mark.parametrize("is_async", [True, False])
def test_two_who_read_one_stream_both_come_to_its_end(provider, backend, is_async):
    wait = Wait()
    backend.script = [text("a"), wait, text("b")]
    chunks = []

    async def read(stream):
        chunks.extend([chunk async for chunk in stream])

    async def main(stream):
        reading = asyncio.gather(read(stream), read(stream))
        await asyncio.to_thread(wait.reached.wait)
        await asyncio.sleep(0)
        wait.go.set()
        await asyncio.wait_for(reading, WAIT_S)

    stream = provider.astreaming(model="base", messages=HI, optional_params={})
    if is_async:
        asyncio.run(main(stream))
    else:
        threads = [threading.Thread(target=lambda: chunks.extend(stream)) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait.reached.wait()
        wait.go.set()
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)
    assert sorted(contents(chunks)) == ["a", "b"]
    assert finish_reasons(chunks) == {0: "stop"}
    assert len(chunks) == 4
