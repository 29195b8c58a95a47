"""Requests over saved conversations, and engines on which a scenario leaves nothing behind."""

import asyncio

from tiny_engine import tiny_config

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import GenerateRequest
from mrss_provider.config import EngineConfig
from mrss_provider.sampling_params import SamplingParams

PROMPT = "The keeper of the harbour writes letters, and every morning she walks down to the sea."
DEMO = EngineConfig(device="cpu", dtype="fp32", threads=1, max_rows=8)


def conversation_config(folder):
    """Return an engine's configuration with three states, in which a few long chats fit."""
    return tiny_config(
        folder,
        ("knowledge", "tone", "other"),
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
