"""Batches of the world's documents, made by worker processes while the accelerator works."""

from __future__ import annotations

import multiprocessing as mp
import queue as queues
import random
import signal
import sys
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from models.demo.vocab import PIECE, PieceEncoder, build_vocab
from mrss_provider.evaluate.world import MARKED, Document, base_document, knowledge_document
from mrss_provider.evaluate.world.voices import PLAIN
from mrss_provider.tune.examples import Example

END_OF_TEXT = 0
ANSWER, FACT, OTHER = 2, 3, 1

FIRST_MAX_FACTS, LAST_MAX_FACTS = 2, 14
CURRICULUM_SHARE = 0.2
"""Facts a document grow over this share of the run; with all at once, recall is learnt late."""

MAX_VOCAB = 4096
"""Entries of the vocabulary at most; the world needs far fewer."""

_BATCHES_READY = 4
_LOOK_EVERY_S = 2.0


def world_vocab(num_documents: int = 20_000, seed: int = 1) -> list[bytes]:
    """Build the vocabulary from base documents and every voice's way to state the home facts."""
    rng = random.Random(seed)
    texts = [base_document(rng).text for _ in range(num_documents)]
    texts += [knowledge_document(rng, voice=v).text for v in (PLAIN, *MARKED) for _ in range(2000)]
    return build_vocab(texts, MAX_VOCAB, min_count=3)


def encode_document(encoder: PieceEncoder, doc: Document) -> tuple[list[int], list[int]]:
    """Return the token ids of `doc` and for each OTHER, ANSWER or FACT."""
    ids: list[int] = []
    kinds: list[int] = []
    for match in PIECE.finditer(doc.text):
        tokens = encoder.encode(match.group())
        ids += tokens
        kinds += [_kind(doc, match.start(), match.end())] * len(tokens)
    return ids, kinds


def _kind(doc: Document, start: int, end: int) -> int:
    if any(a < end and start < b for a, b in doc.facts):
        return FACT
    return ANSWER if any(a < end and start < b for a, b in doc.answers) else OTHER


def as_example(encoder: PieceEncoder, doc: Document) -> Example:
    """Return `doc` as an example for state tuning."""
    ids, kinds = encode_document(encoder, doc)
    return Example(tuple(ids), tuple(k >= ANSWER for k in kinds), tuple(k == FACT for k in kinds))


def pack_rows(
    rng: random.Random, encoder: PieceEncoder, num_rows: int, length: int, max_facts: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Fill rows of `length + 1` tokens with whole documents, token 0 between them.

    A row starts with a document, as a chat does, and the last document is cut off.

    Returns:
        ids and kinds, [num_rows, length + 1].
    """
    ids = np.zeros((num_rows, length + 1), np.uint16)
    kinds = np.zeros((num_rows, length + 1), np.uint8)
    for row in range(num_rows):
        tokens: list[int] = []
        marks: list[int] = []
        while len(tokens) <= length:
            more, more_marks = encode_document(encoder, base_document(rng, max_facts))
            tokens += [*more, END_OF_TEXT]
            marks += [*more_marks, OTHER]
        ids[row], kinds[row] = tokens[: length + 1], marks[: length + 1]
    return ids, kinds


def max_facts_at(progress: float) -> int:
    """Return how many facts a document may hold after this share of a run: the curriculum."""
    grown = min(1.0, progress / CURRICULUM_SHARE)
    return round(FIRST_MAX_FACTS + grown * (LAST_MAX_FACTS - FIRST_MAX_FACTS))


@dataclass(frozen=True)
class Feed:
    """What batches are made of.

    Attributes:
        entries: of the vocabulary.
        num_rows: a batch.
        length: tokens to predict a row.
        seed: of all batches; each depends on it and on its number alone.
        num_steps: of the run, which the curriculum follows; 0 follows `Feeder.max_facts`.
    """

    entries: list[bytes]
    num_rows: int
    length: int
    seed: int
    num_steps: int = 0

    def batch(
        self, encoder: PieceEncoder, step: int, max_facts: int
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        """Return ids and kinds of the batch of a step; see `pack_rows`."""
        if self.num_steps:
            max_facts = max_facts_at(step / self.num_steps)
        rng = random.Random(f"{self.seed} {step}")
        return pack_rows(rng, encoder, self.num_rows, self.length, max_facts)


class Feeder:
    """Worker processes that keep queues of packed batches full; batches come in their order.

    `max_facts` may be changed while it runs: the curriculum of a run whose length is in seconds.

    Args:
        feed: what batches are made of.
        workers: processes.
        first_step: number of the first batch.
    """

    def __init__(self, feed: Feed, workers: int, first_step: int = 0) -> None:
        context = mp.get_context("spawn")
        self.max_facts: Synchronized[int] = context.Value("i", FIRST_MAX_FACTS)
        self._step = first_step
        self._queues = [context.Queue(maxsize=_BATCHES_READY) for _ in range(workers)]
        self._processes = [
            context.Process(
                target=_make_batches,
                args=(feed, range(first_step + i, sys.maxsize, workers), self.max_facts, queue),
                daemon=True,
            )
            for i, queue in enumerate(self._queues)
        ]
        self._first = first_step
        for process in self._processes:
            process.start()

    def next(self) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        """Return ids and kinds of the next batch.

        Raises:
            RuntimeError: the process that makes it has ended.
        """
        place = (self._step - self._first) % len(self._queues)
        self._step += 1
        while True:
            try:
                batch: tuple[NDArray[np.uint16], NDArray[np.uint8]]
                batch = self._queues[place].get(timeout=_LOOK_EVERY_S)
            except queues.Empty:
                if not self._processes[place].is_alive():
                    raise RuntimeError("a process that makes batches has ended") from None
            else:
                return batch

    def __enter__(self) -> Feeder:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the workers."""
        for process in self._processes:
            # They do not listen to less.
            process.kill()


def _make_batches(
    feed: Feed, steps: range, max_facts: Synchronized[int], queue: mp.Queue[object]
) -> None:
    # Sent to all processes of a run, they are for the trainer, which still needs a batch.
    for asked in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked, signal.SIG_IGN)
    encoder = PieceEncoder(feed.entries)
    for step in steps:
        batch = feed.batch(encoder, step, max_facts.value)
        while not _put(queue, batch):
            # A trainer that was killed ends nobody.
            parent = mp.parent_process()
            if parent is not None and not parent.is_alive():
                queue.cancel_join_thread()
                return


def _put(queue: mp.Queue[object], batch: object) -> bool:
    try:
        queue.put(batch, timeout=_LOOK_EVERY_S)
    except queues.Full:
        return False
    return True
