"""Answers that broke off: what LiteLLM is told of them, and which are asked for again."""

import asyncio
import sys
from types import SimpleNamespace

import litellm
import pytest
from fakes import text
from litellm.litellm_core_utils.exception_mapping_utils import _get_response_headers
from litellm.utils import _get_retry_after_from_exception_header

from mrss_provider import text_stream_retries
from mrss_provider.errors import EngineUnavailableError
from mrss_provider.provider.retries import NUM_RETRIES

HI = [{"role": "user", "content": "Hi"}]
GONE = litellm.ServiceUnavailableError("broke off", "mrss", "mrss/tone")
BUSY = litellm.RateLimitError("full", "mrss", "mrss/tone")


class Stream:
    """Chunks, then an error or the end."""

    def __init__(self, *chunks):
        self.chunks = list(chunks)
        self.is_closed = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.chunks:
            raise StopAsyncIteration
        chunk = self.chunks.pop(0)
        if isinstance(chunk, Exception):
            raise chunk
        return chunk

    async def aclose(self):
        self.is_closed = True


class Router:
    """Answers one stream after the other; an error of its own is a request that is refused."""

    def __init__(self, streams):
        self.streams = list(streams)
        self.asked = []

    async def atext_completion(self, **request):
        self.asked.append(request)
        stream = self.streams.pop(0)
        if isinstance(stream, Exception):
            raise stream
        return Wrapper(stream)


class Wrapper:
    """LiteLLM's of texts: it has the stream inside, and cannot be closed."""

    def __init__(self, stream):
        self.completion_stream = stream

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await self.completion_stream.__anext__()


def request(call_type="atext_completion"):
    call = SimpleNamespace(call_type=call_type)
    data = {"model": "mrss/tone", "prompt": "Hi", "stream": True, "litellm_logging_obj": call}
    # What the proxy adds when the first answer is there.
    return data | {"deployment": "tone-a"}


@pytest.fixture
def read(monkeypatch):
    def read(first, *others):
        """Return the chunks, the error that ended them, and the router."""
        router = Router(others)
        proxy = SimpleNamespace(llm_router=router)
        monkeypatch.setitem(sys.modules, "litellm.proxy.proxy_server", proxy)
        monkeypatch.setattr("litellm.proxy.proxy_server", proxy, raising=False)
        chunks = []

        async def main():
            stream = text_stream_retries.async_post_call_streaming_iterator_hook(
                user_api_key_dict=None, response=first, request_data=request()
            )
            async for chunk in stream:
                chunks.append(chunk)  # noqa: PERF401

        try:
            asyncio.run(main())
        except Exception as exc:
            return chunks, exc, router
        return chunks, None, router

    return read


def test_one_that_ends_well_is_passed_on(read):
    first = Stream("a", "b")
    assert read(first)[:2] == (["a", "b"], None)


def test_one_that_broke_off_unbegun_is_asked_for_again(read):
    first = Stream(GONE)
    chunks, error, router = read(first, Stream("a", "b"))
    assert (chunks, error) == (["a", "b"], None)
    (asked,) = router.asked
    assert (asked["model"], asked["prompt"], asked["stream"]) == ("mrss/tone", "Hi", True)
    assert "deployment" not in asked
    assert first.is_closed


def test_one_that_had_begun_is_not(read):
    chunks, error, router = read(Stream("a", GONE))
    assert (chunks, error, router.asked) == (["a"], GONE, [])


def test_one_that_begins_later_and_breaks_off_is_not_asked_for_once_more(read):
    second = Stream("a", GONE)
    chunks, error, router = read(Stream(GONE), second)
    assert (chunks, error, len(router.asked)) == (["a"], GONE, 1)
    assert second.is_closed


def test_what_the_request_brought_on_itself_is_no_reason(read):
    chunks, error, router = read(Stream(BUSY))
    assert (chunks, error, router.asked) == ([], BUSY, [])


def test_the_last_error_is_told_after_so_many_times(read):
    chunks, error, router = read(Stream(GONE), *(Stream(GONE) for _ in range(NUM_RETRIES)))
    assert (chunks, error, len(router.asked)) == ([], GONE, NUM_RETRIES)


def test_a_refusal_of_the_router_is_the_answer(read):
    chunks, error, _ = read(Stream(GONE), BUSY)
    assert (chunks, error) == ([], BUSY)


def test_who_hangs_up_closes_the_stream_that_runs(read):
    second = Stream("a", "b")

    async def main():
        stream = text_stream_retries.async_post_call_streaming_iterator_hook(
            user_api_key_dict=None, response=second, request_data=request()
        )
        assert await anext(stream) == "a"
        await stream.aclose()

    asyncio.run(main())
    assert second.is_closed


@pytest.mark.parametrize("call_type", ["acompletion", "aresponses", None])
def test_other_streams_are_left_alone(call_type):
    first = Stream(GONE)
    data = request(call_type) if call_type else {}
    found = text_stream_retries.async_post_call_streaming_iterator_hook(
        user_api_key_dict=None, response=first, request_data=data
    )
    assert found is first


def cooldown_of(error):
    """What LiteLLM's router makes of an error's headers; None or below 0 is its own setting."""
    return _get_retry_after_from_exception_header(_get_response_headers(error))


@pytest.mark.parametrize("is_stream", [True, False], ids=["streamed", "whole"])
def test_an_answer_that_broke_off_cools_no_deployment_down(provider, backend, is_stream):
    """LiteLLM books it late, and then on the deployment where the request is by now."""
    call = {"model": "base", "messages": HI, "optional_params": {}}

    async def main():
        if not is_stream:
            await provider.acompletion(**call)
        async for _ in provider.astreaming(**call):
            pass

    backend.script = [text("a"), EngineUnavailableError("broke off")]
    with pytest.raises(litellm.ServiceUnavailableError, match="broke off") as broken:
        asyncio.run(main())
    assert cooldown_of(broken.value) == 0
    backend.open_error = EngineUnavailableError("no engine answers")
    with pytest.raises(litellm.ServiceUnavailableError, match="no engine") as refused:
        asyncio.run(main())
    assert cooldown_of(refused.value) == -1
