"""What a grammar costs on a CPU: compiling it, each token's mask, and a step of an answer under it.

Vocabularies: the bundled model's, and World (65,536 logits) on a small random model. Cells:

- `vocabulary`: making llguidance's form of it, once a model, when the first grammar is asked for;
- `compile`: each grammar, and the time of a request whose grammar is there already (`hit_us`);
- `mask`: finding a token's mask along answers drawn evenly from what is allowed, and writing it to
  three rows of logits;
- `step`: a decode step of some answers, without a grammar and with one. Masks are found by other
  threads while the model computes, where that pays, else behind it: `masks_ms` is what they take,
  `exposed_ms` what is left of it when the model is done.

    python benchmarks/grammar.py
    python benchmarks/grammar.py --steps 100

Steps are timed in turns, in CPU time of the engine's thread and in wall time, medians. An answer
that ends with an error is one here. Ends with one JSON line a cell, appended to
benchmarks/results/grammar.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from measure import RESULTS, host, write_line
from random_models import Shape, random_model

from mrss_provider.backend import Grammar
from mrss_provider.config import BUNDLED_STATES, DEMO_MODEL, EngineConfig
from mrss_provider.engine.constraint import AllowedTokens, MaskWorkers, constrain
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.request import EngineRequest
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.grammar import GrammarConstraint, Grammars
from mrss_provider.model import Model, load_model
from mrss_provider.model.cpu import configure_cpu
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.tokenizer import Tokenizer, find_vocabulary

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}},
        "kind": {"enum": ["alpha", "beta", "gamma"]},
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "ok": {"type": "boolean"}},
            "required": ["x", "ok"],
        },
    },
    "required": ["name", "age", "tags", "kind", "place"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": Grammar("json_schema", json.dumps(PERSON)),
    "json_object": Grammar("json_schema", '{"type": "object"}'),
    "regex": Grammar("regex", r"[a-z]{3,10}@[a-z]{2,8}\.(com|org)"),
    "lark": Grammar("lark", 'start: "yes" | "no" | /[0-9]+/'),
}
SMALL = Shape(4, 512, (64, 64, 32, 64))
NUM_WALKS = 20
MAX_WALK_LEN = 100
LOOKING = MaskWorkers.looking


@dataclass(frozen=True)
class Loaded:
    """A model, its vocabulary, and which mixture answers."""

    name: str
    model: Model
    tokenizer: Tokenizer
    library: StateLibrary
    mixture: str

    @property
    def vocab_size(self) -> int:
        """Logits."""
        return self.model.config.vocab_size


class Watched:
    """Stands in for `MaskWorkers.looking`, and notes what is left to do when the model is done.

    Attributes:
        spent_s: seconds in which masks were found, on any thread.
        exposed_s: seconds after the model's part of the step until all masks were there.
    """

    def __init__(self) -> None:
        self.spent_s = self.exposed_s = 0.0

    @contextlib.contextmanager
    def looking(
        self, workers: MaskWorkers, answers: Sequence[AllowedTokens | None]
    ) -> Iterator[None]:
        """Do as `MaskWorkers.looking`."""
        waiting = LOOKING(workers, answers)
        waiting.__enter__()
        try:
            yield
        finally:
            start = time.perf_counter()
            waiting.__exit__(None, None, None)
            self.exposed_s += time.perf_counter() - start
            self.spent_s += sum(answer.look_s for answer in answers if answer is not None)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="tokens of each timed answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answers", nargs="+", type=int, default=[1, 16])
    args = parser.parse_args()
    configure_cpu(threads=1)
    machine = host()
    for loaded in (load_demo(), load_world()):
        for cell in (*compile_cells(loaded), *mask_cells(loaded), *step_cells(loaded, args)):
            write_line("grammar", cell, machine, RESULTS)


def load_demo() -> Loaded:
    """Return the bundled model."""
    model = load_model(DEMO_MODEL, device="cpu", dtype="fp32", threads=1)
    tokenizer = Tokenizer.load(find_vocabulary(DEMO_MODEL))
    library = StateLibrary(BUNDLED_STATES, model.config)
    return Loaded("demo", model, tokenizer, library, "knowledge+tone")


def load_world() -> Loaded:
    """Return a small random model with the World vocabulary."""
    model = random_model(SMALL, dtype="fp32", device="cpu")
    return Loaded(
        "world",
        model,
        Tokenizer.load(),
        StateLibrary(Path(tempfile.mkdtemp()), model.config),
        "base",
    )


def compile_cells(loaded: Loaded) -> Iterator[dict[str, object]]:
    """Time what happens once: the vocabulary, and each grammar."""
    grammars = Grammars(loaded.tokenizer, loaded.vocab_size)
    start = time.perf_counter()
    grammars._known()
    yield cell(loaded, "vocabulary", build_ms=1e3 * (time.perf_counter() - start))
    for name, grammar in GRAMMARS.items():
        times = []
        for i in range(9):
            # Another text each time, so that each is compiled.
            text = grammar.text + " " * i if grammar.kind != "regex" else grammar.text + f"x{{{i}}}"
            start = time.perf_counter()
            begin(grammars, Grammar(grammar.kind, text))
            times.append(1e3 * (time.perf_counter() - start))
        hit_us = asyncio.run(time_hits(grammars, Grammar(grammar.kind, text)))
        yield cell(loaded, "compile", grammar=name, median_ms=median(times), hit_us=hit_us)


async def time_hits(grammars: Grammars, grammar: Grammar, num_hits: int = 50) -> float:
    """Return microseconds until the constraint of a grammar that is compiled is there."""
    times = []
    for _ in range(num_hits):
        start = time.perf_counter()
        await grammars.begin(grammar)
        times.append(1e6 * (time.perf_counter() - start))
    return median(times)


def mask_cells(loaded: Loaded) -> Iterator[dict[str, object]]:
    """Time masks along random answers."""
    grammars = Grammars(loaded.tokenizer, loaded.vocab_size)
    for name, grammar in GRAMMARS.items():
        looks, writes = [], []
        for seed in range(NUM_WALKS):
            constraint = begin(grammars, grammar)
            answer = AllowedTokens(constraint, ())
            for _ in range(MAX_WALK_LEN):
                start = time.thread_time()
                answer.look()
                looked = time.thread_time()
                logits = torch.zeros(3, loaded.vocab_size)
                cleared = time.thread_time()
                constrain(logits, [range(3)], [answer])
                writes.append(1e6 * (time.thread_time() - cleared))
                looks.append(1e6 * (looked - start))
                allowed = logits[0].isfinite().nonzero().flatten().tolist()
                token_id = random.Random(seed * MAX_WALK_LEN + len(looks)).choice(allowed)
                if answer.advance(token_id):
                    break
        yield cell(
            loaded,
            "mask",
            grammar=name,
            median_us=median(looks),
            p99_us=sorted(looks)[len(looks) * 99 // 100],
            write_us=median(writes),
        )


def step_cells(loaded: Loaded, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Time decode steps of one answer and of several."""
    for num_answers in args.answers:
        yield step_cell(loaded, args, num_answers)


