"""Saved conversations on tiny and bundled models: nobody can tell that somebody stopped."""

import asyncio
import itertools
import threading
from dataclasses import replace

import pytest
import torch
from tiny_model import write_model_folder, write_state

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import GenerateRequest, KeepsSessions, Message, Tool, ToolCall
from mrss_provider.config import EngineConfig
from mrss_provider.engine.session import Session
from mrss_provider.engine.session_store import SessionStore
from mrss_provider.errors import (
    ConfigError,
    ConflictError,
    InvalidRequestError,
    MRSSError,
    NotFoundError,
    PayloadTooLargeError,
    RequestTimeoutError,
    StateFileError,
    StorageError,
)
from mrss_provider.openai_schema import (
    parse_chat_request,
    parse_completion_request,
    request_to_body,
)
from mrss_provider.sampling_params import SamplingParams

PROMPT = "The keeper of the harbour writes letters, and every morning she walks down to the sea."
DEMO = EngineConfig(device="cpu", dtype="fp32", threads=1, max_rows=8)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "states").mkdir()
    for seed, name in enumerate(("knowledge", "tone", "other")):
        write_state(folder / "states" / f"{name}.pth", seed=seed)
    return EngineConfig(
        model=write_model_folder(folder / "model"),
        states=folder / "states",
        device="cpu",
        dtype="fp32",
        threads=1,
        max_rows=8,
        prefill_chunk_len=32,
        lazy_rows="off",
        max_context_len=2000,
    )


def ask(prompt="", model="knowledge+tone", session=None, save=False, owner="", **sampling):
    sampling = {"max_tokens": 12, "ignore_eos": True} | sampling
    asked = {"messages": prompt} if isinstance(prompt, tuple) else {"prompt": prompt}
    return GenerateRequest(
        model,
        SamplingParams(**sampling),
        timeout_s=60.0,
        session=session,
        session_save=save,
        owner=owner,
        **asked,
    )


async def answer(engine, request):
    """Return the text of an answer, its usage, and why it ended."""
    stream = await engine.open(request)
    try:
        deltas = [delta async for delta in stream]
    finally:
        await stream.aclose()
    reasons = [delta.finish_reason for delta in deltas if delta.finish_reason]
    return "".join(delta.text for delta in deltas), deltas[-1].usage, reasons[0]


def run(config, scenario):
    async def main():
        async with AsyncEngine(config) as engine:
            result = await scenario(engine)
            # An answer that ended at a stop string is dropped between two steps.
            for _ in range(500):
                if not engine.stats().num_running:
                    break
                await asyncio.sleep(0.01)
            assert engine.stats().num_free_rows == config.max_rows
            return result

    return asyncio.run(main())


def test_the_engine_keeps_sessions():
    assert isinstance(AsyncEngine(DEMO), KeepsSessions)


@pytest.mark.parametrize(
    "model", ["base", "knowledge+tone", "knowledge+tone~linear~schedule:tone=0@0,1@9"]
)
@pytest.mark.parametrize("extra", [{}, {"presence_penalty": 0.8, "penalty_decay": 0.9}])
def test_an_answer_goes_on_as_if_nobody_had_stopped(config, model, extra):
    sampling = {"seed": 11, "temperature": 1.0, "top_p": 0.9} | extra

    async def scenario(engine):
        whole = ask(PROMPT, model, max_tokens=36, logprobs=True, **sampling)
        stream = await engine.open(whole)
        expected = [entry async for delta in stream for entry in delta.logprobs]
        created = await engine.create_session(ask(PROMPT, model, **sampling))
        found = []
        for length in (1, 11, 24):
            part = ask("", model, created.id, True, max_tokens=length, logprobs=True, **sampling)
            if found:
                # The seed is the session's.
                part = replace(part, sampling=replace(part.sampling, seed=None))
            stream = await engine.open(part)
            found += [entry async for delta in stream for entry in delta.logprobs]
        return expected, found

    async def entries(engine):
        expected, found = await scenario(engine)
        return expected, found

    expected, found = run(replace(config, cache_bytes=0), entries)
    assert [entry.token_id for entry in found] == [entry.token_id for entry in expected]
    # The first token comes after a prompt that was cut at its last token, not at a block.
    assert [e.logprob for e in found] == pytest.approx([e.logprob for e in expected], abs=1e-4)


