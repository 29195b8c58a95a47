"""Streams through LiteLLM's SDK: what arrives, in which order, and what ends them."""

import asyncio
import threading
import time

import litellm
import pytest
from fakes import FINGERPRINT, PROMPT_TOKENS, ROWS, Wait, text

from mrss_provider.backend import Delta, TokenLogprob, Usage
from mrss_provider.errors import ContextLengthError, EngineError, QueueFullError
from mrss_provider.provider import answers

HI = [{"role": "user", "content": "Hi"}]
WAIT_S = 5.0


async def astream(**kwargs):
    call = {"model": "mrss/knowledge+tone", "messages": HI, "stream": True, **kwargs}
    return await litellm.acompletion(**call)


def stream_all(**kwargs):
    async def main():
        return [chunk async for chunk in await astream(**kwargs)]

    return asyncio.run(main())


def contents(chunks, index=0):
    return [
        choice.delta.content
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index and choice.delta.content
    ]


def finish_reasons(chunks):
    return {
        choice.index: choice.finish_reason
        for chunk in chunks
        for choice in chunk.choices
        if choice.finish_reason
    }


@pytest.fixture(params=["sync", "async"])
def read(request):
    """Read a whole stream, in either of the SDK's ways."""
    if request.param == "async":
        return stream_all
    call = {"model": "mrss/knowledge+tone", "messages": HI, "stream": True}
    return lambda **kwargs: list(litellm.completion(**{**call, **kwargs}))


@pytest.mark.usefixtures("provider")
def test_stream_says_what_the_whole_answer_says(read):
    chunks = read()
    assert "".join(contents(chunks)) == "Hello, world"
    assert finish_reasons(chunks) == {0: "stop"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert len({chunk.created for chunk in chunks}) == 1
    assert {chunk.model for chunk in chunks} == {"knowledge+tone"}
    first = chunks[0]
    assert first.choices[0].delta.role == "assistant"
    assert first.system_fingerprint == FINGERPRINT
    mrss = {"mixture": "knowledge+tone", "rows": ROWS}
    assert first.provider_specific_fields == {"mrss": mrss}


@pytest.mark.usefixtures("provider")
def test_stream_usage_is_exact_and_only_on_request(read, backend):
    backend.script = [text("a"), Delta(num_tokens=4, finish_reason="length", usage=Usage(9, 5, 6))]
    (last,) = [chunk for chunk in read(stream_options={"include_usage": True}) if "usage" in chunk]
    usage = last.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 5, 14)
    assert usage.prompt_tokens_details.cached_tokens == 6
    assert not [chunk for chunk in read() if getattr(chunk, "usage", None)]


@pytest.fixture
def exact(monkeypatch):
    """Let scripts be followed to the letter: nothing repeated for `n`, no end added."""
    monkeypatch.setattr("fakes._complete", lambda script, n: list(script))


@pytest.mark.usefixtures("provider", "exact")
def test_every_choice_of_a_stream_begins_with_a_role_and_finishes(read, backend):
    backend.script = [
        text("a", 0),
        text("b", 1),
        Delta(index=0, finish_reason="stop"),
        text("c", 2),
        text("d", 1),
        Delta(index=2, finish_reason="stop"),
        Delta(index=1, finish_reason="length"),
        Delta(usage=Usage(7, 4)),
    ]
    chunks = read(n=3, stream_options={"include_usage": True})
    assert ["".join(contents(chunks, index)) for index in range(3)] == ["a", "bd", "c"]
    roles = [c.index for chunk in chunks for c in chunk.choices if c.delta.role]
    assert sorted(roles) == [0, 1, 2]
    assert finish_reasons(chunks) == {0: "stop", 1: "length", 2: "stop"}
    assert chunks[-1].usage.completion_tokens == 4


@pytest.mark.usefixtures("provider")
def test_empty_answer_is_a_role_and_a_finish(read, backend):
    backend.script = [Delta(num_tokens=1, finish_reason="stop")]
    chunks = read()
    assert contents(chunks) == []
    assert [c.choices[0].delta.role for c in chunks if c.choices[0].delta.role] == ["assistant"]
    assert finish_reasons(chunks) == {0: "stop"}


