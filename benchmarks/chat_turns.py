"""Time to the first token of a chat's second turn, with a long history before it.

Three ways for the same new words: after a history that is in the state cache, alone (a chat that
begins with them), and after the history without a cache. The first should cost no more than 1.2 x
the second.

    python benchmarks/chat_turns.py
    python benchmarks/chat_turns.py --model 1.5b --device cuda --dtype bf16

The bundled model gets text, through `AsyncEngine`: rendering, tokenising and looking up are part of
the time. A random model gets token ids, through `Engine`. Cached and alone are timed in turns, with
other words each time. Ends with one JSON line a cell, kept in benchmarks/results/chat_turns.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from measure import RESULTS, Machine, host, machine, write_line
from mixture import Cell as MixtureCell
from mixture import random_states, resolve
from random_models import SHAPES, random_model

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import GenerateRequest, Message, Usage
from mrss_provider.config import DEMO_MODEL, EngineConfig
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.request import EngineRequest, ResolvedMixture
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.tokenizer import Tokenizer, find_vocabulary

WANTED = 1.2
NUM_NEW = 64
ANSWER_LEN = 24
CACHE_BYTES = 4 << 30
WORDS = [
    "harbour",
    "keeper",
    "lighthouse",
    "bakery",
    "morning",
    "market",
    "letter",
    "river",
    "bridge",
    "garden",
    "window",
    "teacher",
    "captain",
    "winter",
    "evening",
    "fish",
    "bread",
    "story",
    "street",
    "island",
    "boat",
    "friend",
    "music",
]


@dataclass(frozen=True)
class Times:
    """Milliseconds to the first token, and how many tokens of the prompt the cache saved."""

    cached_ms: float
    alone_ms: float
    uncached_ms: float
    prompt_tokens: int
    cached_tokens: int


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("demo", *SHAPES), default="demo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--history", nargs="+", type=int, default=[4096, 32_768])
    parser.add_argument("--states", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    on = machine() if args.device == "cuda" else host()
    model = None
    if args.model != "demo":
        model = random_model(SHAPES[args.model], dtype=args.dtype, device=args.device)
    slow = 0
    for num_states in args.states:
        for history_len in args.history:
            if model is None:
                times = asyncio.run(time_text(num_states, history_len, args))
            else:
                times = time_ids(model, num_states, history_len, args)
            slow += report(times, num_states, history_len, args, on)
    sys.exit(1 if slow else 0)


def report(
    times: Times, num_states: int, history_len: int, args: argparse.Namespace, on: Machine
) -> bool:
    """Print and keep a line; tell whether the cached turn took too long."""
    ratio = times.cached_ms / times.alone_ms
    fields = {
        "model": args.model,
        "dtype": args.dtype,
        "states": num_states,
        "history": history_len,
        "prompt_tokens": times.prompt_tokens,
        "cached_tokens": times.cached_tokens,
        "cached_ms": round(times.cached_ms, 2),
        "alone_ms": round(times.alone_ms, 2),
        "uncached_ms": round(times.uncached_ms, 1),
        "ratio": round(ratio, 3),
        "wanted": WANTED,
    }
    write_line("chat_turns", fields, on, args.out)
    return ratio > WANTED


async def time_text(num_states: int, history_len: int, args: argparse.Namespace) -> Times:
    """Measure chats of text on the bundled model."""
    name = "+".join(("knowledge", "tone")[:num_states]) or "base"
    draw = random.Random(1)
    tokenizer = Tokenizer.load(find_vocabulary(DEMO_MODEL))
    history = text_of(tokenizer, draw, history_len)
    config = EngineConfig(
        device="cpu", dtype=args.dtype, threads=args.threads, cache_bytes=CACHE_BYTES, max_rows=8
    )

    async def ask(engine: AsyncEngine, *messages: Message) -> tuple[float, str, Usage]:
        sampling = SamplingParams(max_tokens=ANSWER_LEN, seed=1, temperature=1.0)
        started = time.perf_counter()
        stream = await engine.open(GenerateRequest(name, sampling, messages=messages))
        deltas, first = [], 0.0
        async for delta in stream:
            first = first or time.perf_counter() - started
            deltas.append(delta)
        usage = deltas[-1].usage
        assert usage is not None
        return 1e3 * first, "".join(delta.text for delta in deltas), usage

    def new_words() -> Message:
        return Message("user", text_of(tokenizer, draw, NUM_NEW))

    async with AsyncEngine(config) as engine:
        await ask(engine, new_words())
        begin = Message("user", history)
        _, answer, _ = await ask(engine, begin)
        before = (begin, Message("assistant", answer))
        cached, alone = [], []
        for _ in range(args.rounds + 1):
            took, _, usage = await ask(engine, *before, new_words())
            cached.append(took)
            took, _, alone_usage = await ask(engine, new_words())
            alone.append(took)
            assert not alone_usage.cached_tokens, "the words alone are not new"
    async with AsyncEngine(replace(config, cache_bytes=0)) as engine:
        await ask(engine, new_words())
        uncached, _, _ = await ask(engine, *before, new_words())
    return Times(
        statistics.median(cached[1:]),
        statistics.median(alone[1:]),
        uncached,
        usage.prompt_tokens,
        usage.cached_tokens,
    )


def text_of(tokenizer: Tokenizer, draw: random.Random, num_tokens: int) -> str:
    """Return other words each time, of about so many tokens."""
    words: list[str] = []
    while len(tokenizer.encode(" ".join(words))) < num_tokens:
        missing = num_tokens - len(tokenizer.encode(" ".join(words)))
        words += draw.choices(WORDS, k=max(1, missing // 3))
    return " ".join(words)


def time_ids(model: object, num_states: int, history_len: int, args: argparse.Namespace) -> Times:
    """Measure prompts of token ids on a random model."""
    mixture = mixture_of(args.model, num_states)
    draw = random.Random(1)
    vocab = SHAPES[args.model].vocab_size
    config = EngineConfig(
        max_rows=8, cache_bytes=CACHE_BYTES, cache_device_bytes=CACHE_BYTES, prepare_rows=8
    )

    def new_engine(config: EngineConfig) -> Engine:
        return Engine(model, None, config, allowed_ids=range(vocab))  # type: ignore[arg-type]

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, vocab) for _ in range(count))

    engine = new_engine(config)
    history = ids(history_len)
    _, answer, _ = first_token(engine, history, mixture)
    cached, alone, num_cached = [], [], 0
    for _ in range(args.rounds + 2):
        took, _, num_cached = first_token(engine, (*history, *answer, *ids(NUM_NEW)), mixture)
        cached.append(took)
        alone.append(first_token(engine, ids(NUM_NEW), mixture)[0])
    plain = new_engine(replace(config, cache_bytes=0, cache_device_bytes=0))
    first_token(plain, ids(NUM_NEW), mixture)
    uncached, _, _ = first_token(plain, (*history, *answer, *ids(NUM_NEW)), mixture)
    return Times(
        statistics.median(cached[2:]),
        statistics.median(alone[2:]),
        uncached,
        history_len + len(answer) + NUM_NEW,
        num_cached,
    )


def mixture_of(model: str, num_states: int) -> ResolvedMixture:
    """Return the base alone, or the default mixture of so many random states."""
    cell = MixtureCell(max(1, num_states), 1, "delta", "novelty")
    mixture = resolve(cell, random_states(SHAPES[model], max(1, num_states)))
    if num_states:
        return mixture
    return replace(mixture, canonical="base", states=(None,), names=("base",), base_row=0)


def first_token(
    engine: Engine, prompt: Sequence[int], mixture: ResolvedMixture
) -> tuple[float, tuple[int, ...], int]:
    """Return milliseconds to the first token, the answer, and the tokens that were cached."""
    sampling = SamplingParams(
        temperature=1.0,
        top_p=0.7,
        seed=1,
        max_tokens=ANSWER_LEN,
        ignore_eos=True,
        sampling_order="openai",
    )
    started = time.perf_counter()
    engine.add(EngineRequest("r", tuple(prompt), mixture, sampling))
    outputs, first = [], 0.0
    while engine.has_work:
        outputs += engine.step()
        if outputs and not first:
            first = time.perf_counter() - started
    assert all(output.error is None for output in outputs)
    return 1e3 * first, tuple(o.token_id or 0 for o in outputs), outputs[0].num_cached


if __name__ == "__main__":
    main()
