"""AsyncEngine over an engine that follows a script: text, stops, ends, and the thread's life."""

import asyncio
import gc
import threading
import time
import weakref
from dataclasses import replace

import pytest

from mrss_provider.async_engine import AsyncEngine, model_slot
from mrss_provider.async_engine.card import Card, read_card
from mrss_provider.async_engine.loading import Loaded
from mrss_provider.async_engine.stream import TextStream
from mrss_provider.backend import GenerateRequest, Message, ModelCard, StreamInfo, Usage
from mrss_provider.chat import TEMPLATES
from mrss_provider.config import EngineConfig
from mrss_provider.engine.request import EOS_ID, EngineRequest, ResolvedMixture, TokenOutput
from mrss_provider.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    EngineUnavailableError,
    ModelFileError,
    QueueFullError,
    RequestTimeoutError,
    UnknownNameError,
)
from mrss_provider.mixture import Method
from mrss_provider.sampling_params import SamplingParams


class ByteTokenizer:
    """Ids 1..256 are the bytes, the ids above are the pieces given."""

    eos_id = EOS_ID

    def __init__(self, *pieces):
        self.table = {i + 1: bytes([i]) for i in range(256)}
        self.table |= {257 + i: piece for i, piece in enumerate(pieces)}

    def encode(self, text):
        return [byte + 1 for byte in text.encode()]

    def ids(self, *pieces):
        by_bytes = {token: i for i, token in self.table.items()}
        return [by_bytes[piece if isinstance(piece, bytes) else piece.encode()] for piece in pieces]

    def token_bytes(self, token_id):
        return self.table.get(token_id)

    def entries(self):
        return self.table


class ScriptEngine:
    """Gives every choice the script's tokens, one a step; `EOS_ID` ends with "stop".

    Attributes:
        gate: when set, each step waits for a permit.
    """

    def __init__(self, script=(), *, gate=None):
        self.script = script
        self.gate = gate
        self.added = []
        self.aborted = []
        self.running = {}
        self.events = threading.Condition()
        self.add_error = None
        self.check_error = None
        self.step_error = None

    def check(self, request):
        if self.check_error is not None:
            raise self.check_error

    def add(self, request):
        if self.add_error is not None:
            raise self.add_error
        self.added.append(request)
        for index in range(request.n):
            script = self.script(request, index) if callable(self.script) else self.script
            self.running[request.id, index] = iter(list(script))

    def abort(self, request_id, index=None):
        with self.events:
            self.aborted.append((request_id, index))
            for key in list(self.running):
                if key[0] == request_id and index in (None, key[1]):
                    del self.running[key]
            self.events.notify_all()

    @property
    def has_work(self):
        return bool(self.running)

    def close(self):
        self.running.clear()

    def step(self):
        if self.gate is not None:
            self.gate.acquire()
        if self.step_error is not None:
            error, self.step_error = self.step_error, None
            raise error
        outputs = []
        for (request_id, index), tokens in list(self.running.items()):
            token = next(tokens, EOS_ID)
            if isinstance(token, Exception):
                output = TokenOutput(request_id, index, None, error=token)
            elif isinstance(token, TokenOutput):
                output = replace(token, request_id=request_id, index=index)
            else:
                reason = "stop" if token == EOS_ID else None
                output = TokenOutput(request_id, index, token, finish_reason=reason)
            if output.finish_reason or output.error:
                del self.running[request_id, index]
            outputs.append(output)
        return outputs

    def wait_aborted(self, expected):
        with self.events:
            assert self.events.wait_for(lambda: expected in self.aborted, 30)


class Library:
    def resolve(self, text, options=None):
        if text == "nobody":
            raise UnknownNameError(f"no state {text!r}")
        warm = 0.25 if text == "warm" else None
        return ResolvedMixture(
            canonical=text,
            states=(None, None),
            names=("base", "base"),
            groups=("", ""),
            ratios=(1.0, 1.0),
            weights=(0.5, 0.5),
            merge=Method("linear"),
            gate=Method("fixed"),
            cut=0.0,
            base_row=0,
            fingerprint="fp",
            temperature=warm,
        )

    def cards(self):
        return [ModelCard("base", "base")]


