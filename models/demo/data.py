"""Batches of the world's documents, made by worker processes while the accelerator works."""

from __future__ import annotations

import multiprocessing as mp
import random
from collections.abc import Callable
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

MAX_VOCAB = 4096
"""Entries of the vocabulary at most; the world needs far fewer."""


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


class Feeder:
    """Worker processes that keep a queue of packed batches full.

    `max_facts` may be changed while it runs: the curriculum.
    """

    def __init__(
        self, entries: list[bytes], num_rows: int, length: int, workers: int, seed: int
    ) -> None:
        context = mp.get_context("spawn")
        self.max_facts: Synchronized[int] = context.Value("i", 2)
        self._queue = context.Queue(maxsize=4 * workers)
        self._processes = [
            context.Process(
                target=_feed,
                args=(entries, num_rows, length, seed * 1000 + i, self.max_facts, self._queue.put),
                daemon=True,
            )
            for i in range(workers)
        ]
        for process in self._processes:
            process.start()

    def next(self) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        """Return ids and kinds of one batch."""
        batch: tuple[NDArray[np.uint16], NDArray[np.uint8]] = self._queue.get()
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
            process.terminate()


def _feed(
    entries: list[bytes],
    num_rows: int,
    length: int,
    seed: int,
    max_facts: Synchronized[int],
    put: Callable[[tuple[NDArray[np.uint16], NDArray[np.uint8]]], None],
) -> None:
    rng, encoder = random.Random(seed), PieceEncoder(entries)
    while True:
        put(pack_rows(rng, encoder, num_rows, length, max_facts.value))
