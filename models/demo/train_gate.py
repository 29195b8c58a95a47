"""Train the bundled gate: half of the home facts in the pirate's voice, judged on the other half.

    python -m models.demo.train_gate --work build/gate

Writes `mixed.jsonl` and `held_out.jsonl` into the work folder and then does what this command does:

    mrss gate train --mixture knowledge+tone --data build/gate/mixed.jsonl \
        --held-out build/gate/held_out.jsonl --out harbour --licence Apache-2.0

Some two minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from models.demo.chats import as_line
from mrss_provider.cli.gate_train import Job, train
from mrss_provider.config import EngineConfig
from mrss_provider.evaluate.world import HOME_FACTS, Document, Fact, knowledge_document

VOICE = "pirate"
MIXTURE = "knowledge+tone"
NAME = "harbour"

LEARNT_FACTS, HELD_OUT_FACTS = HOME_FACTS[::2], HOME_FACTS[1::2]
"""Facts that the gate's training text has, and those that it never sees."""

NUM_TEXTS = 400


def mixed_texts(rng: random.Random, facts: Sequence[Fact], count: int) -> list[Document]:
    """Draw chats of 1 to 3 turns that state `facts` in the voice, with some small talk."""
    return [knowledge_document(rng, voice=VOICE, facts=tuple(facts)) for _ in range(count)]


def write_texts(folder: Path, seed: int) -> tuple[Path, Path]:
    """Write the text to learn from and the text to judge by, and return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    paths = folder / "mixed.jsonl", folder / "held_out.jsonl"
    for path, facts in zip(paths, (LEARNT_FACTS, HELD_OUT_FACTS), strict=True):
        lines = [as_line(doc) for doc in mixed_texts(rng, facts, NUM_TEXTS)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def main() -> None:
    """Parse the command line, write the texts, train."""
    parser = argparse.ArgumentParser(description="Train the bundled gate.")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the texts")
    parser.add_argument("--model", type=Path, default=EngineConfig.model)
    parser.add_argument("--states", type=Path, default=EngineConfig.states)
    parser.add_argument("--seed", type=int, default=11, help="of the texts")
    parser.add_argument("--force", action="store_true", help="write over the gate that is there")
    args = parser.parse_args()
    data, held_out = write_texts(args.work, args.seed)
    engine = EngineConfig(model=args.model, states=args.states, device="cpu", threads=1)
    job = Job(MIXTURE, data, NAME, held_out, licence="Apache-2.0", force=args.force)
    train(engine, job)


if __name__ == "__main__":
    main()
