"""Chats on the bundled model: a later turn reads only what is new, and says the same."""

import asyncio
import itertools
from dataclasses import replace

import pytest

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import GenerateRequest, Message
from mrss_provider.config import EngineConfig
from mrss_provider.sampling_params import SamplingParams

QUESTIONS = (
    "Good morning! Who are you, and what can you tell me about the harbour town and its people?",
    "Thank you. Where does the keeper of the lighthouse live?",
    "And what do people like to do there in the evening?",
)
CONFIG = EngineConfig(device="cpu", threads=1, max_rows=8)


async def turns(engine, model, **sampling):
    """Hold a chat; return each answer, the tokens of its prompt and those that were cached."""
    messages, told = [], []
    for question in QUESTIONS:
        messages.append(Message("user", question))
        request = GenerateRequest(
            model,
            SamplingParams(max_tokens=60, seed=3, **sampling),
            messages=tuple(messages),
            timeout_s=60.0,
        )
        stream = await engine.open(request)
        deltas = [delta async for delta in stream]
        answer = "".join(delta.text for delta in deltas)
        messages.append(Message("assistant", answer))
        told.append((answer, deltas[-1].usage))
    return told


@pytest.mark.parametrize("model", ["base", "knowledge+tone"])
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_a_turn_reads_its_new_tokens_and_no_others(model, temperature):
    async def main():
        async with AsyncEngine(CONFIG) as engine:
            cached = await turns(engine, model, temperature=temperature)
            again = await turns(engine, model, temperature=temperature)
        async with AsyncEngine(replace(CONFIG, cache_bytes=0)) as engine:
            fresh = await turns(engine, model, temperature=temperature)
        return cached, again, fresh

    cached, again, fresh = asyncio.run(main())
    assert [answer for answer, _ in cached] == [answer for answer, _ in fresh]
    assert [answer for answer, _ in again] == [answer for answer, _ in fresh]
    assert [usage.cached_tokens for _, usage in fresh] == [0, 0, 0]
    for (_, before), (_, usage) in itertools.pairwise(cached):
        assert usage.cached_tokens >= before.prompt_tokens
        # What was asked, and what stands between turns.
        new = usage.prompt_tokens - before.prompt_tokens - before.completion_tokens
        assert usage.prompt_tokens - usage.cached_tokens <= new + 4


def test_a_chat_goes_on_after_a_restart(tmp_path, caplog):
    caplog.set_level("INFO", logger="mrss_provider.async_engine.stream")
    question = Message("user", " ".join(QUESTIONS))

    def messages_after(answer):
        return (question, Message("assistant", answer), Message("user", QUESTIONS[1]))

    async def ask(engine, messages):
        sampling = SamplingParams(max_tokens=40, temperature=0.0)
        request = GenerateRequest("knowledge+tone", sampling, messages=messages, timeout_s=60.0)
        stream = await engine.open(request)
        deltas = [delta async for delta in stream]
        return "".join(delta.text for delta in deltas), deltas[-1].usage

    async def main():
        async with AsyncEngine(replace(CONFIG, cache_dir=tmp_path)) as engine:
            answer, usage = await ask(engine, (question,))
        async with AsyncEngine(CONFIG) as engine:
            expected, _ = await ask(engine, messages_after(answer))
        async with AsyncEngine(replace(CONFIG, cache_dir=tmp_path)) as engine:
            engine._slot.loaded.engine._keeper.cache.wait_for_files()
            return usage, expected, await ask(engine, messages_after(answer))

    before, expected, (text, usage) = asyncio.run(main())
    assert text == expected
    assert before.prompt_tokens <= usage.cached_tokens < usage.prompt_tokens
    assert f"cached={usage.cached_tokens}" in caplog.messages[-1]