def test_after_a_stop_for_length_every_bit_is_the_same(config):
    sampling = {"seed": 5, "temperature": 1.0, "logprobs": True, "top_logprobs": 5}

    async def entries(engine, request):
        stream = await engine.open(request)
        return [entry async for delta in stream for entry in delta.logprobs]

    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, **sampling))
        whole = await entries(engine, ask("", session=created.id, max_tokens=30, **sampling))
        parts = await entries(
            engine, ask("", session=created.id, save=True, max_tokens=13, **sampling)
        )
        parts += await entries(engine, ask("", session=created.id, max_tokens=17, **sampling))
        return whole, parts

    whole, parts = run(config, scenario)
    assert parts == whole


def test_without_save_a_session_stays_where_it_is(config):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1))
        first = await answer(engine, ask(" And", session=created.id, seed=1))
        again = await answer(engine, ask(" And", session=created.id, seed=1))
        assert first == again
        assert await engine.session(created.id, "") == created
        saved = await answer(engine, ask(" And", session=created.id, seed=1, save=True))
        assert saved == first
        info = await engine.session(created.id, "")
        assert info.num_tokens == saved[1].prompt_tokens + saved[1].completion_tokens
        return

    run(config, scenario)


@pytest.mark.parametrize("model", ["base", "knowledge+tone"])
@pytest.mark.slow
def test_a_chat_over_a_session_is_the_chat_over_whole_histories(model):
    system = Message("system", "You are the keeper of a small harbour, and you answer kindly.")
    questions = ("Good morning! Who are you?", "Where do you live?", "Thank you, good night!")
    sampling = {"temperature": 0.0, "max_tokens": 50, "ignore_eos": False}

    async def scenario(engine):
        created = await engine.create_session(ask((system,), model, seed=3))
        messages, told, cached = [system], [], []
        for question in questions:
            user = Message("user", question)
            request = ask((user,), model, created.id, True, **sampling)
            text, usage, _ = await answer(engine, request)
            told.append(text)
            cached.append((usage.prompt_tokens, usage.cached_tokens))
        for question, text in zip(questions, told, strict=True):
            messages.append(Message("user", question))
            whole = await answer(engine, ask(tuple(messages), model, **sampling))
            assert whole[0] == text
            messages.append(Message("assistant", text))
        return cached

    cached = run(replace(DEMO, cache_bytes=0), scenario)
    for (before, _), (prompt, known) in itertools.pairwise(cached):
        assert before <= known < prompt, "only the new turn is read"


def test_sessions_fork_and_go_different_ways(config):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1, owner="k1", model="base"))
        forked = await engine.fork_session(created.id, "k1")
        assert forked.id != created.id
        left = ask(" left", "base", forked.id, True, "k1", seed=1)
        first = await answer(engine, left)
        assert await answer(engine, replace(left, session=created.id)) == first
        assert (await engine.session(created.id, "k1")).num_tokens > created.num_tokens
        return

    run(config, scenario)


def test_a_session_is_nobody_elses(config):
    async def scenario(engine):
        mine = await engine.create_session(ask(PROMPT, seed=1, owner="k1"))
        assert await engine.sessions("k1") == [mine]
        assert await engine.sessions("k2") == []
        for attempt in (
            engine.session(mine.id, "k2"),
            engine.fork_session(mine.id, "k2"),
            engine.export_session(mine.id, "k2"),
            engine.delete_session(mine.id, "k2"),
            engine.open(ask("", session=mine.id, owner="k2")),
            engine.session("../../etc/passwd", "k1"),
        ):
            with pytest.raises(NotFoundError, match="there is no session"):
                await attempt
        await engine.delete_session(mine.id, "k1")
        assert await engine.sessions("k1") == []
        return

    run(config, scenario)


