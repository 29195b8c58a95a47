"""Prefill through flash-linear-attention's chunked kernels, on our pools.

fla packs sequences as [1, T, H, N], keeps states as [n, H, K, V] in fp32 and never writes in
place: states are gathered and scattered here, RWKV-7's transposed on the way. fla is imported
inside the functions, because importing it takes seconds.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from mrss_kernels._checks import check_prefill_args

LOG_DECAY_BOUND = -0.6065306597126334
"""-exp(-0.5), the lower bound of RWKV-7's log decay: it lets fla take its 64-token chunks."""


@functools.cache
def is_available() -> bool:
    """Tell whether fla is installed; imports nothing."""
    return importlib.util.find_spec("fla") is not None


def wkv7_prefill(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Sequence[int],
) -> Tensor:
    """Read several sequences into RWKV-7 states; arguments as `mrss_kernels.wkv7.wkv7_prefill`.

    Products run on the tensor cores in the dtype of `r`, so y carries that dtype's rounding.
    """
    from fla.ops.rwkv7 import chunk_rwkv7

    named = [("r", r), ("w", w), ("k", k), ("v", v), ("kk", kk), ("a", a)]
    offsets = check_prefill_args(named, pool, slots, cu_seqlens)
    removal = kk.to(r.dtype)
    y, state = chunk_rwkv7(
        r[None],
        w.to(r.dtype)[None],
        k.to(r.dtype)[None],
        v.to(r.dtype)[None],
        -removal[None],
        (removal * a.to(r.dtype))[None],
        scale=1.0,
        initial_state=pool[slots].float().mT.contiguous(),
        output_final_state=True,
        cu_seqlens=offsets,
        cu_seqlens_cpu=torch.tensor(cu_seqlens, dtype=torch.int64),
        safe_gate=True,
        lower_bound=LOG_DECAY_BOUND,
        chunk_size=64,
    )
    pool[slots] = state.mT.to(pool.dtype)
    out: Tensor = y[0].float()
    return out


def wkv6_prefill(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Sequence[int],
) -> Tensor:
    """Read several sequences into RWKV-6 states; arguments as `mrss_kernels.wkv6.wkv6_prefill`.

    Products run on the tensor cores in the dtype of `r`, so y carries that dtype's rounding.
    """
    from fla.ops.rwkv6 import chunk_rwkv6

    named = [("r", r), ("w", w), ("k", k), ("v", v)]
    offsets = check_prefill_args(named, pool, slots, cu_seqlens)
    y, state = chunk_rwkv6(
        r[None],
        k.to(r.dtype)[None],
        v.to(r.dtype)[None],
        w.float()[None],
        u.to(r.dtype),
        scale=1.0,
        initial_state=pool[slots].float(),
        output_final_state=True,
        cu_seqlens=offsets,
        cu_seqlens_cpu=torch.tensor(cu_seqlens, dtype=torch.int64),
    )
    pool[slots] = state.to(pool.dtype)
    out: Tensor = y[0].float()
    return out