TOKENS = ByteTokenizer(b"Hello", b" world", b"\n\nUs", b"er", "é".encode() + b"\xf0\x9f", b"!")
IDS = TOKENS.ids
WORLD = TEMPLATES["world"]


def engine_of(script, *, card=None, template=WORLD, loader=None, **config):
    """Return an AsyncEngine over a ScriptEngine."""
    step_engine = script if isinstance(script, ScriptEngine) else ScriptEngine(script)
    loaded = Loaded(step_engine, Library(), TOKENS, template, card or Card())
    return AsyncEngine(EngineConfig(**config), loader=loader or (lambda _: loaded))


def ask(prompt="hi", n=1, timeout_s=30.0, model="tone", messages=None, **sampling):
    return GenerateRequest(
        model,
        SamplingParams(**sampling),
        prompt=None if messages else prompt,
        messages=messages,
        n=n,
        timeout_s=timeout_s,
    )


async def collect(engine, request):
    stream = await engine.open(request)
    try:
        return [delta async for delta in stream]
    finally:
        await stream.aclose()


def answers(script, request, **kwargs):
    """Return the deltas of one request on a fresh engine."""

    async def main():
        async with engine_of(script, **kwargs) as engine:
            return await collect(engine, request)

    return asyncio.run(main())


def joined(deltas, index=0):
    return "".join(delta.text for delta in deltas if delta.index == index)


def reasons(deltas):
    return {delta.index: delta.finish_reason for delta in deltas if delta.finish_reason}


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


def test_a_failing_step_ends_what_runs_and_not_the_engine(caplog):
    engine = ScriptEngine(IDS("Hello"))

    async def main():
        async with engine_of(engine) as front:
            engine.step_error = ZeroDivisionError("oops")
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                await collect(front, ask())
            return await collect(front, ask())

    assert joined(asyncio.run(main())) == "Hello"
    assert "oops" in caplog.text


def test_a_thread_that_fails_loses_the_engine_and_leaves_nobody_waiting(caplog):
    class Fragile(ScriptEngine):
        """A device that is lost may be met first where an answer is dropped."""

        def abort(self, request_id, index=None):
            raise RuntimeError("an illegal memory access")

    async def main():
        front = engine_of(Fragile(lambda request, _: IDS("Hello") * 10**6))
        await front.start()
        dropped, other = await front.open(ask()), await front.open(ask())
        await dropped.aclose()
        with pytest.raises(EngineUnavailableError, match="illegal memory access"):
            async for _ in other:
                pass
        assert isinstance(await front.until_lost(), EngineUnavailableError)
        with pytest.raises(EngineUnavailableError, match="started again"):
            await front.open(ask())
        await front.aclose()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert "the engine's thread failed" in caplog.text


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


def test_several_loops_share_an_engine():
    front = engine_of(IDS("Hello", " world") * 20)
    results = {}

    def work(name):
        async def main():
            return await asyncio.gather(*(collect(front, ask(name * 3, n=2)) for _ in range(5)))

        results[name] = asyncio.run(main())

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(front.aclose())
    for name in "abc":
        for deltas in results[name]:
            assert joined(deltas, 1) == "Hello world" * 20


def test_a_loop_that_closes_takes_only_its_own_requests_along():
    engine = ScriptEngine(lambda r, _: IDS("Hello") * (10**6 if r.n == 1 else 3))
    front = engine_of(engine)

    async def leave():
        await front.open(ask())

    asyncio.run(leave())
    engine.wait_aborted(("r0", None))
    assert joined(asyncio.run(collect(front, ask(n=2)))) == "Hello" * 3
    asyncio.run(front.aclose())


def test_closing_the_engine_ends_its_streams_and_refuses_more():
    async def main():
        front = engine_of(IDS("Hello") * 10**6)
        await front.start()
        stream = await front.open(ask())
        await anext(stream)
        await front.aclose()
        with pytest.raises(EngineUnavailableError, match="closed"):
            async for _ in stream:
                pass
        for call in (front.open(ask()), front.start(), front.models()):
            with pytest.raises(EngineUnavailableError, match="closed"):
                await call
        await front.aclose()

    asyncio.run(main())
    assert not any(thread.name == "mrss-engine" for thread in threading.enumerate())


def test_an_engine_that_was_never_started_closes():
    asyncio.run(engine_of([]).aclose())