def test_a_session_travels_as_bytes(config, tmp_path):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1, owner="secret-owner"))
        request = ask("", session=created.id, owner="secret-owner", seed=4, temperature=1.0)
        expected = await answer(engine, request)
        data = await engine.export_session(created.id, "secret-owner")
        assert b"secret-owner" not in data
        imported = await engine.import_session(data, "k2")
        assert (imported.owner, imported.num_tokens) == ("k2", created.num_tokens)
        moved = replace(request, session=imported.id, owner="k2")
        assert await answer(engine, moved) == expected
        return data

    data = run(config, scenario)

    async def elsewhere(engine):
        with pytest.raises(StateFileError, match="another model"):
            await engine.import_session(data, "")
        return

    run(DEMO, elsewhere)


def test_bytes_that_are_no_session_are_refused(config):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1))
        data = await engine.export_session(created.id, "")
        loaded = engine._slot.loaded
        read = Session.from_bytes(data, loaded.engine.model_config, torch.float32)
        bad = replace(read.rows[0], wkv=read.rows[0].wkv * float("nan"))
        two = (Message("user", "x"), Message("assistant", "y"), Message("user", "z"))
        told = replace(read, reinjections=(1,), messages=two)
        await engine.import_session(told.to_bytes(loaded.engine.model_config), "")
        harmed = [
            b"",
            data[:100],
            data[:-1],
            data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
            b"\xff" * 64,
            *(
                changed.to_bytes(loaded.engine.model_config)
                for changed in (
                    replace(read, rows=(bad, *read.rows[1:])),
                    replace(read, rows=read.rows[:1]),
                    replace(read, num_read=len(read.tokens)),
                    replace(read, num_read=-1),
                    replace(read, tokens=(*read.tokens[:-1], 10_000_000)),
                    replace(read, seed=1 << 70),
                    replace(read, messages=(Message("nobody", "x"),)),
                    # Of a text, of a chat without the base, and of one with fewer turns.
                    replace(read, reinjections=(1,)),
                    replace(read, reinjections=(1,), messages=two, states=("x", "y", "z")),
                    replace(read, reinjections=(1, 2), messages=two),
                )
            ),
        ]
        for bytes_ in harmed:
            with pytest.raises(StateFileError):
                await engine.import_session(bytes_, "")
        assert len(await engine.sessions("")) == 2
        return

    run(config, scenario)


