"""Recurrent ops of RWKV-6 and RWKV-7 on pools of states, addressed by slot.

Pools are `[S, H, N, N]`, [V, K] for RWKV-7 and [K, V] for RWKV-6; every op modifies its pool in
place and returns y. See `mrss_kernels.reference` for shapes, dtypes and formulas. A pool on a CUDA
device is handled by Triton, any other (and one in fp64) by the reference.

`MRSS_PREFILL` chooses the prefill on CUDA: `own` is our Triton kernels, and so is `auto`, the
default; `fla` is flash-linear-attention's chunked form. With fp32 inputs it is always our own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mrss_kernels import reference

__all__ = ["prefill_choice", "wkv6_decode", "wkv6_prefill", "wkv7_decode", "wkv7_prefill"]


def wkv7_decode(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, pool: Tensor, slots: Tensor
) -> Tensor:
    """Advance RWKV-7 rows by one token; see `mrss_kernels.reference.wkv7_decode`."""
    if not _takes_triton(pool):
        return reference.wkv7_decode(r, w, k, v, kk, a, pool, slots)
    from mrss_kernels import wkv7

    r, w, k, v, kk, a = (x.contiguous() for x in (r, w, k, v, kk, a))
    return wkv7.wkv7_decode(r, w, k, v, kk, a, pool, slots)


def wkv7_prefill(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
) -> Tensor:
    """Read sequences into RWKV-7 states; see `mrss_kernels.reference.wkv7_prefill`.

    Offsets in a tensor are not read by the host, and only our own kernels take them.
    """
    if not _takes_triton(pool):
        return reference.wkv7_prefill(r, w, k, v, kk, a, pool, slots, cu_seqlens)
    from mrss_kernels import fla_prefill, wkv7_chunk

    r, w, k, v, kk, a = (x.contiguous() for x in (r, w, k, v, kk, a))
    if not isinstance(cu_seqlens, Tensor) and _chosen_fla(r):
        return fla_prefill.wkv7_prefill(r, w, k, v, kk, a, pool, slots, cu_seqlens)
    return wkv7_chunk.wkv7_prefill(r, w, k, v, kk, a, pool, slots, cu_seqlens)


def wkv6_decode(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, pool: Tensor, slots: Tensor
) -> Tensor:
    """Advance RWKV-6 rows by one token; see `mrss_kernels.reference.wkv6_decode`."""
    if not _takes_triton(pool):
        return reference.wkv6_decode(r, w, k, v, u, pool, slots)
    from mrss_kernels import wkv6

    r, w, k, v, u = (x.contiguous() for x in (r, w, k, v, u))
    return wkv6.wkv6_decode(r, w, k, v, u, pool, slots)


def wkv6_prefill(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
) -> Tensor:
    """Read sequences into RWKV-6 states; see `mrss_kernels.reference.wkv6_prefill`.

    Offsets in a tensor are not read by the host, and only our own kernels take them.
    """
    if not _takes_triton(pool):
        return reference.wkv6_prefill(r, w, k, v, u, pool, slots, cu_seqlens)
    from mrss_kernels import fla_prefill, wkv6_chunk

    r, w, k, v, u = (x.contiguous() for x in (r, w, k, v, u))
    if not isinstance(cu_seqlens, Tensor) and _chosen_fla(r):
        return fla_prefill.wkv6_prefill(r, w, k, v, u, pool, slots, cu_seqlens)
    return wkv6_chunk.wkv6_prefill(r, w, k, v, u, pool, slots, cu_seqlens)


def prefill_choice() -> str:
    """Return what `MRSS_PREFILL` chooses: "auto", "own" or "fla".

    Raises:
        ValueError: it says something else.
    """
    choice = os.environ.get("MRSS_PREFILL", "auto")
    if choice not in ("auto", "own", "fla"):
        raise ValueError(f"MRSS_PREFILL must be auto, own or fla, got {choice!r}")
    return choice


def _takes_triton(pool: Tensor) -> bool:
    return pool.is_cuda and pool.dtype != torch.float64


def _chosen_fla(r: Tensor) -> bool:
    """Tell whether fla reads inputs on CUDA."""
    if prefill_choice() != "fla" or r.dtype == torch.float32:
        return False
    from mrss_kernels import fla_prefill

    if not fla_prefill.is_available():
        raise ValueError("MRSS_PREFILL is fla, but fla-core is not installed: install it")
    return True
