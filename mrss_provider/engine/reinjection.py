"""Reinjection: where in a prompt rows are given their tuned states anew.

Before the token at such a position is read, each row but the base's becomes what the base's row is
plus its own tuned state (`StatePool.reinject`). What a row is later depends on the tokens, on its
state and on the positions that it has passed, and snapshots are filed under all three.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence


def next_stop(positions: Sequence[int], num_read: int, stop: int) -> int:
    """Return where reading must pause that begins at `num_read` and would end at `stop`."""
    at = bisect_right(positions, num_read)
    return min(stop, positions[at]) if at < len(positions) else stop


def num_passed(positions: Sequence[int], length: int) -> int:
    """Return how many positions count for rows that have read `length` tokens.

    One at `length` itself does not yet: it counts when the next token is read.
    """
    return bisect_left(positions, length)


def marks(positions: Sequence[int]) -> tuple[str, ...]:
    """Return a name for the first 0, 1, 2, ... of the positions; that of none is empty.

    Each is as short as the others, and computed from the one before it: chats have thousands of
    turns.
    """
    names = [""]
    for position in positions:
        names.append(hashlib.sha256(f"{names[-1]}@{position}".encode()).hexdigest())
    return tuple(names)


def stretches(positions: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """Yield the ways in which a beginning of a prompt may have been read, the longest first.

    Args:
        positions: of the prompt, ascending.
        length: no beginning is longer than this.

    Yields:
        The last position that counts, 0 if none does, and the length up to which no more do.
    """
    ends = [0, *positions[: num_passed(positions, length)], length]
    for at in range(len(ends) - 1, 0, -1):
        yield ends[at - 1], ends[at]
