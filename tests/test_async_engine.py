"""AsyncEngine over an engine that follows a script: text, stops, logprobs, defaults, refusals."""

import asyncio
import gc
import threading
import time
import weakref
from dataclasses import replace

import pytest
from script_engine import (
    IDS,
    TOKENS,
    WORLD,
    Library,
    ScriptEngine,
    answers,
    ask,
    collect,
    engine_of,
    joined,
    reasons,
)

from mrss_provider.async_engine.card import Card
from mrss_provider.async_engine.stream import TextStream
from mrss_provider.backend import Message, StreamInfo, Usage
from mrss_provider.chat import TEMPLATES
from mrss_provider.engine.request import EOS_ID, EngineRequest, TokenOutput
from mrss_provider.errors import (
    ContextLengthError,
    EngineError,
    QueueFullError,
    RequestTimeoutError,
    UnknownNameError,
)
from mrss_provider.sampling_params import SamplingParams


def test_tokens_become_text_and_usage_counts_each_of_them():
    deltas = answers(IDS("Hello", " world", "!"), ask("hi"))
    assert joined(deltas) == "Hello world!"
    assert reasons(deltas) == {0: "stop"}
    assert sum(delta.num_tokens for delta in deltas) == 4
    assert deltas[-1].usage == Usage(prompt_tokens=2, completion_tokens=4)
    assert [delta.usage for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


def test_the_space_before_a_chats_answer_is_no_part_of_it():
    script = IDS(" world", " world")
    user, half = Message("user", "hi"), Message("assistant", "Hello")
    assert joined(answers(script, ask(messages=(user,), n=2)), 1) == "world world"
    assert joined(answers(script, ask(messages=(user, half)))) == " world world"
    assert joined(answers(script, ask(messages=(user,)), template=TEMPLATES["plain"]))[0] == " "
    assert joined(answers(script, ask("hi"))) == " world world"


def test_an_answer_that_ended_before_its_admission_is_not_kept_by_its_deadline():
    async def main():
        request = EngineRequest(
            id="r0", prompt=(1,), mixture=Library().resolve("tone", None), sampling=SamplingParams()
        )
        info = StreamInfo("tone", 2, "fp", 1)
        stream = TextStream(request, info, TOKENS, (), "", ScriptEngine())
        stream.on_output(TokenOutput("r0", 0, EOS_ID, finish_reason="stop"))
        stream.admit(time.monotonic(), 86_400.0)
        found = weakref.ref(stream)
        del stream
        gc.collect()
        return found()

    assert asyncio.run(main()) is None


def test_characters_come_out_whole():
    pieces = IDS("é".encode() + b"\xf0\x9f", b"\x98", b"\x80", "!")
    deltas = answers(pieces, ask())
    assert joined(deltas) == "é😀!"
    assert all("�" not in delta.text for delta in deltas)
    assert "�" in joined(
        answers([*pieces[:2], TokenOutput("", 0, 1, finish_reason="length")], ask())
    )


def test_a_stop_string_across_tokens_never_leaks():
    script = ScriptEngine(IDS("Hello", " world", "\n\nUs", "er", ":", *"!" * 20))
    deltas = answers(script, ask(stop=("\n\nUser:",)))
    assert joined(deltas) == "Hello world"
    assert reasons(deltas) == {0: "stop"}
    # The tokens of the stop string were computed, so they count; those after it do not.
    assert deltas[-1].usage.completion_tokens == 5
    assert ("r0", 0) in script.aborted


def test_what_only_looked_like_a_stop_is_given_back():
    deltas = answers(IDS("Hello", "\n\nUs", "!"), ask(stop=("\n\nUser:",)))
    assert joined(deltas) == "Hello\n\nUs!"
    last = answers(IDS("Hello", "\n\nUs"), ask(stop=("\n\nUser:",)))
    assert joined(last) == "Hello\n\nUs"


def test_a_stop_wins_over_the_length_of_the_same_token():
    script = [*IDS("Hello"), TokenOutput("", 0, IDS("!")[0], finish_reason="length")]
    assert reasons(answers(script, ask(stop=("!",)))) == {0: "stop"}
    assert reasons(answers(script, ask())) == {0: "length"}


def test_choices_stop_one_by_one():
    scripts = [IDS("Hello", "!", "!", "!"), IDS("Hello", " world"), IDS("!")]
    engine = ScriptEngine(lambda request, index: scripts[index])
    deltas = answers(engine, ask(n=3, stop=("!",)))
    assert [joined(deltas, i) for i in range(3)] == ["Hello", "Hello world", ""]
    assert reasons(deltas) == {0: "stop", 1: "stop", 2: "stop"}
    assert deltas[-1].usage.completion_tokens == 2 + 3 + 1


def test_logprobs_are_one_a_token_with_bytes():
    hello, end = IDS("Hello")[0], TokenOutput("", 0, EOS_ID, -0.25, finish_reason="stop")
    script = [TokenOutput("", 0, hello, -0.5, ((hello, -0.5), (EOS_ID, -1.0))), end]
    deltas = answers(script, ask(logprobs=True, top_logprobs=2))
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert [(e.token_id, e.token, e.logprob) for e in entries] == [
        (hello, b"Hello", -0.5),
        (EOS_ID, b"", -0.25),
    ]
    assert [(t.token, t.logprob) for t in entries[0].top] == [(b"Hello", -0.5), (b"", -1.0)]


def test_a_late_reader_gets_everything_as_one_delta_a_choice():
    async def main():
        async with engine_of(IDS("Hello", " world", "!") * 50) as engine:
            stream = await engine.open(ask(n=2))
            while not stream._has_ended:
                await asyncio.sleep(0)
            assert stream.ready()
            return [delta async for delta in stream], stream.ready()

    deltas, ready = asyncio.run(main())
    assert [delta.index for delta in deltas] == [0, 1, 0]
    assert [delta.num_tokens for delta in deltas] == [151, 151, 0]
    assert joined(deltas, 1) == "Hello world!" * 50
    assert ready


def test_closing_aborts_and_the_engine_goes_on():
    engine = ScriptEngine(lambda request, _: IDS("Hello") * (10**6 if request.n == 1 else 1))

    async def main():
        async with engine_of(engine) as front:
            stream = await front.open(ask())
            await anext(stream)
            await stream.aclose()
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            await asyncio.to_thread(engine.wait_aborted, ("r0", None))
            return await collect(front, ask(n=2))

    assert joined(asyncio.run(main())) == "Hello"


def test_a_deadline_ends_the_answer_after_what_has_come():
    gate = threading.Semaphore(1)
    engine = ScriptEngine(IDS("Hello", " world"), gate=gate)

    async def main():
        front = engine_of(engine)
        await front.start()
        stream = await front.open(ask(timeout_s=0.2))
        assert (await anext(stream)).text == "Hello"
        with pytest.raises(RequestTimeoutError, match=r"0\.2 s \(1 tokens"):
            await anext(stream)
        gate.release(5)
        await front.aclose()

    asyncio.run(main())
    engine.wait_aborted(("r0", None))


def test_an_engines_error_ends_only_its_stream():
    failing = EngineError("not finite")
    script = ScriptEngine(
        lambda request, _: [*IDS("Hello"), *([failing] if request.n == 1 else [])]
    )

    async def main():
        async with engine_of(script) as engine:
            good, bad = await asyncio.gather(
                collect(engine, ask(n=2)), collect(engine, ask()), return_exceptions=True
            )
            return good, bad

    good, bad = asyncio.run(main())
    assert joined(good) == "Hello"
    assert bad is failing


@pytest.mark.parametrize("where", ["check_error", "add_error"])
@pytest.mark.parametrize("error", [QueueFullError("full"), ContextLengthError("too long")])
def test_what_the_engine_refuses_is_raised_on_admission(where, error):
    engine = ScriptEngine(IDS("Hello"))
    setattr(engine, where, error)
    with pytest.raises(type(error)) as caught:
        answers(engine, ask())
    assert caught.value is error


def test_an_unknown_name_is_raised_on_admission():
    with pytest.raises(UnknownNameError):
        answers([], ask(model="nobody"))


def test_chats_take_the_template_and_its_stops_and_prompts_do_not():
    engine = ScriptEngine(IDS("Hello", "\n", "\n", "!"))
    messages = (Message("user", "hi"),)
    template = replace(WORLD, stop=("\n\n",))

    async def main():
        async with engine_of(engine, template=template) as front:
            return await collect(front, ask(messages=messages)), await collect(front, ask("hi"))

    chat, plain = asyncio.run(main())
    assert joined(chat) == "Hello"
    assert joined(plain) == "Hello\n\n!"
    prompts = ["".join(chr(i - 1) for i in request.prompt) for request in engine.added]
    assert prompts == ["User: hi\n\nAssistant:", "hi"]


def test_token_ids_are_taken_as_they_are():
    engine = ScriptEngine(IDS("Hello"))
    answers(engine, ask((5, 6, 7)))
    assert engine.added[0].prompt == (5, 6, 7)


def test_defaults_come_from_mixture_then_card_then_engine():
    engine = ScriptEngine(IDS("Hello"))
    card = Card(temperature=0.5, top_p=0.6)

    async def main():
        async with engine_of(engine, card=card, max_context_len=100) as front:
            for request in (ask(), ask(model="warm"), ask(temperature=0.1, max_tokens=5, seed=9)):
                await collect(front, request)
        async with engine_of(engine) as front:
            await collect(front, ask())

    asyncio.run(main())
    by_card, by_mixture, by_request, by_engine = (r.sampling for r in engine.added)
    assert (by_card.temperature, by_card.top_p, by_card.max_tokens) == (0.5, 0.6, 98)
    assert (by_mixture.temperature, by_mixture.top_p) == (0.25, 0.6)
    assert (by_request.temperature, by_request.max_tokens, by_request.seed) == (0.1, 5, 9)
    assert (by_engine.temperature, by_engine.top_p, by_engine.max_tokens) == (1.0, 0.7, 1024)
    assert len({by_card.seed, by_mixture.seed, by_engine.seed, None}) == 4


def test_a_finished_request_logs_one_line_without_its_text(caplog):
    caplog.set_level("INFO", "mrss_provider")
    answers(IDS("Hello", " world"), ask("secret"))
    (record,) = [r for r in caplog.records if "finish_reason" in r.getMessage()]
    line = record.getMessage()
    for part in (
        "r0 tone prompt=6 cached=0 output=3",
        "ttft_ms=",
        "tpot_ms=",
        "finish_reason=stop",
    ):
        assert part in line
    assert "secret" not in caplog.text
    assert "Hello" not in caplog.text