def test_loading_begins_with_the_first_use_and_happens_once():
    engine = ScriptEngine(IDS("Hello"))
    loads = []

    def load(config):
        loads.append(config)
        return Loaded(engine, Library(), TOKENS, WORLD, Card())

    async def main():
        front = engine_of(engine, loader=load)
        assert loads == []
        await asyncio.gather(front.models(), front.start(), collect(front, ask()))
        await front.aclose()

    asyncio.run(main())
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("failure", "raised", "words"),
    [
        (ModelFileError("no weights in it"), ModelFileError, "no weights in it"),
        (ZeroDivisionError("oops"), EngineError, "could not be loaded"),
    ],
)
def test_a_failed_load_is_told_to_everybody(failure, raised, words):
    def load(config):
        raise failure

    async def main():
        front = engine_of([], loader=load)
        for call in (front.start, front.models, lambda: front.open(ask())):
            with pytest.raises(raised, match=words):
                await call()
        await front.aclose()

    asyncio.run(main())


def test_the_deadline_counts_while_the_model_loads():
    go = threading.Event()

    def load(config):
        go.wait()
        return Loaded(ScriptEngine(IDS("Hello")), Library(), TOKENS, WORLD, Card())

    async def main():
        front = engine_of([], loader=load)
        with pytest.raises(RequestTimeoutError, match="did not take"):
            await front.open(ask(timeout_s=0.05))
        go.set()
        deltas = await collect(front, ask())
        await front.aclose()
        return deltas

    assert joined(asyncio.run(main())) == "Hello"


def test_closing_does_not_wait_for_a_model_that_loads():
    begun, go = threading.Event(), threading.Event()
    front = None

    def load(config):
        begun.set()
        assert go.wait(30)
        return Loaded(ScriptEngine([]), Library(), TOKENS, WORLD, Card())

    async def main():
        starting = asyncio.create_task(front.start())
        await asyncio.to_thread(begun.wait)
        await front.aclose()
        with pytest.raises(EngineUnavailableError, match="closed"):
            await starting

    front = engine_of([], loader=load)
    asyncio.run(main())
    # Nor did the loop's end wait: the thread still loads, and keeps nothing of it.
    assert not go.is_set()
    (thread,) = [t for t in threading.enumerate() if t.name == "mrss-engine"]
    go.set()
    thread.join(30)
    assert front._slot.loaded is None


def test_closing_waits_a_bounded_time_for_a_step(monkeypatch):
    monkeypatch.setattr(model_slot, "EXIT_WAIT_S", 0.01)
    gate = threading.Semaphore(0)

    async def main():
        front = engine_of(ScriptEngine(IDS("Hello"), gate=gate))
        await front.start()
        await front.open(ask())
        await front.aclose()

    asyncio.run(main())
    gate.release(10)


def test_who_is_cancelled_during_admission_leaves_nothing_behind():
    gate = threading.Semaphore(0)
    engine = ScriptEngine(IDS("Hello") * 100, gate=gate)

    async def main():
        front = engine_of(engine)
        await front.start()
        first = await front.open(ask())
        # The engine's thread is inside a step now, so the next admission has to wait.
        second = asyncio.create_task(front.open(ask()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.release(10**4)
        await first.aclose()
        await asyncio.to_thread(engine.wait_aborted, ("r1", None))
        await front.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("template = 5", "template must be a string"),
        ("stop = 'x'", "a list"),
        ("stop = ['']", "1 to 256 characters"),
        ("temperature = -1", "temperature must be"),
        ("top_p = 'x'", "top_p must be"),
        ("temprature = 1", "no key of a card"),
        ("context_length = 'x'", "an integer"),
        ("= x", "cannot read"),
    ],
)
def test_a_bad_card_is_a_configuration_error(tmp_path, text, words):
    (tmp_path / "card.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_card(tmp_path)


def test_a_card_lies_in_the_models_folder_or_beside_its_file(tmp_path):
    (tmp_path / "card.toml").write_text('template = "g1"\nstop = ["x"]\ntop_p = 0.3\n')
    expected = Card(template="g1", stop=("x",), top_p=0.3)
    assert read_card(tmp_path) == expected
    assert read_card(tmp_path / "model.pth") == expected
    (tmp_path / "card.toml").unlink()
    assert read_card(tmp_path) == Card()
