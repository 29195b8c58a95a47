"""Argument checks shared by every op: one form of message, raised before anything is written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, dtype


def expect_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise `ValueError` unless `tensor` has exactly `shape`."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def expect_dtype(name: str, tensor: Tensor, dtypes: Sequence[dtype]) -> None:
    """Raise `TypeError` unless the dtype of `tensor` is one of `dtypes`."""
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(item) for item in dtypes)
        raise TypeError(f"{name} must have dtype {allowed}, got {tensor.dtype}")


def expect_lengths(cu_seqlens: Sequence[int], num_tokens: int, num_seqs: int) -> None:
    """Raise `ValueError` unless `cu_seqlens` cuts `num_tokens` tokens into `num_seqs` sequences.

    It has `num_seqs + 1` entries, begins with 0, ends with `num_tokens` and strictly grows: an
    empty sequence has no last token to read.
    """
    grows = all(a < b for a, b in itertools.pairwise(cu_seqlens))
    ends = len(cu_seqlens) > 1 and cu_seqlens[0] == 0 and cu_seqlens[-1] == num_tokens
    if len(cu_seqlens) != num_seqs + 1 or not grows or not ends:
        raise ValueError(
            f"cu_seqlens must grow from 0 to {num_tokens} with {num_seqs + 1} entries, "
            f"got {list(cu_seqlens)}"
        )
