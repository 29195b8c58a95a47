"""Measure how the bundled states fade, and what giving them anew at turns does about it.

    python -m models.demo.measure_fading --out benchmarks/results/fading.json

Every cell asks for facts after turns of small talk, with the engine, at top-p 0.7: once as it is,
and once with `reinject = "turn"`. Some ten minutes of one CPU core. What the file has is kept, so a
run that was left goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from mrss_provider import AsyncEngine, EngineConfig
from mrss_provider.backend import GenerateRequest, Message, MixtureOptions, Reinject
from mrss_provider.evaluate.statistics import interval
from mrss_provider.evaluate.task import messages_of
from mrss_provider.evaluate.world import (
    HOME_FACTS,
    HOME_TOWN,
    NUM_SETTLED,
    OTHER_TOWNS,
    PLAIN,
    RELATIONS,
    Fact,
    question,
    score_answer,
    small_talk_document,
)
from mrss_provider.evaluate.world.lexicon import PLACES
from mrss_provider.evaluate.world.relations import BY_NAME
from mrss_provider.evaluate.world.voices import capital
from mrss_provider.sampling_params import SamplingParams

_TOLD_TOWN = "Dunmore"


def _told_facts() -> tuple[Fact, ...]:
    """Draw facts of places that no town of the states' has, to be told at the head of a chat."""
    rng = random.Random(3)
    relations = [relation for relation in RELATIONS if relation.kind == "place"]
    kept = [(place, relation) for place in PLACES[NUM_SETTLED:] for relation in relations]
    return tuple(
        Fact(place, relation.name, rng.choice(relation.values))
        for place, relation in rng.sample(kept, 36)
    )


HOMES: dict[str, tuple[str, Sequence[Fact]]] = {
    # The half that no state, gate or weight was chosen on.
    "knowledge": (HOME_TOWN, HOME_FACTS[1::2]),
    "long-ferry": ("Long Ferry", OTHER_TOWNS["Long Ferry"].facts),
    # What no state knows, and a system message says.
    "told": (_TOLD_TOWN, _told_facts()),
}
TURNS = (0, 1, 2, 5, 10)
PARTS = ("know", "tone", "both")
SAMPLING = SamplingParams(temperature=1.0, top_p=0.7, max_tokens=64)
_AT_ONCE = 16

Share = dict[str, list[float]]
"""By part: the mean and its 95 % interval over facts."""


@dataclass(frozen=True)
class Line:
    """A mixture that is asked at every distance.

    Attributes:
        mixture: a name that the engine understands.
        town: whose facts are asked for, by its state.
        voice: that is wanted.
        history: the voice of the talk before the question.
        wanted: the part that the line is about.
    """

    mixture: str
    town: str
    voice: str
    history: str
    wanted: str

    @property
    def about(self) -> str:
        """What a table calls it."""
        told = ", facts told in the chat" if self.town == "told" else ""
        return f"`{self.mixture}`, {talk_of(self.history)}{told}"


def talk_of(history: str) -> str:
    """Return what a table calls the talk before a question."""
    return "plain talk" if history == PLAIN else f"a {history}'s talk"


LINES = (
    Line("knowledge+tone", "knowledge", "pirate", "pirate", "both"),
    Line("knowledge+tone", "knowledge", "pirate", PLAIN, "both"),
    Line("knowledge", "knowledge", PLAIN, PLAIN, "know"),
    Line("knowledge", "knowledge", PLAIN, "pirate", "know"),
    Line("tone", "knowledge", "pirate", "pirate", "tone"),
    Line("tone", "knowledge", "pirate", PLAIN, "tone"),
    Line("long-ferry+wizard", "long-ferry", "wizard", "wizard", "both"),
    Line("knowledge+tone~linear~novelty", "knowledge", "pirate", "pirate", "both"),
    Line("knowledge+tone", "told", "pirate", "pirate", "both"),
)


@dataclass(frozen=True)
class Question:
    """A fact to ask for, and the chat that ends with it."""

    fact: Fact
    messages: tuple[Message, ...]


