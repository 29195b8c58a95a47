"""How a layer reads and writes recurrent state: decoding, and prefill of packed prompts.

The layers of `rwkv6` and `rwkv7` are written once, over packed tokens [M, C]; a step knows which
token comes before which, and where the states are. M = B rows, or T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from mrss_kernels import wkv6_decode, wkv6_prefill, wkv7_decode, wkv7_prefill
from torch import Tensor

from mrss_provider.model.state import StatePool

Part = Literal["att", "ffn"]


class Step(Protocol):
    """One pass over M tokens."""

    def shift(self, layer: int, part: Part, h: Tensor) -> Tensor:
        """Return `previous token's h - h` [M, C] fp32 and keep the last h of each row."""
        ...

    def wkv7(
        self, layer: int, r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor
    ) -> Tensor:
        """Run RWKV-7's recurrence over inputs [M, H, N]; return y [M, H, N] fp32."""
        ...

    def wkv6(self, layer: int, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        """Run RWKV-6's recurrence over inputs [M, H, N]; return y [M, H, N] fp32."""
        ...

    def offset(self, layer: int) -> Tensor | None:
        """Return the rows' time offsets, broadcastable to [M, C], or None if no row has one."""
        ...


class DecodeStep:
    """One token a row; the rows' states lie in a pool and are *modified*."""

    def __init__(self, pool: StatePool, slots: Tensor) -> None:
        """Prepare a step over `slots` int64 [B]; -1 is a padding row."""
        self._pool = pool
        self._slots = slots
        self._index = _as_slice(slots) if slots.device.type == "cpu" else slots

    def shift(self, layer: int, part: Part, h: Tensor) -> Tensor:
        store = _shifts(self._pool, part)[layer]
        delta = store[self._index] - h
        store[self._index] = h
        return delta

    def wkv7(
        self, layer: int, r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor
    ) -> Tensor:
        return wkv7_decode(r, w, k, v, kk, a, self._pool.wkv[layer], self._slots)

    def wkv6(self, layer: int, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        return wkv6_decode(r, w, k, v, u, self._pool.wkv[layer], self._slots)

    def offset(self, layer: int) -> Tensor | None:
        offsets = self._pool.layer_offsets(layer)
        return None if offsets is None else offsets[self._index]


class PrefillStep:
    """Several tokens a row, packed; the rows' states lie in a pool and are *modified*."""

    def __init__(self, pool: StatePool, slots: Tensor, cu_seqlens: Sequence[int]) -> None:
        """Prepare a step over sequences `cu_seqlens` (n + 1 offsets) for `slots` int64 [n]."""
        self._pool = pool
        self._slots = slots
        self._cu_seqlens = list(cu_seqlens)
        bounds = torch.tensor(self._cu_seqlens, device=slots.device)
        self._starts, self.lasts = bounds[:-1], bounds[1:] - 1

    def shift(self, layer: int, part: Part, h: Tensor) -> Tensor:
        store = _shifts(self._pool, part)[layer]
        previous = torch.empty_like(h)
        previous[1:] = h[:-1]
        previous[self._starts] = store[self._slots]
        store[self._slots] = h[self.lasts]
        return previous.sub_(h)

    def wkv7(
        self, layer: int, r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor
    ) -> Tensor:
        return wkv7_prefill(r, w, k, v, kk, a, self._pool.wkv[layer], self._slots, self._cu_seqlens)

    def wkv6(self, layer: int, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        return wkv6_prefill(r, w, k, v, u, self._pool.wkv[layer], self._slots, self._cu_seqlens)

    def offset(self, layer: int) -> Tensor | None:
        offsets = self._pool.layer_offsets(layer)
        if offsets is None:
            return None
        rows = offsets[self._slots]
        lengths = self.lasts - self._starts + 1
        return rows.repeat_interleave(lengths, dim=0)


def _shifts(pool: StatePool, part: Part) -> Tensor:
    return pool.shift_att if part == "att" else pool.shift_ffn


def _as_slice(slots: Tensor) -> Tensor | slice:
    """Return a run of slots as a slice, which reads and writes without gathering."""
    ids = slots.tolist()
    if ids and ids[0] >= 0 and ids == list(range(ids[0], ids[0] + len(ids))):
        return slice(ids[0], ids[0] + len(ids))
    return slots
