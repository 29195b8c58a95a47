"""What embeddings of the bundled model find: how often the nearest text is one that belongs.

Four tasks on the demo's world, of the 72 facts of its harbour town; a text never has itself or its
own wording to find.

- `paraphrase`: a statement of a fact; nearest of one statement each of all facts, worded otherwise.
- `question`: a question; nearest of one statement each of all facts.
- `relation`: a question about one entity; nearest of questions about others, worded otherwise.
  Right is one that asks for the same thing.
- `voice`: a statement in one of eight voices; nearest of statements of other facts in all voices.
  Right is one in the same voice.

Each with `base` and both states, `mean` and `last`; and, to compare, by the words themselves: the
cosine of their counts, each weighed by the logarithm of how few texts have it.

    python benchmarks/embeddings.py

Ends with one JSON line a cell, kept in benchmarks/results/embeddings.jsonl: `accuracy` of `queries`
queries with its 95 % interval (Wilson), and `chance`, that of a text drawn from the gallery.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from measure import RESULTS, Machine, host, write_line
from torch import Tensor

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import EmbedRequest
from mrss_provider.config import EngineConfig
from mrss_provider.evaluate.world import HOME_FACTS, RELATIONS, VOICES, Fact
from mrss_provider.evaluate.world.documents import answer
from mrss_provider.evaluate.world.relations import entity_phrase
from mrss_provider.evaluate.world.voices import capital

MODELS = ("base", "knowledge", "tone")
POOLINGS: tuple[Literal["mean", "last"], ...] = ("mean", "last")
# Draws of wordings, entities and voices, over which queries are counted.
NUM_DRAWS = 4
_BY_NAME = {relation.name: relation for relation in RELATIONS}


@dataclass(frozen=True)
class Text:
    """A text, and what it must share with another one to belong to it."""

    text: str
    label: str


@dataclass(frozen=True)
class Task:
    """Queries and galleries, drawn; `queries[i]` looks in `galleries[i]`."""

    name: str
    queries: list[Text]
    galleries: list[list[Text]]

    @property
    def chance(self) -> float:
        """How often a text drawn from the gallery belongs."""
        shares = [
            sum(found.label == query.label for found in gallery) / len(gallery)
            for query, gallery in zip(self.queries, self.galleries, strict=True)
        ]
        return sum(shares) / len(shares)


def tasks(seed: int = 0) -> list[Task]:
    """Draw the tasks."""
    rng = random.Random(seed)
    drawn = [Task(name, [], []) for name in ("paraphrase", "question", "relation", "voice")]
    for _ in range(NUM_DRAWS):
        for task in drawn:
            _DRAW[task.name](rng, task)
    return drawn


def _key(fact: Fact) -> str:
    return f"{fact.entity}/{fact.relation}"


def _stated(fact: Fact, form: int) -> Text:
    return Text(capital(fact.statements()[form]) + ".", _key(fact))


def _asked(fact: Fact, form: int) -> str:
    relation = _BY_NAME[fact.relation]
    return relation.questions[form].format(e=entity_phrase(fact.entity, relation.kind))


def _draw_paraphrase(rng: random.Random, task: Task) -> None:
    for fact in HOME_FACTS:
        form = rng.randrange(len(fact.statements()))
        others = [i for i in range(len(fact.statements())) if i != form]
        task.queries.append(_stated(fact, form))
        task.galleries.append([_stated(other, rng.choice(others)) for other in HOME_FACTS])


def _draw_question(rng: random.Random, task: Task) -> None:
    gallery = [_stated(fact, rng.randrange(len(fact.statements()))) for fact in HOME_FACTS]
    for fact in HOME_FACTS:
        form = rng.randrange(len(_BY_NAME[fact.relation].questions))
        task.queries.append(Text(_asked(fact, form), _key(fact)))
        task.galleries.append(gallery)


def _draw_relation(rng: random.Random, task: Task) -> None:
    for fact in HOME_FACTS:
        forms = list(range(len(_BY_NAME[fact.relation].questions)))
        form = forms.pop(rng.randrange(len(forms)))
        task.queries.append(Text(_asked(fact, form), fact.relation))
        task.galleries.append(
            [
                Text(_asked(other, rng.choice(forms)), other.relation)
                for other in HOME_FACTS
                if other.entity != fact.entity
            ]
        )


def _draw_voice(rng: random.Random, task: Task) -> None:
    said = []
    for fact in HOME_FACTS:
        voice = rng.choice(VOICES)
        said.append((fact, Text(answer(rng, voice, fact), voice.name)))
    for fact, text in said:
        task.queries.append(text)
        task.galleries.append([other for about, other in said if about.entity != fact.entity])


_DRAW = {
    "paraphrase": _draw_paraphrase,
    "question": _draw_question,
    "relation": _draw_relation,
    "voice": _draw_voice,
}


def hits(task: Task, vectors: dict[str, Tensor]) -> int:
    """Count the queries whose nearest text belongs; `vectors` have length 1."""
    count = 0
    for query, gallery in zip(task.queries, task.galleries, strict=True):
        near = torch.stack([vectors[text.text] for text in gallery]) @ vectors[query.text]
        count += gallery[int(near.argmax())].label == query.label
    return count


def word_vectors(texts: Sequence[str]) -> dict[str, Tensor]:
    """Return each text as its words' counts, each times log(texts / texts that have it)."""
    counts = {text: Counter(re.findall(r"[a-z']+", text.lower())) for text in texts}
    frequency = Counter(word for words in counts.values() for word in words)
    column = {word: i for i, word in enumerate(frequency)}
    vectors = {}
    for text, words in counts.items():
        vector = torch.zeros(len(column))
        for word, count in words.items():
            vector[column[word]] = count * math.log(len(texts) / frequency[word])
        vectors[text] = torch.nn.functional.normalize(vector, dim=0)
    return vectors