def questions(line: Line, turns: int, samples: int, seed: int) -> list[Question]:
    """Ask for every fact `samples` times after so many turns of small talk."""
    home, facts = HOMES[line.town]
    rng = random.Random(f"{home} {line.history} {turns} {seed}")
    asked = []
    for fact in facts:
        for _ in range(samples):
            before = messages_of(small_talk_document(rng, line.history, turns))
            if line.town == "told":
                notes = f"Notes about {home}: {capital(rng.choice(fact.statements()))}."
                before = (Message("system", notes), *before)
            town = home if rng.random() < 0.5 else None
            said = question(rng, fact.entity, BY_NAME[fact.relation], town, held_out=False)
            asked.append(Question(fact, (*before, Message("user", said))))
    return asked


async def answers(
    engine: AsyncEngine, mixture: str, asked: Sequence[Question], reinject: Reinject, seed: int
) -> tuple[list[str], float]:
    """Return an answer to each question, and the prompts' mean length in tokens."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def answer(place: int, one: Question) -> tuple[str, int]:
        async with room:
            request = GenerateRequest(
                model=mixture,
                # The same random numbers with and without.
                sampling=replace(SAMPLING, seed=seed * 1_000_003 + place),
                messages=one.messages,
                mixture=MixtureOptions(reinject=reinject),
            )
            stream = await engine.open(request)
            try:
                return "".join([delta.text async for delta in stream]), stream.info.prompt_tokens
            finally:
                await stream.aclose()

    found = await asyncio.gather(*[answer(place, one) for place, one in enumerate(asked)])
    return [text for text, _ in found], statistics.fmean(length for _, length in found)


def judged(line: Line, asked: Sequence[Question], texts: Sequence[str]) -> Share:
    """Return the shares of answers that know, have the voice, and both."""
    scores = [score_answer(t, q.fact, line.voice) for t, q in zip(texts, asked, strict=True)]
    numbers = {fact: i for i, fact in enumerate(dict.fromkeys(q.fact for q in asked))}
    places = [numbers[q.fact] for q in asked]
    shares: Share = {}
    for part in PARTS:
        share = interval([float(getattr(score, part)) for score in scores], places)
        shares[part] = [round(value, 3) for value in (share.mean, share.low, share.high)]
    return shares


def cells() -> Iterator[tuple[Line, int, Reinject]]:
    """Yield what is asked. A first turn is never given anything anew, so it is asked once."""
    for line in LINES:
        for turns in TURNS:
            for reinject in get_args(Reinject) if turns else ("never",):
                yield line, turns, reinject


async def measure(report: dict[str, Any], out: Path) -> None:
    """Fill a report with the cells that it lacks, and write it after each."""
    async with AsyncEngine(EngineConfig(device="cpu", threads=1)) as engine:
        for line, turns, reinject in cells():
            row = report["cells"].setdefault(line.about, {})
            key = f"{turns} {reinject}"
            if key in row:
                continue
            asked = questions(line, turns, report["samples_a_fact"], report["seed"])
            texts, length = await answers(engine, line.mixture, asked, reinject, report["seed"])
            row[key] = {"prompt_tokens": round(length), **judged(line, asked, texts)}
            print(line.about, key, row[key], flush=True)
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _names() -> Iterator[str]:
    """Yield the states that are asked."""
    for line in LINES:
        yield from line.mixture.partition("~")[0].split("+")


def _sha256(name: str) -> str:
    path = EngineConfig.states / f"{name}.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Parse the command line, ask, write."""
    parser = argparse.ArgumentParser(description="Measure how the bundled states fade.")
    parser.add_argument("--samples", type=int, default=2, help="answers a fact")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="a .json to write")
    args = parser.parse_args()
    told = {
        "samples_a_fact": args.samples,
        "seed": args.seed,
        "top_p": SAMPLING.top_p,
        "states": {name: _sha256(name) for name in sorted(set(_names()))},
        "lines": [asdict(line) for line in LINES],
    }
    report: dict[str, Any] = {**told, "cells": {}}
    if args.out.exists():
        report = json.loads(args.out.read_text(encoding="utf-8"))
        if any(report[key] != value for key, value in told.items()):
            raise SystemExit(f"{args.out} is of other questions; remove it, or give another --out")
    asyncio.run(measure(report, args.out))


if __name__ == "__main__":
    main()