def test_sessions_are_bounded_for_each_owner(config):
    async def scenario(engine):
        for owner in ("k1", "k2"):
            for _ in range(2):
                await engine.create_session(ask(PROMPT, seed=1, owner=owner))
            with pytest.raises(StorageError, match="max_sessions"):
                await engine.create_session(ask(PROMPT, seed=1, owner=owner))
        return (await engine.sessions("k1"))[0].num_bytes, await engine.export_session(
            (await engine.sessions("k1"))[0].id, "k1"
        )

    size, data = run(replace(config, max_sessions=2), scenario)

    async def small(engine):
        await engine.create_session(ask(PROMPT, seed=1))
        with pytest.raises(StorageError, match="session_bytes"):
            await engine.create_session(ask(PROMPT, seed=1))
        return

    run(replace(config, session_bytes=size * 3 // 2), small)

    async def tiny(engine):
        with pytest.raises(PayloadTooLargeError):
            await engine.create_session(ask(PROMPT, seed=1))
        with pytest.raises(PayloadTooLargeError):
            await engine.import_session(data, "")
        return

    run(replace(config, session_bytes=size // 2), tiny)


def test_a_folder_that_cannot_be_used_is_told_at_the_start(config, tmp_path):
    (tmp_path / "file").write_text("no folder")
    engine = AsyncEngine(replace(config, sessions_dir=tmp_path / "file/sessions"))
    with pytest.raises(ConfigError, match=r"sessions_dir .* cannot be used"):
        asyncio.run(engine.start())


def test_sessions_in_a_folder_outlive_the_engine(config, tmp_path):
    config = replace(config, sessions_dir=tmp_path / "sessions")
    request = ask("", seed=4, temperature=1.0, owner="k1")

    async def before(engine):
        created = await engine.create_session(ask(PROMPT, seed=1, owner="k1"))
        await answer(engine, replace(request, session=created.id, session_save=True))
        other = await engine.create_session(ask(PROMPT, seed=1, owner="k1"))
        return (
            await engine.sessions("k1"),
            await answer(engine, replace(request, session=created.id)),
            other,
        )

    infos, expected, other = run(config, before)
    folder = config.sessions_dir
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    (folder / f"{other.id}.safetensors").write_bytes(b"harmed")
    (folder / "ses_000000000000000000000000.safetensors").write_bytes(b"")

    async def after(engine):
        assert await engine.sessions("k1") == [info for info in infos if info.id != other.id]
        first = next(info for info in infos if info.id != other.id)
        assert await answer(engine, replace(request, session=first.id)) == expected
        return

    run(config, after)
    assert (folder / f"{other.id}.safetensors").exists(), "what cannot be read is left alone"


def test_what_cannot_go_on_is_refused(config):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1))
        chat = await engine.create_session(ask((Message("user", "Hi"),), seed=1))
        user = (Message("user", "Hello"),)
        for request, param in (
            (ask(" And", "knowledge", created.id), "model"),
            (ask(" And", "knowledge+other", created.id), "model"),
            (ask(user, session=created.id), "messages"),
            (ask("text", session=chat.id), "prompt"),
        ):
            with pytest.raises(InvalidRequestError) as caught:
                await engine.open(request)
            assert caught.value.param == param
        text, _, _ = await answer(engine, ask("", session=chat.id, max_tokens=3))
        assert isinstance(text, str)
        return

    run(config, scenario)
    with pytest.raises(InvalidRequestError, match="save needs"):
        ask(PROMPT, save=True)
    with pytest.raises(InvalidRequestError, match="one answer"):
        GenerateRequest("base", SamplingParams(), prompt="x", n=2, session="s")


def test_only_one_answer_at_a_time_is_saved_to_a_session(config):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1))
        saving = ask("", session=created.id, save=True, seed=1, max_tokens=20)
        stream = await engine.open(saving)
        with pytest.raises(ConflictError, match="under way"):
            await engine.open(saving)
        await answer(engine, replace(saving, session_save=False))
        await stream.aclose()
        assert await engine.session(created.id, "") == created, "a dropped answer is not saved"
        for _ in range(2):
            await answer(engine, saving)
        with pytest.raises(MRSSError):
            await engine.open(replace(saving, model="nobody"))
        await answer(engine, saving)

    run(config, scenario)


async def given_up(engine, request, step, monkeypatch, leave):
    """Let `leave` happen while the thread of `request` is in `step` of the store."""
    begun, may_end = threading.Event(), threading.Event()
    whole = getattr(SessionStore, step)

    def slow(self, *args, **options):
        begun.set()
        assert may_end.wait(10)
        return whole(self, *args, **options)

    monkeypatch.setattr(SessionStore, step, slow)
    asking = asyncio.create_task(answer(engine, request))
    assert await asyncio.to_thread(begun.wait, 10)
    monkeypatch.undo()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await leave()
    may_end.set()


def test_who_gives_up_while_a_session_is_read_does_not_hold_it(config, monkeypatch):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1))
        saving = ask("", session=created.id, save=True, seed=1)

        async def leave():
            await answer(engine, saving)

        await given_up(engine, saving, "get", monkeypatch, leave)

    run(config, scenario)