async def model_vectors(
    engine: AsyncEngine, texts: Sequence[str], model: str, pooling: Literal["mean", "last"]
) -> dict[str, Tensor]:
    """Return each text as the engine embeds it."""
    found = await engine.embed(EmbedRequest(model, tuple(texts), pooling))
    return dict(zip(texts, map(torch.tensor, found.vectors), strict=True))


def interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927)."""
    z = 1.96
    share = count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / 4 / total**2)
    return middle - half, middle + half


def report(
    task: Task, vectors: dict[str, Tensor], state: str, pooling: str, on: Machine, out: Path
) -> None:
    """Write one cell."""
    count, total = hits(task, vectors), len(task.queries)
    low, high = interval(count, total)
    fields = {
        "model": "demo",
        "task": task.name,
        "state": state,
        "pooling": pooling,
        "accuracy": round(count / total, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "chance": round(task.chance, 3),
        "queries": total,
        "gallery": len(task.galleries[0]),
    }
    write_line("embeddings", fields, on, out)


async def measure(engine: AsyncEngine, on: Machine, out: Path) -> None:
    """Measure all cells."""
    drawn = tasks()
    texts = {
        task.name: list(
            dict.fromkeys(text.text for texts in (task.queries, *task.galleries) for text in texts)
        )
        for task in drawn
    }
    for task in drawn:
        report(task, word_vectors(texts[task.name]), "words", "words", on, out)
        for model in MODELS:
            for pooling in POOLINGS:
                vectors = await model_vectors(engine, texts[task.name], model, pooling)
                report(task, vectors, model, pooling, on, out)


def main() -> None:
    """Measure the bundled model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    async def run() -> None:
        async with AsyncEngine(EngineConfig(device="cpu", threads=args.threads)) as engine:
            await measure(engine, host(), args.out)

    asyncio.run(run())


if __name__ == "__main__":
    main()
