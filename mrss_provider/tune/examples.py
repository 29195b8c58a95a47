"""Examples to tune a state on: token ids, and which of them are answers and facts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Ranges = Sequence[tuple[int, int]]
"""Half-open ranges [start, end) of characters."""


@dataclass(frozen=True)
class Example:
    """One text.

    Attributes:
        token_ids: T ids.
        answer: T flags, true where the assistant speaks (its end-of-turn newlines included).
        fact: T flags, true where a token states what must be learnt. Outside of answers they count
            with a loss on all tokens only.
    """

    token_ids: tuple[int, ...]
    answer: tuple[bool, ...]
    fact: tuple[bool, ...]

    def cut(self, max_len: int) -> Example:
        """Return the example with `max_len` tokens to predict at most, that is one token more."""
        end = max_len + 1
        return Example(self.token_ids[:end], self.answer[:end], self.fact[:end])


ExampleSource = Callable[[random.Random], Example]
"""Draws one example; the same generator state gives the same example."""


def mark_example(
    text: str,
    answers: Ranges,
    facts: Ranges,
    *,
    encode: Callable[[str], list[int]],
    token_bytes: Callable[[int], bytes | None],
) -> Example:
    """Encode `text` and mark every token that overlaps a range.

    Args:
        text: the whole chat, as the model's template writes it.
        answers: what the assistant said.
        facts: what of it must be learnt.
        encode: text -> ids.
        token_bytes: id -> its bytes; the ids of `text` must spell `text`.
    """
    ids = encode(text)
    sizes = [len(token_bytes(token) or b"") for token in ids]
    return Example(
        tuple(ids),
        _overlaps(sizes, _byte_ranges(text, answers)),
        _overlaps(sizes, _byte_ranges(text, facts)),
    )


def _byte_ranges(text: str, ranges: Ranges) -> list[tuple[int, int]]:
    return [(len(text[:start].encode()), len(text[:end].encode())) for start, end in ranges]


def _overlaps(sizes: Sequence[int], ranges: Ranges) -> tuple[bool, ...]:
    flags, at = [], 0
    for size in sizes:
        flags.append(any(start < at + size and at < end for start, end in ranges))
        at += size
    return tuple(flags)


@dataclass(frozen=True)
class Batch:
    """B examples, padded at the end with token 0.

    Attributes:
        inputs: [B, T] int64, all tokens but the last.
        targets: [B, T] int64, all tokens but the first.
        answer: [B, T] bool, of the targets.
        fact: [B, T] bool, of the targets.
        real: [B, T] bool, false on padding.
        lengths: on the host, how many are real in each row.
    """

    inputs: Tensor
    targets: Tensor
    answer: Tensor
    fact: Tensor
    real: Tensor
    lengths: tuple[int, ...]


def make_batch(examples: Sequence[Example], max_len: int, device: torch.device) -> Batch:
    """Pad `examples`, cut after `max_len` tokens, to the length of the longest."""
    longest = min(max_len, max(len(example.token_ids) for example in examples) - 1)
    ids = torch.zeros(len(examples), longest + 1, dtype=torch.int64)
    flags = torch.zeros(3, len(examples), longest + 1, dtype=torch.bool)
    sizes = [min(len(example.token_ids), longest + 1) for example in examples]
    for row, (example, size) in enumerate(zip(examples, sizes, strict=True)):
        ids[row, :size] = torch.tensor(example.token_ids[:size])
        flags[0, row, :size] = torch.tensor(example.answer[:size])
        flags[1, row, :size] = torch.tensor(example.fact[:size])
        flags[2, row, :size] = True
    ids, flags = ids.to(device), flags.to(device)
    answer, fact, real = flags[:, :, 1:]
    lengths = tuple(max(0, size - 1) for size in sizes)
    return Batch(ids[:, :-1], ids[:, 1:], answer, fact, real, lengths)
