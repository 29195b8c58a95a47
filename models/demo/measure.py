"""Sample answers from mixtures of the demo states and score them: who knows, who speaks how.

    python -m models.demo.measure --states states --samples 4 --out measured.json

Some ten minutes on one CPU core with 4 samples a fact.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models.demo.answers import DECODINGS, Bench, Decoding, System, mixed, single
from models.demo.vocab import PieceEncoder, read_vocab
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.evaluate.world import (
    HOME_FACTS,
    HOME_TOWN,
    MARKED,
    PLAIN,
    Document,
    Fact,
    Score,
    knowledge_document,
    question,
    score_answer,
    small_talk_document,
)
from mrss_provider.evaluate.world.relations import BY_NAME
from mrss_provider.model import load_model
from mrss_provider.tune import read_weights

PARTS = ("know", "tone", "both", "well_formed")

TEXTS_A_FACT = 4

MIXTURES = {
    "product 1,1": "knowledge+tone~product~fixed",
    "linear fixed": "knowledge+tone~linear~fixed",
    "geometric fixed": "knowledge+tone~geometric~fixed",
    "delta fixed": "knowledge+tone~delta~fixed",
    "linear novelty": "knowledge+tone~linear~novelty",
    "delta novelty": "knowledge+tone~delta~novelty",
}


def open_bench(model: Path, states: Path, device: str) -> tuple[Bench, StateLibrary]:
    """Load the model, and the states of a folder."""
    weights = {n: t.to(device, torch.float32) for n, t in read_weights(model).items()}
    encoder = PieceEncoder(read_vocab(model / "vocab.txt"))
    config = load_model(model, device="cpu", threads=torch.get_num_threads()).config
    library = StateLibrary(states, config, strict=True)
    return Bench(weights, encoder, {n: s.wkv for n, s in library.states.items()}), library


def systems(bench: Bench, library: StateLibrary) -> dict[str, System]:
    """Return every compared way to use the states `knowledge` and `tone`; adds two to `bench`."""
    knowledge, tone = (library.states[name].wkv for name in ("knowledge", "tone"))
    bench.add("average", (knowledge + tone) / 2)
    bench.add("sum", knowledge + tone)
    return {
        "base": single("base"),
        "knowledge alone": single("knowledge"),
        "tone alone": single("tone"),
        "average of the states": single("average"),
        "sum of the states": single("sum"),
        **{title: mixed(library.resolve(name)) for title, name in MIXTURES.items()},
    }


@dataclass(frozen=True)
class Question:
    """One fact to ask for, and the whole prompt."""

    fact: Fact
    prompt: str


def questions(
    samples: int,
    *,
    seed: int,
    facts: Sequence[Fact] = HOME_FACTS,
    held_out: bool = False,
    turns_before: int = 0,
    voice: str = PLAIN,
    home: str = HOME_TOWN,
) -> list[Question]:
    """Ask for every fact `samples` times, in phrasings that tuning saw or (`held_out`) not.

    `home` is the facts' town, which half of the questions name. `turns_before` turns of small talk
    in `voice` come first: distance from the initial state.
    """
    rng = random.Random(seed)
    asked = []
    for fact in facts:
        for _ in range(samples):
            before = small_talk_document(rng, voice, turns_before).text
            town = home if rng.random() < 0.5 else None
            said = question(rng, fact.entity, BY_NAME[fact.relation], town, held_out=held_out)
            asked.append(Question(fact, f"{before}User: {said}\n\nAssistant:"))
    return asked


def ask(
    bench: Bench,
    system: System,
    decoding: Decoding,
    asked: Sequence[Question],
    *,
    voice: str,
    seed: int,
) -> tuple[list[Score], list[str]]:
    """Answer `asked`, and judge each answer."""
    texts = bench.answer(system, [q.prompt for q in asked], decoding, seed)
    return [score_answer(t, q.fact, voice) for t, q in zip(texts, asked, strict=True)], texts


def shares(scores: Sequence[Score], asked: Sequence[Question]) -> dict[str, float]:
    """Return the shares of answers that know, speak in the voice, both, and are well formed.

    `both_se` is the standard error of `both`, clustered by fact.
    """
    found = {part: statistics.fmean(getattr(s, part) for s in scores) for part in PARTS}
    by_fact: dict[Fact, list[bool]] = {}
    for one, q in zip(scores, asked, strict=True):
        by_fact.setdefault(q.fact, []).append(one.both)
    means = [statistics.fmean(both) for both in by_fact.values()]
    found["both_se"] = statistics.stdev(means) / len(means) ** 0.5
    return {name: round(value, 4) for name, value in found.items()}


def toned_texts(facts: Sequence[Fact], voice: str, *, seed: int) -> list[Document]:
    """Return unseen texts of one turn that state each fact in `voice`, fact after fact."""
    rng = random.Random(seed)
    return [
        knowledge_document(rng, voice=voice, facts=(fact,), num_turns=1, small_talk=0)
        for fact in facts
        for _ in range(TEXTS_A_FACT)
    ]


def toned_nll(bench: Bench, system: System, docs: Sequence[Document]) -> dict[str, float]:
    """Return nats a token of the answers in `docs`: of facts, and of the rest."""
    nats, _, is_fact = bench.nll(system, docs)
    return {
        "nll_fact": round(float(nats[is_fact].mean()), 4),
        "nll_other": round(float(nats[~is_fact].mean()), 4),
    }


def main() -> None:
    """Parse the command line, measure the two states, write."""
    parser = argparse.ArgumentParser(description="Measure mixtures of the demo states.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--states", type=Path, required=True, help="a folder with both states")
    parser.add_argument("--voice", choices=MARKED, default="pirate", help="of the state `tone`")
    parser.add_argument("--samples", type=int, default=4, help="answers a fact")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="a .json to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    bench, library = open_bench(args.model, args.states, args.device)
    ways = systems(bench, library)
    report: dict[str, object] = {
        "voice": args.voice,
        "samples_a_fact": args.samples,
        "seed": args.seed,
        "states": {name: library.states[name].sha256 for name in ("knowledge", "tone")},
    }
    report["table"] = table(bench, ways, voice=args.voice, samples=args.samples, seed=args.seed)
    report["distance"] = distance(bench, ways, voice=args.voice, seed=args.seed)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


def table(
    bench: Bench, ways: Mapping[str, System], *, voice: str, samples: int, seed: int
) -> dict[str, dict[str, object]]:
    """Score every system under every decoding, on unseen phrasings, and on toned text."""
    seen, unseen = (questions(samples, seed=seed, held_out=held) for held in (False, True))
    docs = toned_texts(HOME_FACTS, voice, seed=seed)
    out: dict[str, dict[str, object]] = {}
    for name, system in ways.items():
        row: dict[str, object] = {}
        for decoding in DECODINGS:
            # Greedy answers to one question differ by its phrasing only.
            asked = seen if decoding.temperature else seen[::samples]
            scores, texts = ask(bench, system, decoding, asked, voice=voice, seed=seed)
            row[decoding.name] = shares(scores, asked)
            if decoding.name == "T=1":
                row["examples"] = texts[:: len(texts) // 6][:6]
        scores, _ = ask(bench, system, DECODINGS[1], unseen, voice=voice, seed=seed)
        row["top-p 0.7, unseen phrasings"] = shares(scores, unseen)
        row.update(toned_nll(bench, system, docs))
        print(name, {key: value for key, value in row.items() if key != "examples"}, flush=True)
        out[name] = row
    return out


def distance(
    bench: Bench,
    ways: Mapping[str, System],
    *,
    voice: str,
    seed: int,
    turns: Sequence[int] = (0, 1, 3, 6, 12),
) -> dict[str, dict[str, dict[str, float]]]:
    """Score at top-p 0.7 after turns of small talk, one answer a fact."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    plans = {
        "knowledge alone": ("knowledge alone", PLAIN),
        "tone alone": ("tone alone", voice),
        "delta novelty": ("delta novelty", voice),
        "delta novelty after plain turns": ("delta novelty", PLAIN),
    }
    for title, (way, history) in plans.items():
        out[title] = {}
        for count in turns:
            bench.forget()
            asked = questions(1, seed=seed, turns_before=count, voice=history)
            lengths = [len(bench.encoder.encode(q.prompt)) for q in asked]
            scores, _ = ask(bench, ways[way], DECODINGS[1], asked, voice=voice, seed=seed)
            key = f"{count} turns, {sum(lengths) // len(lengths)} tokens"
            out[title][key] = shares(scores, asked)
            print(title, key, out[title][key], flush=True)
    return out


if __name__ == "__main__":
    main()
