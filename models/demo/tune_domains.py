"""Tune two states of knowledge that each know one half of the home town, on a CPU.

    python -m models.demo.tune_domains --out build/domains

Both learn plain chats with a loss on all tokens, so that they know which questions are theirs, and
no locality. With the bundled voice beside them they are what `posterior-novelty` is for. 400 steps
take some four minutes on one core.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

import torch

from models.demo.data import as_example
from models.demo.tune import pool, printer
from models.demo.vocab import PieceEncoder, read_vocab
from mrss_provider.config import EngineConfig
from mrss_provider.evaluate.world import HOME_FACTS, Fact, knowledge_document
from mrss_provider.tune import (
    Example,
    ExampleSource,
    TuneConfig,
    TuneJob,
    read_weights,
    save_result,
    tune_states,
)

_PLACES = tuple(dict.fromkeys(fact.entity for fact in HOME_FACTS if fact.kind == "place"))


def _about(places: tuple[str, ...]) -> tuple[Fact, ...]:
    return tuple(fact for fact in HOME_FACTS if fact.entity in places)


DOMAINS = {"inner": _about(_PLACES[:6]), "outer": _about(_PLACES[6:])}
"""24 facts of six places for each of the two states."""

CONFIG = TuneConfig(
    steps=400,
    batch_size=8,
    learning_rate=0.5,
    warmup_steps=5,
    loss_on="all",
    max_len=64,
    seed=7,
)


def domain_source(encoder: PieceEncoder, facts: tuple[Fact, ...]) -> ExampleSource:
    """Return plain chats of one turn about `facts`."""

    def draw(rng: random.Random) -> Example:
        doc = knowledge_document(rng, facts=facts, num_turns=1, small_talk=0.0)
        return as_example(encoder, doc)

    return pool(draw, seed=1)


def main() -> None:
    """Parse the command line, tune both at once, write them and copy the voice."""
    parser = argparse.ArgumentParser(description="Tune two states of knowledge.")
    parser.add_argument("--model", type=Path, default=EngineConfig.model)
    parser.add_argument("--states", type=Path, default=EngineConfig.states, help="of the voice")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    weights = {name: tensor.float() for name, tensor in read_weights(args.model).items()}
    encoder = PieceEncoder(read_vocab(args.model / "vocab.txt"))
    jobs = [TuneJob(domain_source(encoder, facts), CONFIG) for facts in DOMAINS.values()]
    results = tune_states(weights, jobs, on_step=printer("domains"))
    for name, result in zip(DOMAINS, results, strict=True):
        path = args.out / f"{name}.safetensors"
        save_result(
            path, result, args.model, group="knowledge", config=CONFIG, licence="Apache-2.0"
        )
    shutil.copy(args.states / "tone.safetensors", args.out)


if __name__ == "__main__":
    main()