@pytest.mark.usefixtures("provider")
def test_stream_logprobs_are_all_there_whatever_was_joined(read, backend):
    tokens = [TokenLogprob(i, bytes([97 + i]), -float(i)) for i in range(5)]
    # The third token has no text of its own: half a character, say.
    texts = ["a", "b", "", "cd", "e"]
    backend.script = [
        Delta(text=piece, num_tokens=1, logprobs=(token,))
        for piece, token in zip(texts, tokens, strict=True)
    ]
    chunks = read(logprobs=True)
    read_back = [
        entry["token"]
        for chunk in chunks
        if getattr(chunk.choices[0], "logprobs", None)
        for entry in chunk.choices[0].logprobs.model_dump()["content"]
    ]
    assert read_back == ["a", "b", "c", "d", "e"]
    assert "".join(contents(chunks)) == "abcde"


@pytest.mark.usefixtures("provider")
def test_model_that_repeats_itself_is_not_cut_off(backend):
    # LiteLLM ends a stream of its other chunk type at 100 equal chunks.
    waits = [Wait() for _ in range(120)]
    backend.script = [step for wait in waits for step in (text("same "), wait)]

    async def main():
        chunks = []
        async for chunk in await astream():
            chunks.append(chunk)
            if len(chunks) <= len(waits):
                waits[len(chunks) - 1].go.set()
        return chunks

    assert contents(asyncio.run(main())) == ["same "] * 120


@pytest.mark.usefixtures("provider")
def test_what_came_together_leaves_together(backend):
    wait = Wait()
    backend.script = [text("a"), wait, *(text(str(i % 10)) for i in range(300))]

    async def main():
        stream = await astream()
        first = await anext(stream)
        wait.go.set()
        # Everything is here before the reader comes back.
        await asyncio.to_thread(backend.streams[0].ended.wait, WAIT_S)
        return [first, *[chunk async for chunk in stream]]

    pieces = contents(asyncio.run(main()))
    assert pieces[0] == "a"
    assert "".join(pieces[1:]) == "".join(str(i % 10) for i in range(300))
    assert len(pieces) == 2


@pytest.mark.usefixtures("provider")
def test_slow_reader_stops_the_pump_and_loses_nothing(backend, monkeypatch):
    monkeypatch.setattr(answers, "MAX_WAITING", 4)
    wait, full = Wait(), Wait()
    full.go.set()
    backend.script = [text("x"), wait, *[text("y")] * 4, full, *[text("z")] * 20]

    async def main():
        stream = await astream(timeout=0.05)
        await anext(stream)
        wait.go.set()
        # Nobody reads: the pump stops at four, and that is nobody's timeout.
        await asyncio.sleep(0.15)
        assert not full.reached.is_set()
        return [chunk async for chunk in stream]

    assert "".join(contents(asyncio.run(main()))) == "y" * 4 + "z" * 20


@pytest.mark.parametrize("error", [QueueFullError("full"), ContextLengthError("too long")])
def test_refusal_is_raised_before_the_stream_is_returned(provider, backend, error):
    backend.open_error = error
    with pytest.raises((litellm.RateLimitError, litellm.ContextWindowExceededError)):
        provider.astreaming(model="base", messages=HI, optional_params={})


@pytest.mark.usefixtures("provider")
def test_refused_stream_is_the_mapped_error_in_both_sdks(read, backend):
    backend.open_error = ContextLengthError("9 tokens are too many")
    with pytest.raises(litellm.ContextWindowExceededError, match="9 tokens are too many"):
        read()


def test_slow_admission_does_not_hold_the_pool_thread(provider, backend, monkeypatch):
    monkeypatch.setattr("mrss_provider.provider.engines.FIRST_ADMISSION_WAIT_S", 0.02)
    may_open = threading.Event()
    plain_open = backend.open

    async def slow_open(request):
        await asyncio.to_thread(may_open.wait)
        return await plain_open(request)

    backend.open = slow_open
    started = time.monotonic()
    stream = provider.astreaming(model="base", messages=HI, optional_params={})
    assert time.monotonic() - started < WAIT_S
    backend.open_error = QueueFullError("full")
    may_open.set()

    async def main():
        with pytest.raises(litellm.RateLimitError):
            await anext(stream)

    asyncio.run(main())


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize(
    ("spoken", "when"),
    [([], "before the first token"), ([text("a")], "between two tokens")],
)
def test_silence_is_a_timeout_and_aborts(read, backend, spoken, when):
    backend.script = [*spoken, Wait()]
    with pytest.raises(litellm.Timeout, match=when):
        read(timeout=0.05)
    assert backend.streams[0].ended.wait(WAIT_S)
    assert backend.streams[0].aborted


