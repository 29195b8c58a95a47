"""RadixTree: values at sequences of token ids; sequences that begin alike share their beginning.

Not safe for threads: whoever owns a tree locks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Value = TypeVar("Value")


class _Node(Generic[Value]):
    """A point in the tree: `edge` leads to it from `parent`, `depth` tokens from the root."""

    __slots__ = ("children", "depth", "edge", "parent", "value")

    def __init__(self, edge: Ids, parent: _Node[Value] | None) -> None:
        self.edge = edge
        self.parent = parent
        self.depth: int = len(edge) + (parent.depth if parent else 0)
        self.children: dict[int, _Node[Value]] = {}
        self.value: Value | None = None


class RadixTree(Generic[Value]):
    """A value for each of some sequences of token ids, none of them empty."""

    def __init__(self) -> None:
        """Start empty."""
        self._root: _Node[Value] = _Node(as_ids(()), None)
        self._num_values = 0

    def __len__(self) -> int:
        """Return how many sequences have a value."""
        return self._num_values

    def find(self, tokens: Ids) -> dict[int, Value]:
        """Return the values of all beginnings of `tokens`, by length, shortest first."""
        found: dict[int, Value] = {}
        node = self._root
        while node.depth < len(tokens):
            child = node.children.get(int(tokens[node.depth]))
            if child is None or not _are_same(child.edge, tokens[node.depth : child.depth]):
                break
            node = child
            if node.value is not None:
                found[node.depth] = node.value
        return found

    def get(self, tokens: Ids) -> Value | None:
        """Return the value of exactly these tokens, or None."""
        return self.find(tokens).get(len(tokens))

    def shared_len(self, tokens: Ids) -> int:
        """Return how many tokens a sequence here has in common with `tokens`, at most."""
        node = self._root
        while node.depth < len(tokens):
            child = node.children.get(int(tokens[node.depth]))
            if child is None:
                break
            shared = _shared_len(child.edge, tokens[node.depth :])
            if shared < len(child.edge):
                return node.depth + shared
            node = child
        return node.depth

    def insert(self, tokens: Ids, value: Value) -> None:
        """Set the value of `tokens`, in place of one that is there."""
        assert len(tokens)
        node = self._root
        while node.depth < len(tokens):
            rest = tokens[node.depth :]
            child = node.children.get(int(rest[0]))
            if child is None:
                # A copy: a slice would keep the whole prompt.
                child = _Node(rest.copy(), node)
                node.children[int(rest[0])] = child
            elif (shared := _shared_len(child.edge, rest)) < len(child.edge):
                child = _split(child, shared)
            node = child
        self._num_values += node.value is None
        node.value = value

    def remove(self, tokens: Ids) -> None:
        """Take the value of `tokens` out, if there is one, and what led only there."""
        node = self._root
        while node.depth < len(tokens):
            child = node.children.get(int(tokens[node.depth]))
            if child is None or not _are_same(child.edge, tokens[node.depth : child.depth]):
                return
            node = child
        if node.value is None:
            return
        node.value = None
        self._num_values -= 1
        while node.parent is not None and node.value is None and not node.children:
            parent = node.parent
            del parent.children[int(node.edge[0])]
            node = parent
        if node.parent is not None and node.value is None and len(node.children) == 1:
            _join(node)


def as_ids(tokens: Sequence[int]) -> Ids:
    """Return token ids as the tree wants them: int32 [T]."""
    return np.asarray(tokens, dtype=np.int32)


def _are_same(one: Ids, other: Ids) -> bool:
    """Tell whether two sequences are equal.

    As bytes: where numpy compares, it lets go of the interpreter, and whoever gets it may keep it
    for longer than all of this takes.
    """
    return one.tobytes() == other.tobytes()


def _shared_len(one: Ids, other: Ids) -> int:
    """Return how many tokens two sequences have in common from their start."""
    length = min(len(one), len(other))
    if _are_same(one[:length], other[:length]):
        return length
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length


def _split(node: _Node[Value], at: int) -> _Node[Value]:
    """Put a node on the edge to `node`, `at` tokens from its parent; return it."""
    assert node.parent is not None
    middle = _Node(node.edge[:at].copy(), node.parent)
    node.parent.children[int(node.edge[0])] = middle
    node.edge = node.edge[at:].copy()
    node.parent = middle
    middle.children[int(node.edge[0])] = node
    return middle


def _join(node: _Node[Value]) -> None:
    """Take a node that only leads on out of the way of its one child."""
    assert node.parent is not None
    (child,) = node.children.values()
    child.edge = np.concatenate((node.edge, child.edge))
    child.parent = node.parent
    node.parent.children[int(child.edge[0])] = child
