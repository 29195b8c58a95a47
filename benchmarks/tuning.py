"""What locality, offsets and other talk before the answer do to a state of knowledge.

    python -m benchmarks.tuning

Four states learn the same 12 facts of the demo's world side by side, as rows of one batch. Each is
asked for them alone and in a mixture with the bundled voice, at once and after turns of small talk.
Some ten minutes of one CPU core; a line for each cell goes to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from models.demo.chats import as_line, drawing, write_lines
from models.demo.measure import Question, questions
from models.demo.tune_domains import DOMAINS
from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import GenerateRequest
from mrss_provider.chat import load_template
from mrss_provider.config import EngineConfig
from mrss_provider.evaluate.world import PLAIN, Score, knowledge_document, score_answer
from mrss_provider.model.cpu import configure_cpu
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.tokenizer import Tokenizer
from mrss_provider.tune import TuneConfig, TuneResult, read_weights, save_result
from mrss_provider.tune.chats import read_lines
from mrss_provider.tune.dataset import Batches, DataSet, with_distance
from mrss_provider.tune.gate_report import bootstrap
from mrss_provider.tune.learner import Learner

FACTS = DOMAINS["inner"][:12]
VOICE = "pirate"

USUAL = TuneConfig(batch_size=4, learning_rate=0.5, warmup_steps=5, max_len=96, seed=7)
DISTANCE = 96
VARIANTS = {
    "plain": USUAL,
    "locality": replace(USUAL, locality=1.0),
    "locality, offsets": replace(USUAL, locality=1.0, offsets=True),
    "locality, distance": replace(USUAL, locality=1.0, max_len=96 + DISTANCE),
}
MIXTURES = {
    "delta novelty": "knowledge+tone~delta~novelty",
    "product fixed": "knowledge+tone~product~fixed",
}
TURNS = (0, 3)


def data_sets(folder: Path, count: int) -> dict[str, DataSet]:
    """Return chats of one turn about the facts, near and far, for each variant."""
    rng = random.Random(1)

    def near() -> str:
        doc = knowledge_document(rng, facts=FACTS, num_turns=1, small_talk=0.0)
        return as_line(doc, with_facts=True)

    write_lines(folder / "facts.jsonl", count, near)
    write_lines(folder / "talk.jsonl", 200, drawing("talk", random.Random(2), VOICE))
    tokenizer = Tokenizer.load(EngineConfig.model / "vocab.txt")
    template = load_template("world")
    data = DataSet(tuple(read_lines(folder / "facts.jsonl", tokenizer, template)), 96)
    others = read_lines(folder / "talk.jsonl", tokenizer, template)
    far = with_distance(data, DISTANCE, others, counts=True, tokenizer=tokenizer, template=template)
    return {name: far if "distance" in name else data for name in VARIANTS}


def learn(steps: int) -> tuple[Learner, float]:
    """Tune all variants at once; return the learner and the CPU seconds that it took."""
    weights = {name: tensor.float() for name, tensor in read_weights(EngineConfig.model).items()}
    with tempfile.TemporaryDirectory() as folder:
        sets = data_sets(Path(folder), 400)
    batches = [Batches(sets[name], USUAL.batch_size, USUAL.seed) for name in VARIANTS]
    configs = [replace(config, steps=steps) for config in VARIANTS.values()]
    learner = Learner(weights, configs, [None] * len(configs), allow_idle=True)
    began = time.process_time()
    for step in range(steps):
        losses = learner.step(step, [batch(step) for batch in batches])
        if step % 20 == 0:
            said = " ".join(f"{loss:.3f}" for loss in losses)
            print(
                f"step {step} of {steps}, {time.process_time() - began:.0f} s: {said}", flush=True
            )
    return learner, time.process_time() - began


def save(learner: Learner, folder: Path) -> None:
    """Write every variant's state into a folder, and the bundled voice beside them."""
    for i, (name, config) in enumerate(VARIANTS.items()):
        result = TuneResult(learner.wkv(i), (), 0.0, learner.time_offset(i))
        path = folder / f"{file_name(name)}.safetensors"
        save_result(path, result, EngineConfig.model, group="knowledge", config=config)
    shutil.copy(EngineConfig.states / "tone.safetensors", folder)


def file_name(variant: str) -> str:
    """Return a state's name for a variant."""
    return variant.replace(", ", "-")


async def answers(engine: AsyncEngine, mixture: str, asked: Sequence[Question]) -> list[str]:
    """Return an answer to each question, sampled at temperature 1, top-p 1."""
    slots = asyncio.Semaphore(16)

    async def one(number: int, question: Question) -> str:
        sampling = SamplingParams(
            temperature=1.0, top_p=1.0, max_tokens=56, stop=("\n\n",), seed=number
        )
        request = GenerateRequest(model=mixture, sampling=sampling, prompt=question.prompt)
        async with slots:
            return "".join([delta.text async for delta in await engine.open(request)]).strip()

    return list(await asyncio.gather(*(one(i, q) for i, q in enumerate(asked))))


def share(scores: Sequence[Score], part: str, asked: Sequence[Question]) -> dict[str, float]:
    """Return the share of answers that are right, with its 95 % interval over facts."""
    values = torch.tensor([float(getattr(score, part)) for score in scores]).double()
    numbers = {fact: i for i, fact in enumerate(dict.fromkeys(q.fact for q in asked))}
    found = bootstrap(values, torch.tensor([numbers[q.fact] for q in asked]), seed=0)
    return {"mean": round(found.mean, 3), "low": round(found.low, 3), "high": round(found.high, 3)}


async def measure(folder: Path, samples: int, told: dict[str, object], out: Path) -> None:
    """Ask every variant, alone and mixed, near and far, and append a line for each cell."""
    engine = AsyncEngine(EngineConfig(states=folder, device="cpu", threads=1, cache_bytes=0))
    try:
        for turns in TURNS:
            for variant in VARIANTS:
                name = file_name(variant)
                for way, form in {"alone": name, **MIXTURES}.items():
                    mixture = form.replace("knowledge", name)
                    voice = PLAIN if way == "alone" else VOICE
                    asked = questions(samples, seed=5, facts=FACTS, turns_before=turns, voice=voice)
                    texts = await answers(engine, mixture, asked)
                    scores = [
                        score_answer(text, q.fact, VOICE)
                        for text, q in zip(texts, asked, strict=True)
                    ]
                    cell = {"variant": variant, "way": way, "turns_before": turns}
                    parts = {part: share(scores, part, asked) for part in ("know", "tone", "both")}
                    line = json.dumps({**cell, **parts, "answers": len(asked), **told})
                    print(line, flush=True)
                    with out.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")
    finally:
        await engine.aclose()


def main() -> None:
    """Parse the command line, tune, ask."""
    parser = argparse.ArgumentParser(description="Measure ways to tune a state of knowledge.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=4, help="answers a fact")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/tuning.jsonl")
    parser.add_argument("--states", type=Path, help="keep the states in this folder")
    args = parser.parse_args()
    configure_cpu(1)
    learner, seconds = learn(args.steps)
    told = {"steps": args.steps, "date": time.strftime("%Y-%m-%d"), "cpu_s": round(seconds)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.states or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        save(learner, folder)
        asyncio.run(measure(folder, args.samples, told, args.out))


if __name__ == "__main__":
    main()
