"""Argument checks shared by every op: one form of message, raised before anything is written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, dtype

from mrss_kernels._launch import MAX_HEAD_SIZE, MIN_HEAD_SIZE, is_interpreted

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def expect_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise `ValueError` unless `tensor` has exactly `shape`."""
    if tensor.shape != shape and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def expect_dtype(name: str, tensor: Tensor, dtypes: Sequence[dtype]) -> None:
    """Raise `ValueError` unless the dtype of `tensor` is one of `dtypes`."""
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(item) for item in dtypes)
        raise ValueError(f"{name} must have dtype {allowed}, got {tensor.dtype}")


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


def expect_contiguous(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` unless `tensor` is dense in memory, last dimension fastest."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {list(tensor.stride())} "
            f"for shape {list(tensor.shape)}"
        )


def expect_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise `ValueError` unless `tensor` is on `device`, and Triton can run there."""
    if device.type != "cuda" and not is_interpreted():
        raise ValueError(f"{name} must be on a CUDA device, got {tensor.device}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def expect_head_size(size: int) -> None:
    """Raise `ValueError` unless `size` is a power of two that the kernels are built for."""
    if size & (size - 1) or not MIN_HEAD_SIZE <= size <= MAX_HEAD_SIZE:
        raise ValueError(
            f"the head size must be a power of two in [{MIN_HEAD_SIZE}, {MAX_HEAD_SIZE}], "
            f"got {size}"
        )


def check_recurrent_args(
    named: Sequence[tuple[str, Tensor]], pool: Tensor, slots: Tensor | None
) -> None:
    """Raise `ValueError` unless a recurrence kernel can take these.

    Args:
        named: name and tensor of each vector [B or T, H, N]; the first one sets the shape.
        pool: [S, H, N, N] fp32 or fp16.
        slots: int64 [B], or None where the caller checks them.
    """
    name, first = named[0]
    if first.dim() != 3:
        raise ValueError(f"{name} must have 3 dimensions, got shape {list(first.shape)}")
    _, heads, size = first.shape
    expect_head_size(size)
    for name, tensor in named:
        expect_shape(name, tensor, first.shape)
        expect_dtype(name, tensor, FLOATS)
        expect_contiguous(name, tensor)
        expect_device(name, tensor, pool.device)
    expect_shape("pool", pool, (pool.shape[0], heads, size, size))
    expect_dtype("pool", pool, (torch.float32, torch.float16))
    expect_contiguous("pool", pool)
    if slots is not None:
        expect_rows_of_slots(slots, first.shape[0], pool.device)


def expect_rows_of_slots(slots: Tensor, num_rows: int, device: torch.device) -> None:
    """Raise `ValueError` unless `slots` is a contiguous int64 [num_rows] on `device`."""
    expect_shape("slots", slots, (num_rows,))
    expect_dtype("slots", slots, (torch.int64,))
    expect_contiguous("slots", slots)
    expect_device("slots", slots, device)


def check_prefill_args(
    named: Sequence[tuple[str, Tensor]],
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
) -> Tensor:
    """Check a varlen call; return `cu_seqlens` as int64 or int32 [n + 1] on the pool's device.

    A host sequence is checked and copied there; the values of a tensor are not read.
    """
    check_recurrent_args(named, pool, None)
    if isinstance(cu_seqlens, Tensor):
        num_seqs = slots.shape[0]
        expect_rows_of_slots(slots, num_seqs, pool.device)
        expect_shape("cu_seqlens", cu_seqlens, (num_seqs + 1,))
        expect_dtype("cu_seqlens", cu_seqlens, (torch.int64, torch.int32))
        expect_contiguous("cu_seqlens", cu_seqlens)
        expect_device("cu_seqlens", cu_seqlens, pool.device)
        return cu_seqlens
    num_seqs = len(cu_seqlens) - 1
    expect_rows_of_slots(slots, num_seqs, pool.device)
    expect_lengths(cu_seqlens, named[0][1].shape[0], num_seqs)
    return torch.tensor(cu_seqlens, dtype=torch.int64, device=pool.device)
