"""Saved conversations on tiny and bundled models: nobody can tell that somebody stopped."""

import itertools
from dataclasses import replace

import pytest
from conversing import DEMO, PROMPT, answer, ask, conversation_config, run

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import GenerateRequest, KeepsSessions, Message, Tool, ToolCall
from mrss_provider.engine.session import Session
from mrss_provider.errors import InvalidRequestError
from mrss_provider.openai_schema import (
    parse_chat_request,
    parse_completion_request,
    request_to_body,
)
from mrss_provider.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return conversation_config(tmp_path_factory.mktemp("tiny"))


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
