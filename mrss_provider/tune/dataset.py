"""DataSet: the lines of a file as examples, what is odd about them, and the batches of each step.

A step's batch is a function of the seed and the step, so a run that was killed goes on with the
batches that it would have had.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mrss_provider.backend import Message
from mrss_provider.chat import ChatTemplate
from mrss_provider.errors import InvalidRequestError
from mrss_provider.tokenizer import Tokenizer
from mrss_provider.tune.chats import Line, chat_example
from mrss_provider.tune.examples import Example

MAX_HELD_OUT = 48
"""Examples that a held-out loss is taken over at most: it is taken often."""

_BUCKET_BATCHES = 16
"""Batches whose examples are sorted by length together: little padding, and order by chance."""


@dataclass(frozen=True)
class Distance:
    """Other talk before what is learnt, so that it is learnt at every distance.

    Attributes:
        max_tokens: of other talk, at most; each example gets a number of its own up to it.
        turns: pairs of a question and its answer to draw from, and their tokens.
        counts: whether the answers of the other talk count, as what is kept at the base.
        render: messages, facts and the number of messages before -> example.
    """

    max_tokens: int
    turns: Sequence[tuple[tuple[Message, Message], int]]
    render: Callable[[Sequence[Message], Sequence[str], int], Example]


@dataclass(frozen=True)
class DataSet:
    """Examples to learn from, or to judge by.

    Attributes:
        lines: of the file, those that have something to learn.
        max_len: tokens of an example that are predicted, at most, without other talk before it.
        distance: other talk, or None.
    """

    lines: tuple[Line, ...]
    max_len: int
    distance: Distance | None = None

    @property
    def longest(self) -> int:
        """Tokens that an example may have, with what comes before it."""
        return self.max_len + (self.distance.max_tokens if self.distance else 0)

    def draw(self, index: int, rng: random.Random) -> Example:
        """Return the example `index`, with other talk before it where there is to be some."""
        line = self.lines[index]
        example = line.example.cut(self.max_len)
        if self.distance is None or isinstance(line.said, str):
            return example
        wanted = rng.randint(0, self.distance.max_tokens)
        before: list[Message] = []
        while wanted > 0:
            turn, size = rng.choice(self.distance.turns)
            if size > wanted:
                break
            before += turn
            wanted -= size
        if not before:
            return example
        leads = line.said[:1] if line.said[0].role == "system" else ()
        messages = [*leads, *before, *line.said[len(leads) :]]
        num_before = len(leads) + len(before)
        far = self.distance.render(messages, line.facts or (), num_before)
        if line.facts is None and any(line.example.fact):
            far = replace(far, fact=_at_the_end(line.example.fact, far))
        return far.cut(self.longest)


def _at_the_end(flags: Sequence[bool], example: Example) -> tuple[bool, ...]:
    """Return the flags of a text's tokens for an example that ends with that text."""
    size = len(example.token_ids)
    return (False,) * (size - len(flags)) + tuple(flags)[-size:]