@pytest.mark.usefixtures("provider")
def test_long_stream_is_no_timeout_while_it_speaks(backend):
    waits = [Wait() for _ in range(6)]
    backend.script = [step for wait in waits for step in (text("a"), wait)]

    async def main():
        chunks = []
        stream = await astream(timeout=0.3)
        async for chunk in stream:
            chunks.append(chunk)
            if len(chunks) <= len(waits):
                await asyncio.sleep(0.1)
                waits[len(chunks) - 1].go.set()
        return chunks

    assert "".join(contents(asyncio.run(main()))) == "a" * 6


@pytest.mark.usefixtures("provider")
def test_error_in_the_middle_comes_after_the_text_and_is_mapped(read, backend):
    backend.script = [text("a"), EngineError("internal error 12ab")]
    with pytest.raises(litellm.exceptions.MidStreamFallbackError) as caught:
        read()
    assert "internal error 12ab" in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.usefixtures("provider", "exact")
def test_stream_that_stops_short_is_an_error_and_not_a_stop(read, backend):
    backend.script = [text("a")]
    with pytest.raises(litellm.exceptions.MidStreamFallbackError, match="before the answer's end"):
        read()


async def leave_by_cancelling(stream, wait):
    task = asyncio.ensure_future(_read_on(stream))
    await asyncio.to_thread(wait.reached.wait, WAIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_by_closing(stream, wait):
    await anext(stream)
    await stream.aclose()


async def leave_without_a_word(stream, wait):
    await anext(stream)


async def leave_before_the_first_chunk(stream, wait):
    await asyncio.to_thread(wait.reached.wait, WAIT_S)
    await stream.aclose()


async def _read_on(stream):
    async for _ in stream:
        pass


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize(
    "leave",
    [
        leave_by_cancelling,
        leave_by_closing,
        leave_without_a_word,
        leave_before_the_first_chunk,
    ],
)
def test_reader_who_leaves_aborts_the_answer(backend, leave):
    wait = Wait()
    backend.script = [text("a"), wait]

    async def main():
        await leave(await astream(), wait)

    asyncio.run(main())
    assert backend.streams[0].ended.wait(WAIT_S)
    assert backend.streams[0].aborted


@pytest.mark.usefixtures("provider")
def test_sync_reader_who_leaves_aborts_the_answer(backend):
    backend.script = [text("a"), Wait()]
    for _ in litellm.completion("mrss/base", messages=HI, stream=True):
        break
    assert backend.streams[0].ended.wait(WAIT_S)
    assert backend.streams[0].aborted


@pytest.mark.usefixtures("provider")
def test_streamed_completion_takes_its_prompt_raw(backend):
    stream = litellm.text_completion(
        model="mrss/base",
        prompt="Once",
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert backend.requests[0].prompt == "Once"
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.text or "" for choice in choices) == "Hello, world"
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].usage.prompt_tokens == PROMPT_TOKENS
    assert all(chunk.id.startswith("cmpl-") for chunk in chunks)


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("params", [{"prompt": ["a", "b"]}, {"n": 2}, {"logprobs": 1}])
def test_what_litellm_drops_from_streamed_completions_is_refused(backend, params):
    with pytest.raises(litellm.BadRequestError, match="stream"):
        litellm.text_completion(**{"model": "mrss/base", "prompt": "a", "stream": True, **params})
    assert not backend.requests


@pytest.mark.usefixtures("provider")
def test_one_provider_serves_many_event_loops(backend):
    for _ in range(3):
        assert "".join(contents(stream_all())) == "Hello, world"
    threads = [threading.Thread(target=stream_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(stream.ended.is_set() and not stream.aborted for stream in backend.streams)
    assert len(backend.streams) == 7


def test_another_process_gets_another_thread(provider, monkeypatch):
    here = provider._process
    monkeypatch.setattr("os.getpid", lambda: here.io.pid + 1)
    child = provider._process
    assert child is not here
    # What the parent holds is out of reach, and left alone.
    here.io.stop()
    assert child.engines is not here.engines