def step_cell(loaded: Loaded, args: argparse.Namespace, num_answers: int) -> dict[str, object]:
    """Time decode steps with and without a grammar, in turns."""
    grammars = Grammars(loaded.tokenizer, loaded.vocab_size)
    grammar = Grammar("json_schema", json.dumps({"type": "array", "items": PERSON, "minItems": 99}))
    threads: dict[str, list[float]] = {"free": [], "bound": []}
    walls: dict[str, list[float]] = {name: [] for name in threads}
    watched = Watched()
    for turn in range(args.rounds):
        for name in threads:
            constraint = None if name == "free" else begin(grammars, grammar)
            # The first turn warms up.
            own = watched if turn else Watched()
            with mock.patch.object(MaskWorkers, "looking", lambda *x, own=own: own.looking(*x)):
                thread, wall = time_steps(
                    loaded, constraint, args.steps, seed=turn, num_answers=num_answers
                )
            if turn:
                threads[name] += thread
                walls[name] += wall
    num_steps = len(threads["bound"])
    found = {f"{name}_thread_ms": median(times) for name, times in threads.items()}
    found |= {f"{name}_wall_ms": median(times) for name, times in walls.items()}
    return cell(
        loaded,
        "step",
        answers=num_answers,
        **found,
        masks_ms=1e3 * watched.spent_s / num_steps,
        exposed_ms=1e3 * watched.exposed_s / num_steps,
        share_hidden=max(0.0, 1 - watched.exposed_s / watched.spent_s),
    )


def time_steps(
    loaded: Loaded,
    constraint: GrammarConstraint | None,
    num_steps: int,
    *,
    seed: int,
    num_answers: int,
) -> tuple[list[float], list[float]]:
    """Return milliseconds of each step's thread and of the wall."""
    allowed = loaded.tokenizer.allowed_ids(loaded.vocab_size)
    config = EngineConfig(max_rows=64)
    engine = Engine(loaded.model, loaded.library, config, allowed_ids=allowed)
    sampling = SamplingParams(
        temperature=1.0,
        top_p=1.0,
        max_tokens=num_steps,
        seed=seed,
        ignore_eos=constraint is None,
        sampling_order="openai",
    )
    prompt = tuple(loaded.tokenizer.encode("User: Who are they?\n\nAssistant:"))
    mixture = loaded.library.resolve(loaded.mixture)
    engine.add(EngineRequest("x", prompt, mixture, sampling, num_answers, constraint=constraint))
    engine.step()
    threads, walls, answer = [], [], []
    while engine.has_work:
        wall, thread = time.perf_counter(), time.thread_time()
        outputs = engine.step()
        threads.append(1e3 * (time.thread_time() - thread))
        walls.append(1e3 * (time.perf_counter() - wall))
        answer += [output for output in outputs if output.error is None]
        assert not any(output.error for output in outputs)
    assert len(answer) == num_answers * (num_steps - 1)
    return threads, walls


def begin(grammars: Grammars, grammar: Grammar) -> GrammarConstraint:
    """Return the constraint of an answer."""
    return asyncio.run(grammars.begin(grammar))


def cell(loaded: Loaded, what: str, **found: object) -> dict[str, object]:
    """Return what was measured, rounded."""
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
    return {"vocabulary": loaded.name, "what": what, **rounded}


def median(times: Sequence[float]) -> float:
    """Return the middle one."""
    return float(np.median(times))


if __name__ == "__main__":
    main()
