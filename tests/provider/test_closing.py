"""A provider that is closed while calls run: they end as if the engine had gone."""

import asyncio
import threading

import litellm
import pytest
from fakes import Wait, text
from test_streams import HI, WAIT_S

CLOSED = "the provider was closed before the answer's end"


def test_a_sync_call_ends_with_a_503(provider, backend):
    backend.script = [text("a"), wait := Wait()]
    met = []

    def ask():
        with pytest.raises(litellm.ServiceUnavailableError, match=CLOSED) as caught:
            litellm.completion("mrss/base", messages=HI, num_retries=0)
        met.append(caught.value.status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    assert wait.reached.wait(WAIT_S)
    provider.close()
    thread.join(WAIT_S)
    assert met == [503]
    assert backend.streams[0].aborted


def test_an_async_call_ends_with_a_503_and_not_as_cancelled(provider, backend):
    backend.script = [text("a"), wait := Wait()]

    async def main():
        asking = asyncio.create_task(litellm.acompletion("mrss/base", messages=HI, num_retries=0))
        await asyncio.to_thread(wait.reached.wait, WAIT_S)
        await asyncio.to_thread(provider.close)
        with pytest.raises(litellm.ServiceUnavailableError, match=CLOSED):
            await asking

    asyncio.run(asyncio.wait_for(main(), WAIT_S))


def test_an_embedding_under_way_ends_with_a_503(provider, backend):
    reached = threading.Event()

    async def embed(request):
        reached.set()
        await asyncio.Event().wait()

    backend.embed = embed

    async def main():
        asking = asyncio.create_task(litellm.aembedding("mrss/base", input=["Hi"], max_retries=0))
        await asyncio.to_thread(reached.wait, WAIT_S)
        await asyncio.to_thread(provider.close)
        with pytest.raises(litellm.ServiceUnavailableError, match=CLOSED):
            await asking

    asyncio.run(asyncio.wait_for(main(), WAIT_S))


@pytest.mark.usefixtures("provider")
def test_who_cancels_an_async_call_gets_what_asyncio_says(backend):
    backend.script = [text("a"), wait := Wait()]

    async def main():
        asking = asyncio.create_task(litellm.acompletion("mrss/base", messages=HI))
        await asyncio.to_thread(wait.reached.wait, WAIT_S)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(asyncio.wait_for(main(), WAIT_S))
    assert backend.streams[0].ended.wait(WAIT_S)
