"""Packing: rows of unlike lengths as one row of tokens, without the padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the tokens of n sequences stand, one after the other; N tokens in all.

    Attributes:
        bounds: on the host, n + 1 numbers from 0 to N.
        cu_seqlens: the same on the device, int64 [n + 1].
        cu_seqlens_cpu: the same on the CPU.
        rows: int64 [N] on the device, the sequence of a token.
        first: int32 [N] on the device, the sequence that begins at a token, else -1.
        places: int64 [N] on the device, where a token stands in rows of `width`, row after row.
    """

    bounds: tuple[int, ...]
    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor
    rows: Tensor
    first: Tensor
    places: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, device: torch.device) -> Packing:
        """Return the packing of rows of `width` tokens, of which the first `lengths` are real."""
        sizes = torch.tensor(lengths)
        ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        rows = torch.arange(len(lengths)).repeat_interleave(sizes)
        inside = torch.arange(int(ends[-1])) - ends[rows]
        first = torch.where(inside == 0, rows, -1).int()
        return cls(
            tuple(ends.tolist()),
            ends.to(device),
            ends,
            rows.to(device),
            first.to(device),
            (rows * width + inside).to(device),
        )

    def pack(self, rows: Tensor) -> Tensor:
        """Return the real tokens [N, ...] of [n, width, ...]."""
        return rows.flatten(0, 1).index_select(0, self.places)

    def unpack(self, tokens: Tensor, width: int) -> Tensor:
        """Return [n, width, ...] of [N, ...], zeros on the padding."""
        count = len(self.bounds) - 1
        empty = tokens.new_zeros(count * width, *tokens.shape[1:])
        return empty.index_copy(0, self.places, tokens).view(count, width, *tokens.shape[1:])
