"""Sample answers from mixtures of the demo states and score them: who knows, who speaks how.

    python -m models.demo.measure --states states --samples 4 --out measured.json

The merge rules and gates are the engine's own; only the sampling loop is written for throughput.
Some 15 minutes on one CPU core with 4 samples a fact.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.demo.data import as_example
from models.demo.vocab import PieceEncoder, read_vocab
from mrss_provider.engine.gates import GATES
from mrss_provider.engine.merge import MERGE_RULES, Rows
from mrss_provider.evaluate.world import (
    HOME_FACTS,
    HOME_TOWN,
    MARKED,
    PLAIN,
    Fact,
    knowledge_document,
    question,
    score_answer,
    small_talk_document,
)
from mrss_provider.evaluate.world.relations import BY_NAME
from mrss_provider.model import load_model, load_tuned_state
from mrss_provider.tune import read_weights
from mrss_provider.tune.examples import make_batch
from mrss_provider.tune.network import Shape, Weights, forward, logits, start_state

Merge = Callable[[Tensor], Tensor]
"""Logits of the rows [G, K, V] -> logits [G, V]."""

CUT = 0.1
MAX_NEW = 56


@dataclass(frozen=True)
class System:
    """A way to answer: the rows' states [K, L, H, N, N] and how their logits become one."""

    states: Tensor
    merge: Merge


@dataclass(frozen=True)
class Decoding:
    """How to draw a token. Temperature 0 is greedy."""

    name: str
    temperature: float
    top_p: float


def decodings() -> tuple[Decoding, ...]:
    """Return T=1, the same with top-p 0.7, and greedy."""
    return Decoding("T=1", 1.0, 1.0), Decoding("top-p 0.7", 1.0, 0.7), Decoding("greedy", 0.0, 1.0)


def systems(knowledge: Tensor, tone: Tensor) -> dict[str, System]:
    """Return every compared way to use the two states [L, H, N, N]."""
    base = torch.zeros_like(knowledge)
    both, three = torch.stack([knowledge, tone]), torch.stack([base, knowledge, tone])
    single: dict[str, Tensor] = {
        "base": base,
        "knowledge alone": knowledge,
        "tone alone": tone,
        "average of the states": (knowledge + tone) / 2,
        "sum of the states": knowledge + tone,
    }
    out = {name: System(state[None], lambda rows: rows[:, 0]) for name, state in single.items()}
    out["product 1,1"] = System(both, lambda rows: rows.log_softmax(-1).sum(1))
    for merge, gate in (
        ("linear", "fixed"),
        ("geometric", "fixed"),
        ("delta", "fixed"),
        ("linear", "novelty"),
        ("delta", "novelty"),
    ):
        out[f"{merge} {gate}"] = System(three, _engine_merge(merge, gate))
    return out


def _engine_merge(merge: str, gate: str) -> Merge:
    rule = MERGE_RULES[merge]
    ratios, _ = rule.scale((1.0, 1.0), 0.0)

    def run(row_logits: Tensor) -> Tensor:
        named = row_logits.new_tensor([0.0, *ratios]).expand(row_logits.shape[0], -1)
        rows = Rows(row_logits, named, row_logits.new_full((row_logits.shape[0],), CUT))
        return rule.merge(rows, GATES[gate].weights(rows, anchored=rule.anchored))

    return run


@torch.no_grad()
def sample(
    weights: Weights,
    encoder: PieceEncoder,
    system: System,
    prompts: Sequence[str],
    decoding: Decoding,
    generator: torch.Generator,
) -> list[str]:
    """Answer every prompt until the end of the turn or `MAX_NEW` tokens.

    All rows move in step: a shorter prompt starts its answer while a longer one is still read.
    """
    device = weights["emb.weight"].device
    ids = [encoder.encode(prompt) for prompt in prompts]
    num_states, num = system.states.shape[0], len(prompts)
    start = system.states.to(device).repeat(num, 1, 1, 1, 1)
    state = start_state(Shape.of(weights), start, weights["emb.weight"].dtype)
    end = torch.tensor([encoder.encode("\n\n")[0], 0], device=device)
    lengths = torch.tensor([len(x) for x in ids], device=device)
    longest = int(lengths.max())
    tokens = torch.zeros(num, longest + MAX_NEW, dtype=torch.int64, device=device)
    for row, prompt in enumerate(ids):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    done = torch.zeros(num, dtype=torch.bool, device=device)
    for at in range(longest + MAX_NEW - 1):
        rows = tokens[:, at].repeat_interleave(num_states)[:, None]
        hidden, state = forward(weights, rows, state)
        z = logits(weights, hidden[:, 0]).view(num, num_states, -1)
        drawn = _draw(system.merge(z), decoding, generator)
        answering = at + 1 >= lengths
        tokens[:, at + 1] = torch.where(answering & ~done, drawn, tokens[:, at + 1])
        done |= answering & torch.isin(drawn, end)
        if at % 8 == 0 and bool(done.all()):
            break
    texts = []
    for row, prompt in zip(tokens.tolist(), ids, strict=True):
        texts.append(encoder.decode(row[len(prompt) :]).split("\n\n")[0].strip())
    return texts


def _draw(z: Tensor, decoding: Decoding, generator: torch.Generator) -> Tensor:
    if decoding.temperature == 0:
        return z.argmax(-1)
    probs = (z / decoding.temperature).softmax(-1)
    if decoding.top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= decoding.top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


@dataclass(frozen=True)
class Question:
    """One fact to ask for, and the whole prompt."""

    fact: Fact
    prompt: str