def test_who_leaves_while_a_session_is_written_holds_it_until_it_is(config, monkeypatch):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1))
        saving = ask("", session=created.id, save=True, seed=1)

        async def leave():
            with pytest.raises(ConflictError):
                await engine.open(saving)

        await given_up(engine, saving, "put", monkeypatch, leave)
        async with asyncio.timeout(10):
            while (await engine.session(created.id, "")).num_tokens == created.num_tokens:
                await asyncio.sleep(0.01)
        await answer(engine, saving)

    run(config, scenario)


def test_a_session_is_made_within_the_time_that_its_request_has(config):
    async def scenario(engine):
        with pytest.raises(RequestTimeoutError, match="1e-06 s"):
            await engine.create_session(replace(ask(PROMPT), timeout_s=1e-6))
        assert await engine.sessions("") == []

    run(config, scenario)


def test_sessions_on_the_wire():
    body = {
        "model": "base",
        "messages": [],
        "mrss": {"session": "ses_1", "save": True},
    }
    request = parse_chat_request(body).request
    assert (request.session, request.session_save, request.messages) == ("ses_1", True, ())
    assert parse_chat_request(request_to_body(request)).request == request
    body = {"model": "base", "prompt": "", "mrss": {"session": "ses_1"}}
    request = parse_completion_request(body).request
    assert (request.session, request.session_save, request.prompt) == ("ses_1", False, "")
    assert parse_completion_request(request_to_body(request)).request == request
    for mrss in ({"save": True}, {"session": 3}, {"session": "s", "save": "yes"}):
        with pytest.raises(InvalidRequestError, match="mrss"):
            parse_completion_request({"model": "base", "prompt": "x", "mrss": mrss})
    with pytest.raises(InvalidRequestError, match="messages"):
        parse_chat_request({"model": "base", "messages": []})
    with pytest.raises(InvalidRequestError, match="one prompt"):
        parse_completion_request({"model": "base", "prompt": ["a", "b"], "mrss": {"session": "s"}})


@pytest.mark.parametrize(
    ("thinking", "opening"),
    [
        (None, ""),
        pytest.param(True, "<think", marks=pytest.mark.slow),
        pytest.param(False, "<think>\n</think>", marks=pytest.mark.slow),
    ],
)
def test_a_saved_chat_knows_what_it_thought(thinking, opening):
    kinds = {"max_tokens": 12, "seed": 3, "temperature": 1.0}

    async def scenario(engine):
        made = await engine.create_session(ask((Message("user", "Hi"),), "tone", **kinds))
        turns = ("How are you?", "Where is the harbour?")
        first, second = (
            replace(
                ask((Message("user", text),), "tone", made.id, save=True, **kinds),
                thinking=thinking,
            )
            for text in turns
        )
        _, before, _ = await answer(engine, first)
        saved = await engine.export_session(made.id, "")
        _, after, _ = await answer(engine, second)
        loaded, _ = await engine._parts()
        session = Session.from_bytes(saved, loaded.engine.model_config, loaded.engine.state_dtype)
        text = loaded.tokenizer.decode(session.tokens)
        return before, after, session.messages[-1].content, text

    before, after, said, text = run(replace(DEMO, template="g1"), scenario)
    # What the model reads next time is what it has read and written this time.
    assert said.startswith(opening)
    assert text.rstrip().endswith(f"Assistant: {said}".rstrip())
    assert after.prompt_tokens > before.prompt_tokens


@pytest.mark.parametrize("kind", ["tools", "messages"])
def test_a_session_takes_no_tools(kind):
    call = Message("assistant", "", (ToolCall("c1", "clock", "{}"),))
    told = (Message("user", "Hi"), call, Message("tool", "12:00", (), "c1"))
    asked = ask(told if kind == "messages" else told[:1], "tone")
    if kind == "tools":
        asked = replace(asked, tools=(Tool("clock"),))

    async def scenario(engine):
        with pytest.raises(InvalidRequestError, match="takes no tools") as caught:
            await engine.create_session(asked)
        assert caught.value.param == kind

    run(DEMO, scenario)
