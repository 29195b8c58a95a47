# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Where each of T packed tokens stands, found on the device from the sequences' bounds.

A launch depends on shapes alone, so that a graph that holds it serves any bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import (
    expect_contiguous,
    expect_device,
    expect_dtype,
    expect_lengths,
    expect_rows_of_slots,
    expect_shape,
)

FIRST, LAST, SLOT = range(3)
"""Rows of an index [3, T]: a sequence's number at its first token, its slot at its last token, and
its slot at every token; -1 everywhere else."""


@triton.jit
def ragged_index_kernel(p_cu_seqlens, p_slots, p_index, T, n, BT: tl.constexpr, BN: tl.constexpr):
    """Grid (T / BT). A token's sequence is the number of ends that are not after it."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    seq = tl.zeros([BT], tl.int32)
    for i in range(0, n, BN):
        o_n = i + tl.arange(0, BN)
        end = tl.load(p_cu_seqlens + 1 + o_n, mask=o_n < n, other=2147483647)
        seq += tl.sum((end[None, :] <= o_t[:, None]).to(tl.int32), 1)
    seq = tl.minimum(seq, n - 1)
    start = tl.load(p_cu_seqlens + seq)
    end = tl.load(p_cu_seqlens + seq + 1)
    slot = tl.load(p_slots + seq).to(tl.int32)
    slot = tl.where(o_t < end, slot, -1)
    m_t = o_t < T
    # Token 0 has nothing before it, whatever the offsets say.
    tl.store(p_index + o_t, tl.where((o_t == start) | (o_t == 0), seq, -1), mask=m_t)
    tl.store(p_index + T + o_t, tl.where(o_t == end - 1, slot, -1), mask=m_t)
    tl.store(p_index + 2 * T + o_t, slot, mask=m_t)


@triton.jit
def ragged_tail_kernel(p_cu_seqlens, p_slots, p_rows, p_index, n, BN: tl.constexpr):
    """Grid (n / BN). Two tokens a sequence: the last but one, then the last."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < n
    start = tl.load(p_cu_seqlens + o_n, mask=m_n, other=0).to(tl.int64)
    end = tl.load(p_cu_seqlens + 1 + o_n, mask=m_n, other=0).to(tl.int64)
    slot = tl.load(p_slots + o_n, mask=m_n, other=-1).to(tl.int32)
    slot = tl.where(end > start, slot, -1)
    last = tl.maximum(end - 1, 0)
    lone = end - start < 2
    tl.store(p_rows + 2 * o_n, tl.where(lone, last, last - 1), mask=m_n)
    tl.store(p_rows + 2 * o_n + 1, last, mask=m_n)
    # What the last but one gives is only there to stand before the last.
    p_first, p_last, p_slot = (
        p_index + 2 * o_n,
        p_index + 2 * (n + o_n),
        p_index + 2 * (2 * n + o_n),
    )
    tl.store(p_first, o_n, mask=m_n)
    tl.store(p_first + 1, tl.where(lone, o_n, -1), mask=m_n)
    tl.store(p_last, o_n * 0 - 1, mask=m_n)
    tl.store(p_last + 1, slot, mask=m_n)
    tl.store(p_slot, slot, mask=m_n)
    tl.store(p_slot + 1, slot, mask=m_n)


def upload_bounds(cu_seqlens: Sequence[int], num_tokens: int, slots: Tensor) -> Tensor:
    """Check offsets that the host knows, and send them to where the slots are.

    Args:
        cu_seqlens: n + 1 offsets, from 0 to T, growing.
        num_tokens: T.
        slots: int64 [n].

    Returns:
        int64 [n + 1]; the host does not wait for it.

    Raises:
        ValueError: other offsets than these.
    """
    expect_lengths(cu_seqlens, num_tokens, slots.shape[0])
    bounds = torch.tensor(cu_seqlens, dtype=torch.int64, pin_memory=slots.is_cuda)
    return bounds.to(slots.device, non_blocking=True)


def ragged_index(cu_seqlens: Tensor, slots: Tensor, num_tokens: int) -> Tensor:
    """Say of each token where it stands, from offsets that are on the device.

    Args:
        cu_seqlens: int32 or int64 [n + 1], from 0 to T, never falling; a sequence may be empty.
        slots: int64 [n], each sequence's state; -1 is a padding sequence.
        num_tokens: T.

    Returns:
        int32 [3, T], rows as `FIRST`, `LAST` and `SLOT` say.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    num_seqs = slots.shape[0]
    expect_bounds(cu_seqlens, slots)
    index = slots.new_empty((3, num_tokens), dtype=torch.int32)
    if num_tokens:
        grid = (-(-num_tokens // 64),)
        ragged_index_kernel[grid](cu_seqlens, slots, index, num_tokens, num_seqs, BT=64, BN=32)
    return index


def ragged_tail(cu_seqlens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Pick each sequence's last two tokens, as a batch of their own.

    That is all a step needs after its last recurrence: the last token's result, and the one before
    it for the token shift.

    Args:
        cu_seqlens: int32 or int64 [n + 1], as `ragged_index` takes it.
        slots: int64 [n].

    Returns:
        The tokens' rows int64 [2n], and their index int32 [3, 2n], in which every last token
        follows on the one before it; a lone token comes twice, the second time as a first token.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    num_seqs = slots.shape[0]
    expect_bounds(cu_seqlens, slots)
    rows = slots.new_empty((2 * num_seqs,))
    index = slots.new_empty((3, 2 * num_seqs), dtype=torch.int32)
    if num_seqs:
        grid = (-(-num_seqs // 64),)
        ragged_tail_kernel[grid](cu_seqlens, slots, rows, index, num_seqs, BN=64)
    return rows, index


def expect_bounds(cu_seqlens: Tensor, slots: Tensor | None) -> None:
    """Raise `ValueError` unless these can bound sequences; `slots` may be left out."""
    num_seqs = cu_seqlens.shape[0] - 1
    if slots is not None:
        num_seqs = slots.shape[0]
        expect_rows_of_slots(slots, num_seqs, cu_seqlens.device)
    expect_shape("cu_seqlens", cu_seqlens, (num_seqs + 1,))
    expect_dtype("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    expect_contiguous("cu_seqlens", cu_seqlens)
    expect_device("cu_seqlens", cu_seqlens, cu_seqlens.device)