class Batches:
    """The batches of a data set: every example once an epoch, those of like lengths together."""

    def __init__(self, data: DataSet, batch_size: int, seed: int) -> None:
        self._data = data
        self._size = batch_size
        self._seed = seed
        self._drawn: tuple[int, list[list[int]]] = (-1, [])
        self.per_epoch = -(-len(data.lines) // batch_size)

    def __call__(self, step: int) -> list[Example]:
        """Return the examples of `step`, from 0."""
        epoch, at = divmod(step, self.per_epoch)
        if self._drawn[0] != epoch:
            self._drawn = epoch, self._epoch(epoch)
        rng = random.Random(f"{self._seed}/{step}")
        return [self._data.draw(index, rng) for index in self._drawn[1][at]]

    def _epoch(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self._seed}/epoch {epoch}")
        order = list(range(len(self._data.lines)))
        rng.shuffle(order)
        batches = []
        for start in range(0, len(order), _BUCKET_BATCHES * self._size):
            bucket = order[start : start + _BUCKET_BATCHES * self._size]
            bucket.sort(key=lambda index: len(self._data.lines[index].example.token_ids))
            batches += [bucket[i : i + self._size] for i in range(0, len(bucket), self._size)]
        rng.shuffle(batches)
        return batches


def fixed_batches(data: DataSet, batch_size: int, seed: int) -> list[list[Example]]:
    """Return a data set as batches that stay the same, to be judged by: at most `MAX_HELD_OUT`."""
    rng = random.Random(f"{seed}/held out")
    indices = range(len(data.lines))
    chosen = rng.sample(indices, min(len(indices), MAX_HELD_OUT))
    examples = sorted((data.draw(i, rng) for i in chosen), key=lambda e: len(e.token_ids))
    return [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]


@dataclass(frozen=True)
class Findings:
    """What is odd about the data, for whoever gave it; numbers of examples.

    Attributes:
        examples: to learn from.
        held_out: to judge by.
        tokens: of those to learn from.
        answer_tokens: of them, what the assistant says.
        cut: longer than `max_len`, and cut.
        nothing_left: without a token to learn after the cut, and left out.
        duplicates: that are there more than once.
        leaked: to judge by that are among those to learn from, by line number.
        lengths: upper end of a range of lengths -> examples.
    """

    examples: int
    held_out: int
    tokens: int
    answer_tokens: int
    cut: int
    nothing_left: int
    duplicates: int
    leaked: tuple[int, ...]
    lengths: dict[int, int]


def usable(lines: Sequence[Line], max_len: int, *, on_all: bool) -> tuple[list[Line], int]:
    """Return the lines with a token that counts after the cut, and how many have none.

    Args:
        lines: of a file.
        max_len: tokens of an example that are predicted.
        on_all: whether every token counts, not only the assistant's.

    Raises:
        InvalidRequestError: there is none.
    """
    found = []
    for line in lines:
        flags = line.example.cut(max_len).answer[1:]
        if any(flags) or (on_all and flags):
            found.append(line)
    if not found:
        raise InvalidRequestError(
            f"no example has a token to learn within max_len {max_len}; raise it, or give answers",
            param="max_len",
        )
    return found, len(lines) - len(found)


def split_lines(lines: Sequence[Line], share: float, seed: int) -> tuple[list[Line], list[Line]]:
    """Part lines by chance; equal ones stay together.

    Raises:
        InvalidRequestError: they cannot be parted.
    """
    groups: dict[tuple[int, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(line.example.token_ids, []).append(line)
    if len(groups) < 2:
        raise InvalidRequestError(
            "one example cannot be parted into some to learn from and some to judge by; give more, "
            "or --held-out-share 0",
            param="held_out_share",
        )
    order = list(groups.values())
    random.Random(f"{seed}/split").shuffle(order)
    count = min(len(order) - 1, max(1, round(share * len(order))))
    chosen = {line.number for group in order[:count] for line in group}
    return (
        [line for line in lines if line.number not in chosen],
        [line for line in lines if line.number in chosen],
    )


def examine(train: DataSet, held_out: DataSet | None, nothing_left: int) -> Findings:
    """Look at what is to be learnt from and judged by."""
    seen = Counter(line.example.token_ids for line in train.lines)
    cut = [line.example.cut(train.max_len) for line in train.lines]
    judged = held_out.lines if held_out else ()
    lengths: Counter[int] = Counter()
    for line in train.lines:
        lengths[_range_end(len(line.example.token_ids))] += 1
    return Findings(
        examples=len(train.lines),
        held_out=len(judged),
        tokens=sum(len(example.token_ids) for example in cut),
        answer_tokens=sum(sum(example.answer) for example in cut),
        cut=sum(len(line.example.token_ids) > train.max_len + 1 for line in train.lines),
        nothing_left=nothing_left,
        duplicates=sum(count - 1 for count in seen.values()),
        leaked=tuple(line.number for line in judged if line.example.token_ids in seen),
        lengths=dict(sorted(lengths.items())),
    )


def _range_end(length: int) -> int:
    end = 16
    while end < length:
        end *= 2
    return end


def with_distance(
    data: DataSet,
    max_tokens: int,
    others: Sequence[Line],
    *,
    counts: bool,
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> DataSet:
    """Return `data` with up to `max_tokens` of other talk before each chat.

    Args:
        data: of chats.
        max_tokens: of other talk.
        others: chats whose turns are drawn from.
        counts: whether their answers count (with locality: they are kept as the base has them).
        tokenizer: of the model.
        template: of the model.

    Raises:
        InvalidRequestError: no turn is that short, or a template that writes turns anew.
    """

    def render(messages: Sequence[Message], facts: Sequence[str], num_before: int) -> Example:
        return chat_example(
            messages, facts, tokenizer, template, num_before=num_before, counts_before=counts
        )

    pairs = [
        (asked, said)
        for line in others
        if not isinstance(line.said, str)
        for asked, said in zip(line.said, line.said[1:], strict=False)
        if (asked.role, said.role) == ("user", "assistant")
    ]
    turns = []
    for pair in dict.fromkeys(pairs):
        size = len(chat_example(pair, (), tokenizer, template).token_ids)
        if size <= max_tokens:
            turns.append((pair, size))
    if not turns:
        raise InvalidRequestError(
            f"no turn of a chat fits into a distance of {max_tokens} tokens; raise it",
            param="distance",
        )
    return replace(data, distance=Distance(max_tokens, turns, render))
