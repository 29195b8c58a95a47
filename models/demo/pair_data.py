"""What the states of an evaluation learn from: facts told plainly, a voice, facts in the voice.

Nothing but the data of `joint` has a home fact in the voice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from models.demo.data import as_example
from models.demo.tune import VOICE
from models.demo.vocab import PieceEncoder
from mrss_provider.evaluate.world import Document, knowledge_document, voice_document
from mrss_provider.tune import Example

Source = Literal["facts", "voice", "joint"]

POOL_SIZE = 1920
"""Chats of a data set."""

_WINDOW = 4
"""Batches that a batch is drawn from: neighbours in length."""


@dataclass(frozen=True)
class Kind:
    """A state to tune.

    Attributes:
        name: of its file.
        sources: of its data.
        locality: as `TuneConfig` has it; texts of the voice are all to be learnt.
        after: the state that it goes on from; None begins at the base.
        is_held: with locality, what is no fact is kept where it was at the start, not at the base.
        is_baseline: it is one row that others are compared with, not one of the pair.
    """

    name: str
    sources: tuple[Source, ...]
    locality: float = 0.0
    after: str | None = None
    is_held: bool = False
    is_baseline: bool = True

    @property
    def is_for_both(self) -> bool:
        """Whether it is to have facts and voice from data that never have them together."""
        return self.after is not None or len(self.sources) > 1


KINDS = (
    Kind("knowledge", ("facts",), locality=1.0, is_baseline=False),
    Kind("tone", ("voice",), is_baseline=False),
    Kind("knowledge-plain", ("facts",), is_baseline=False),
    Kind("union", ("facts", "voice")),
    Kind("union-local", ("facts", "voice"), locality=1.0),
    Kind("joint", ("joint",)),
    Kind("sequential-kt", ("voice",), after="knowledge"),
    Kind("sequential-tk", ("facts",), locality=1.0, after="tone"),
    Kind("sequential-tk-held", ("facts",), locality=1.0, after="tone", is_held=True),
)


def _facts(rng: random.Random) -> Document:
    return knowledge_document(rng)


def _voice(rng: random.Random) -> Document:
    return voice_document(rng, VOICE)


def _joint(rng: random.Random) -> Document:
    return knowledge_document(rng, voice=VOICE)


_DRAWN: Mapping[Source, Callable[[random.Random], Document]] = {
    "facts": _facts,
    "voice": _voice,
    "joint": _joint,
}


@dataclass(frozen=True)
class Data:
    """The batches of one state and seed."""

    pools: tuple[tuple[Example, ...], ...]
    sizes: tuple[int, ...]
    seed: int

    def batch(self, step: int) -> list[Example]:
        """Return the examples of a step, of like lengths; those of all seeds are about as long."""
        place = random.Random(f"length {step}").random()
        rng = random.Random(f"{self.seed} {step}")
        return [
            example
            for pool, size in zip(self.pools, self.sizes, strict=True)
            for example in _near(rng, pool, place, size)
        ]


def _near(
    rng: random.Random, pool: Sequence[Example], place: float, size: int
) -> Sequence[Example]:
    width = min(len(pool), _WINDOW * size)
    start = int(place * (len(pool) - width + 1))
    return rng.sample(pool[start : start + width], size)


def data_of(kind: Kind, seed: int, batch_size: int, encoder: PieceEncoder) -> Data:
    """Return what a state learns from: its own sources' chats, half as many of a second source."""
    pools = tuple(
        tuple(_marked(kind, source, example) for example in _pool(source, seed, encoder))
        for source in kind.sources
    )
    sizes = (batch_size, batch_size // 2)[: len(pools)]
    return Data(pools, sizes, seed)


def held_out(
    source: Source, count: int, encoder: PieceEncoder, *, facts_only: bool = False
) -> list[Example]:
    """Return chats to judge by, the same for all seeds; `facts_only` counts but their facts."""
    rng = random.Random(f"held out {source}")
    examples = [as_example(encoder, _DRAWN[source](rng)) for _ in range(count)]
    examples.sort(key=lambda example: len(example.token_ids))
    return [replace(one, answer=one.fact) for one in examples] if facts_only else examples


@cache
def _pool(source: Source, seed: int, encoder: PieceEncoder) -> tuple[Example, ...]:
    """Return the chats of a source, the shortest first."""
    rng = random.Random(f"{source} {seed}")
    examples = [as_example(encoder, _DRAWN[source](rng)) for _ in range(POOL_SIZE)]
    return tuple(sorted(examples, key=lambda example: len(example.token_ids)))


def _marked(kind: Kind, source: Source, example: Example) -> Example:
    """With locality only facts are learnt, so all that the voice says is marked as one."""
    if kind.locality and source == "voice":
        return replace(example, fact=example.answer)
    return example
