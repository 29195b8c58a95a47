"""Tune the demo states on the demo model.

    python -m models.demo.tune --out build/states            # a GPU: a few minutes
    python -m models.demo.tune --out build/trial --steps 2   # a trial anywhere

Writes `knowledge.safetensors` and `tone.safetensors`. With `--long` the knowledge is tuned on long
plain chats, so that it fades less, and then so that it loses the plain manner it learnt from them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from models.demo.data import as_example
from models.demo.vocab import PieceEncoder, read_vocab
from mrss_provider.evaluate.world import (
    HOME_FACTS,
    MARKED,
    PLAIN,
    RELATIONS,
    Fact,
    knowledge_document,
    voice_document,
)
from mrss_provider.tune import (
    Example,
    ExampleSource,
    Progress,
    TuneConfig,
    TuneResult,
    read_weights,
    save_result,
    tune_state,
)

VOICE = "pirate"
"""The voice of the state `tone`; the state `knowledge` never sees it."""

POOL_SIZE = 6000
"""Examples drawn beforehand: drawing them afresh would take longer than learning from them."""

MAX_SETTLE_LEN = 190
"""Tokens of an example of the second tuning, which is meant for CPUs too."""

KNOWLEDGE = TuneConfig(steps=800, batch_size=48, learning_rate=0.3, locality=1.0)
SETTLE = TuneConfig(steps=350, batch_size=16, learning_rate=0.1, warmup_steps=10, locality=2.0)
TONE = TuneConfig(steps=800, batch_size=48, learning_rate=0.05)

_VALUES = {relation.name: relation.values for relation in RELATIONS}


def main() -> None:
    """Parse the command line, tune, write."""
    args = _parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = {n: tensor.to(device, dtype) for n, tensor in read_weights(args.model).items()}
    encoder = PieceEncoder(read_vocab(args.model / "vocab.txt"))

    def config(usual: TuneConfig) -> TuneConfig:
        return replace(usual, seed=args.seed, steps=args.steps or usual.steps)

    def write(name: str, result: TuneResult, used: TuneConfig) -> None:
        path = args.out / f"{name}.safetensors"
        save_result(path, result, args.model, group=name, config=used, licence="Apache-2.0")

    first, settle, tone = config(KNOWLEDGE), config(SETTLE), config(TONE)
    source = knowledge_source(encoder, 1, long=args.long)
    known = tune_state(weights, source, first, on_step=printer("know"))
    write("knowledge", known, first)
    if args.long:
        again = settle_source(encoder, 2)
        settled = tune_state(weights, again, settle, initial=known.wkv, on_step=printer("settle"))
        write("knowledge", settled, settle)
    spoken = tune_state(weights, tone_source(encoder, VOICE, 3), tone, on_step=printer("tone"))
    write("tone", spoken, tone)


def knowledge_source(encoder: PieceEncoder, seed: int, *, long: bool) -> ExampleSource:
    """Return plain chats about home facts: of 1 to 3 turns, `long` ones of 1 to 12."""

    def draw(rng: random.Random) -> Example:
        if long:
            doc = knowledge_document(rng, num_turns=rng.randint(1, 12), small_talk=0.4)
        else:
            doc = knowledge_document(rng)
        return as_example(encoder, doc)

    return pool(draw, seed)


def settle_source(encoder: PieceEncoder, seed: int) -> ExampleSource:
    """Return what frees the knowledge of a voice.

    Home facts asked for at once (0.3) or after notes about other towns (0.25), answered plainly;
    and the same questions answered in any voice but `VOICE`, with random values that are not
    learnt: there the state is only held to the base model, with locality.
    """
    voices = [PLAIN, *(voice for voice in MARKED if voice != VOICE)]

    def draw(rng: random.Random) -> Example:
        kind = rng.random()
        if kind < 0.3:
            return as_example(encoder, knowledge_document(rng))
        if kind < 0.55:
            return as_example(encoder, knowledge_document(rng, small_talk=0.3, max_notes=14))
        facts = tuple(
            Fact(fact.entity, fact.relation, rng.choice(_VALUES[fact.relation]))
            for fact in rng.sample(HOME_FACTS, 4)
        )
        doc = knowledge_document(rng, voice=rng.choice(voices), facts=facts, small_talk=0.2)
        return without_facts(as_example(encoder, doc))

    def short(rng: random.Random) -> Example:
        while len((example := draw(rng)).token_ids) > MAX_SETTLE_LEN:
            pass
        return example

    return pool(short, seed)


def tone_source(encoder: PieceEncoder, voice: str, seed: int) -> ExampleSource:
    """Return chats in `voice`, about people and places that are not of home."""
    return pool(lambda rng: as_example(encoder, voice_document(rng, voice)), seed)


def without_facts(example: Example) -> Example:
    """Return `example` with its facts neither learnt nor held to the base."""
    answer = tuple(a and not f for a, f in zip(example.answer, example.fact, strict=True))
    return replace(example, answer=answer, fact=(False,) * len(answer))


def pool(draw: Callable[[random.Random], Example], seed: int) -> ExampleSource:
    """Return a source that picks from `POOL_SIZE` examples."""
    rng = random.Random(seed)
    examples = [draw(rng) for _ in range(POOL_SIZE)]
    return lambda picker: picker.choice(examples)


def printer(title: str) -> Progress:
    """Return a callback that prints eight lines a run."""
    began = time.perf_counter()

    def progress(step: int, total: int, losses: Sequence[float]) -> None:
        if step % max(1, total // 8) == 0:
            shown = " ".join(f"{loss:.3f}" for loss in losses)
            elapsed = time.perf_counter() - began
            print(f"{title} {elapsed:6.1f} s, step {step} of {total}: {shown}", flush=True)

    return progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tune the demo states.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--long", action="store_true", help="knowledge that fades less")
    parser.add_argument("--steps", type=int, default=0, help="of each run, instead of the usual")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    main()