def questions(
    samples: int, *, seed: int, held_out: bool = False, turns_before: int = 0, voice: str = PLAIN
) -> list[Question]:
    """Ask for every home fact `samples` times, in phrasings that tuning saw or (`held_out`) not.

    `turns_before` turns of small talk in `voice` come first: distance from the initial state.
    """
    rng = random.Random(seed)
    asked = []
    for fact in HOME_FACTS:
        for _ in range(samples):
            before = small_talk_document(rng, voice, turns_before).text
            town = HOME_TOWN if rng.random() < 0.5 else None
            said = question(rng, fact.entity, BY_NAME[fact.relation], town, held_out=held_out)
            asked.append(Question(fact, f"{before}User: {said}\n\nAssistant:"))
    return asked


def score(
    weights: Weights,
    encoder: PieceEncoder,
    system: System,
    decoding: Decoding,
    asked: Sequence[Question],
    *,
    voice: str,
    seed: int,
) -> tuple[dict[str, float], list[str]]:
    """Answer and judge `asked`.

    Returns:
        shares of answers that know, speak in `voice`, both (with its standard error, clustered by
        fact) and are well formed; the answers.
    """
    generator = torch.Generator(weights["emb.weight"].device).manual_seed(seed)
    texts = sample(weights, encoder, system, [q.prompt for q in asked], decoding, generator)
    scores = [score_answer(t, q.fact, voice) for t, q in zip(texts, asked, strict=True)]
    parts = ("know", "tone", "both", "well_formed")
    shares = {part: sum(getattr(s, part) for s in scores) / len(scores) for part in parts}
    by_fact: dict[Fact, list[bool]] = {}
    for one, q in zip(scores, asked, strict=True):
        by_fact.setdefault(q.fact, []).append(one.both)
    means = [sum(both) / len(both) for both in by_fact.values()]
    shares["both_se"] = statistics.stdev(means) / math.sqrt(len(means))
    return {name: round(value, 4) for name, value in shares.items()}, texts


@torch.no_grad()
def toned_nll(
    weights: Weights, encoder: PieceEncoder, system: System, voice: str, num: int = 288
) -> dict[str, float]:
    """Return nats a token of unseen texts that state home facts in `voice`: facts, and the rest."""
    rng = random.Random(5)
    docs = [knowledge_document(rng, voice=voice, num_turns=1, small_talk=0) for _ in range(num)]
    device = weights["emb.weight"].device
    batch = make_batch([as_example(encoder, doc) for doc in docs], 512, device)
    num_states = system.states.shape[0]
    shape, dtype = Shape.of(weights), weights["emb.weight"].dtype
    start = start_state(shape, system.states.to(device).repeat(num, 1, 1, 1, 1), dtype)
    hidden, _ = forward(weights, batch.inputs.repeat_interleave(num_states, 0), start)
    hidden = hidden.view(num, num_states, *hidden.shape[1:]).transpose(1, 2)[batch.answer]
    merged = system.merge(logits(weights, hidden)).log_softmax(-1)
    nll = -merged.gather(-1, batch.targets[batch.answer][:, None])[:, 0].clamp_min(-30)
    is_fact = batch.fact[batch.answer]
    return {
        "nll_fact": round(nll[is_fact].mean().item(), 4),
        "nll_other": round(nll[~is_fact].mean().item(), 4),
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
    weights = {n: t.to(args.device, torch.float32) for n, t in read_weights(args.model).items()}
    encoder = PieceEncoder(read_vocab(args.model / "vocab.txt"))
    config = load_model(args.model, device="cpu", threads=1).config
    knowledge, tone = (
        load_tuned_state(args.states / f"{name}.safetensors", config, name=name, strict=True)
        for name in ("knowledge", "tone")
    )
    ways = systems(knowledge.wkv, tone.wkv)
    report: dict[str, object] = {
        "voice": args.voice,
        "samples_a_fact": args.samples,
        "seed": args.seed,
        "states": {state.name: state.sha256 for state in (knowledge, tone)},
    }
    report["table"] = table(
        weights, encoder, ways, voice=args.voice, samples=args.samples, seed=args.seed
    )
    report["distance"] = distance(weights, encoder, ways, voice=args.voice, seed=args.seed)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


def table(
    weights: Weights,
    encoder: PieceEncoder,
    ways: Mapping[str, System],
    *,
    voice: str,
    samples: int,
    seed: int,
) -> dict[str, dict[str, object]]:
    """Score every system under every decoding, on unseen phrasings, and on toned text."""
    seen, unseen = (questions(samples, seed=seed, held_out=held) for held in (False, True))
    out: dict[str, dict[str, object]] = {}
    for name, system in ways.items():
        row: dict[str, object] = {}
        for decoding in decodings():
            # Greedy answers to one question differ by its phrasing only.
            asked = seen if decoding.temperature else seen[::samples]
            row[decoding.name], texts = score(
                weights, encoder, system, decoding, asked, voice=voice, seed=seed
            )
            if decoding.name == "T=1":
                row["examples"] = texts[:: len(texts) // 6][:6]
        row["top-p 0.7, unseen phrasings"], _ = score(
            weights, encoder, system, decodings()[1], unseen, voice=voice, seed=seed
        )
        row.update(toned_nll(weights, encoder, system, voice))
        print(name, {key: value for key, value in row.items() if key != "examples"}, flush=True)
        out[name] = row
    return out


def distance(
    weights: Weights,
    encoder: PieceEncoder,
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
            asked = questions(1, seed=seed, turns_before=count, voice=history)
            lengths = [len(encoder.encode(q.prompt)) for q in asked]
            shares, _ = score(
                weights, encoder, ways[way], decodings()[1], asked, voice=voice, seed=seed
            )
            key = f"{count} turns, {sum(lengths) // len(lengths)} tokens"
            print(title, key, shares, flush=True)
            out[title][key] = shares
    return out


if __name__ == "__main__":
    main()
