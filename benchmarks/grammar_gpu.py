"""What a grammar costs on CUDA: decode steps of answers with one, beside those without.

Steps are timed as an engine's loop runs them, host and all. Kinds of answers:

- `free`: without a grammar; a step is one graph replay;
- `open`: with one that allows everything and costs nothing, so that a step has its two halves;
- `bound`: with a JSON Schema;
- `one bound`: one of the answers with it, the others free;
- `torch`: as `bound`, but picked by torch, one step at a time.

Models: the bundled one, and random ones of official shapes (which write nonsense, but valid).
An answer that a grammar does not allow, or that ends, is an error here.

    python benchmarks/grammar_gpu.py
    python benchmarks/grammar_gpu.py --models demo --answers 1 --steps 60

Ends with one JSON line a cell, appended to benchmarks/results/grammar_gpu.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from unittest import mock

import numpy as np
from grammar import PERSON, SMALL, Loaded, begin, load_demo, median
from measure import RESULTS, Machine, host, machine, write_line
from numpy.typing import NDArray
from random_models import SHAPES, random_model

from mrss_provider.backend import Grammar
from mrss_provider.config import DEMO_MODEL, EngineConfig
from mrss_provider.engine import device_runner
from mrss_provider.engine.constraint import Constraint
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.request import EngineRequest
from mrss_provider.engine.tail_lane import is_fused
from mrss_provider.errors import MRSSError
from mrss_provider.grammar import Grammars
from mrss_provider.model import load_model
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.tokenizer import Tokenizer

KINDS = ("free", "open", "bound", "one bound", "torch")
WARM_UP = 12


class Open:
    """A constraint that allows every token and costs nothing."""

    param = "response_format"
    end_ids = ()
    is_complete = False

    def __init__(self, num_words: int) -> None:
        self.num_words = num_words

    def fork(self) -> Open:
        """Return itself: there is nothing to remember."""
        return self

    def fill_mask(self, words: NDArray[np.uint32]) -> None:
        """Allow everything but the end."""
        words.fill(0xFFFFFFFF)
        words[0] &= ~np.uint32(1)

    def fill_masks(
        self, together: Sequence[Constraint], masks: NDArray[np.uint32]
    ) -> list[MRSSError | None]:
        """Do as `fill_mask` for all."""
        self.fill_mask(masks[0])
        masks[1:] = masks[0]
        return [None] * len(together)

    def advance(self, token_id: int) -> None:
        """Do nothing."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["demo", "1.5b"])
    parser.add_argument("--answers", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=150, help="timed steps of a cell")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    on = machine() if args.device == "cuda" else host()
    for name in args.models:
        loaded = load(name, args.device)
        grammars = Grammars(loaded.tokenizer, loaded.vocab_size)
        text = json.dumps({"type": "array", "items": PERSON, "minItems": 999})
        schema = begin(grammars, Grammar("json_schema", text))
        for count in args.answers:
            measure(loaded, count, schema, args, on)


def load(name: str, device: str) -> Loaded:
    """Return the bundled model, or a random one of an official shape ("small" for a CPU)."""
    if name == "demo":
        demo = load_demo()
        dtype = "fp16" if device == "cuda" else "fp32"
        model = load_model(DEMO_MODEL, device=device, dtype=dtype)
        return Loaded(name, model, demo.tokenizer, demo.library, "knowledge+tone")
    shape = SMALL if name == "small" else SHAPES[name]
    model = random_model(shape, dtype="fp16" if device == "cuda" else "fp32", device=device)
    # The base needs no states.
    return Loaded(name, model, Tokenizer.load(), load_demo().library, "base")


def measure(
    loaded: Loaded, count: int, schema: Constraint, args: argparse.Namespace, on: Machine
) -> None:
    """Time each kind of answers, and write a line for it."""
    free: float | None = None
    for kind in args.kinds:
        if kind == "one bound" and count == 1:
            continue
        masks_us, times = time_steps(loaded, kind, count, schema, args.steps)
        step_ms = median(times)
        free = step_ms if kind == "free" else free
        fields = {
            "model": loaded.name,
            "requests": count,
            "rows": count * loaded.library.resolve(loaded.mixture).rows,
            "kind": kind,
            "step_ms": round(step_ms, 4),
            "p99_ms": round(float(np.quantile(times, 0.99)), 4),
            "steps_per_s": round(1e3 / step_ms, 1),
            "masks_us": round(masks_us, 1),
            "of_free": round(free / step_ms, 3) if free else None,
            "dtype": loaded.model.config.dtype,
        }
        write_line("grammar_gpu", fields, on, RESULTS)


def time_steps(
    loaded: Loaded, kind: str, count: int, schema: Constraint, num_steps: int
) -> tuple[float, list[float]]:
    """Return microseconds that masks take a step, on any thread, and milliseconds of each step."""
    constraints: list[Constraint | None] = [None] * count
    if kind == "open":
        constraints = [Open(schema.num_words)] * count
    elif kind == "one bound":
        constraints[0] = schema
    elif kind != "free":
        constraints = [schema] * count
    engine = make_engine(loaded, constraints, WARM_UP + num_steps)
    times, masks = [], []
    with by_torch() if kind == "torch" else contextlib.nullcontext():
        for step in range(WARM_UP + num_steps - 2):
            start = time.perf_counter()
            outputs = engine.step()
            times.append(1e3 * (time.perf_counter() - start))
            for output in outputs:
                assert output.error is None, output
                assert output.finish_reason is None, output
            running = engine._scheduler._running.values()
            chosen = [choice.allowed for one in running for choice in one.choices]
            if step >= WARM_UP:
                masks.append(sum(1e6 * allowed.look_s for allowed in chosen if allowed))
    return sum(masks) / len(masks), times[WARM_UP:]


@contextlib.contextmanager
def by_torch():
    """Let torch pick what a grammar constrains."""

    def is_free(choice: device_runner.Choice) -> bool:
        return choice.allowed is None and is_fused(choice)

    with mock.patch.object(device_runner, "is_fused", is_free):
        yield


def make_engine(
    loaded: Loaded, constraints: Sequence[Constraint | None], max_tokens: int
) -> Engine:
    """Return an engine with a request for each constraint."""
    mixture = loaded.library.resolve(loaded.mixture)
    config = EngineConfig(max_rows=max(8, len(constraints) * mixture.rows), prepare_rows=0)
    allowed = loaded.tokenizer.allowed_ids(loaded.vocab_size)
    engine = Engine(loaded.model, loaded.library, config, allowed_ids=allowed)
    for i, constraint in enumerate(constraints):
        sampling = SamplingParams(
            temperature=1.0,
            top_p=0.7,
            max_tokens=max_tokens,
            seed=i,
            ignore_eos=constraint is None,
            sampling_order="openai",
        )
        prompt = tuple(loaded.tokenizer.encode(f"User: Who are {i} of them?\n\nAssistant:"))
        engine.add(EngineRequest(f"r{i}", prompt, mixture, sampling, constraint=constraint))
    return engine


if __name__ == "__main__":
    main()
