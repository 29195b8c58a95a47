"""AsyncEngine on a real engine and a tiny model: one text by every way, nothing left behind."""

import asyncio
from pathlib import Path
from unittest import mock

import pytest
import torch
from fakes import serving
from tiny_model import write_model_folder, write_state

from mrss_provider import model as model_package
from mrss_provider.async_engine import AsyncEngine
from mrss_provider.async_engine.loading import load
from mrss_provider.backend import GenerateRequest, Message
from mrss_provider.client import Client
from mrss_provider.config import EngineConfig, ServerConfig
from mrss_provider.errors import (
    ConfigError,
    ContextLengthError,
    InvalidRequestError,
    UnknownNameError,
)
from mrss_provider.sampling_params import SamplingParams

MAX_ROWS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "states").mkdir()
    for seed, name in enumerate(("knowledge", "tone")):
        write_state(folder / "states" / f"{name}.pth", seed=seed)
    return EngineConfig(
        model=write_model_folder(folder / "model"),
        states=folder / "states",
        device="cpu",
        dtype="fp32",
        threads=1,
        max_rows=MAX_ROWS,
        max_context_len=200,
        prefill_chunk_len=16,
    )


def ask(model="knowledge+tone", prompt="Hello", n=1, messages=None, **sampling):
    sampling = {"seed": 5, "max_tokens": 24, "ignore_eos": True} | sampling
    return GenerateRequest(
        model,
        SamplingParams(**sampling),
        prompt=None if messages else prompt,
        messages=messages,
        n=n,
        timeout_s=60.0,
    )


async def texts_of(backend, request):
    """Return the text of each choice, and the usage."""
    stream = await backend.open(request)
    try:
        deltas = [delta async for delta in stream]
    finally:
        await stream.aclose()
    texts = [
        "".join(delta.text for delta in deltas if delta.index == index)
        for index in range(request.n)
    ]
    return texts, deltas[-1].usage


def run(config, main):
    async def with_engine():
        async with AsyncEngine(config) as engine:
            return await main(engine)

    return asyncio.run(with_engine())


def test_a_seed_has_one_text_alone_in_company_and_over_http(config, tmp_path):
    request = ask(n=2)

    async def main(engine):
        alone = await texts_of(engine, request)
        company = await asyncio.gather(
            texts_of(engine, ask("tone", seed=1)),
            texts_of(engine, request),
            texts_of(engine, ask("base", seed=2, max_tokens=3)),
        )
        return alone, company[1]

    alone, company = run(config, main)
    engine = AsyncEngine(config)
    server = ServerConfig(socket=tmp_path / "s")
    with serving(engine, server):
        over_http = asyncio.run(texts_of(Client(f"unix://{server.socket}"), request))
    assert alone == company == over_http
    texts, usage = alone
    assert texts[0] != texts[1]
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 48)


def test_a_stop_string_cuts_the_text_that_would_have_come(config):
    async def main(engine):
        (whole,), _ = await texts_of(engine, ask())
        stop = whole[5:8]
        (cut,), usage = await texts_of(engine, ask(stop=(stop,)))
        return whole, stop, cut, usage

    whole, stop, cut, usage = run(config, main)
    assert cut == whole[: whole.find(stop)]
    assert usage.completion_tokens < 24


def test_whatever_ends_a_request_frees_its_rows(config):
    async def main(engine):
        await engine.start()
        for end in ("close", "cancel", "stop", "length", "timeout"):
            stream = await engine.open(ask("tone", n=2, max_tokens=150))
            if end == "close":
                await anext(stream)
            elif end == "cancel":
                reading = asyncio.create_task(anext(stream))
                await asyncio.sleep(0)
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
            elif end == "timeout":
                stream._expire(0.0)
            elif end == "length":
                async for _ in stream:
                    pass
            await stream.aclose()
        # A request that needs every row is admitted only once all of them are free again.
        texts, _ = await texts_of(engine, ask("tone", n=MAX_ROWS, max_tokens=2))
        return len(texts), engine._slot.loaded.engine

    num_texts, engine = run(config, main)
    assert num_texts == MAX_ROWS
    assert engine.num_free_rows == MAX_ROWS


def test_a_chat_stops_as_its_card_says(config):
    async def main(engine):
        messages = (Message("user", "hi"),)
        bias = dict.fromkeys(engine._slot.loaded.tokenizer.encode("\n\n"), 100.0)
        return await texts_of(engine, ask("tone", messages=messages, logit_bias=bias))

    texts, usage = run(config, main)
    assert texts == [""]
    assert usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (ask("nobody"), UnknownNameError, "nobody"),
        (ask("tone", max_tokens=500), ContextLengthError, "200 tokens"),
        (ask("tone", prompt="x" * 300), ContextLengthError, "200 tokens"),
        (ask("tone", prompt=(1, 999_999)), InvalidRequestError, "999999"),
        (ask("knowledge+tone", n=16), InvalidRequestError, "at most 8 rows"),
    ],
)
def test_what_can_never_run_is_refused_on_admission(config, request_, error, words):
    with pytest.raises(error, match=words):
        run(config, lambda engine: engine.open(request_))


def test_names_are_listed_base_first(config):
    cards = run(config, lambda engine: engine.models())
    assert [(card.id, card.kind) for card in cards] == [
        ("base", "base"),
        ("knowledge", "state"),
        ("tone", "state"),
    ]
    assert {card.context_len for card in cards} == {200}


def test_a_folder_that_may_not_be_read_is_told_in_one_sentence(config, monkeypatch):
    is_dir = Path.is_dir

    def refused(self):
        # As for a user who is not root, of what is below a closed folder.
        if self == config.model:
            raise PermissionError(13, "Permission denied", str(self))
        return is_dir(self)

    monkeypatch.setattr(Path, "is_dir", refused)
    with pytest.raises(ConfigError, match=f"^{config.model} cannot be read: Permission denied$"):
        load(config)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nMore words."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . can't allocate memory: 9 bytes."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_too_little_memory_is_told_in_one_sentence(config, monkeypatch, error):
    monkeypatch.setattr(model_package, "load_model", mock.Mock(side_effect=error))
    with pytest.raises(ConfigError, match="memory for model with the states of 8 rows") as caught:
        load(config)
    assert (str(error).partition("\n")[0] or "MemoryError") in caught.value.message
    assert "\n" not in caught.value.message


def test_a_defect_while_a_model_loads_stays_one(config, monkeypatch):
    defect = RuntimeError("shapes do not fit")
    monkeypatch.setattr(model_package, "load_model", mock.Mock(side_effect=defect))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        load(config)
