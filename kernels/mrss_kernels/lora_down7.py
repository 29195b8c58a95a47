# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""First halves of RWKV-7's LoRAs over many tokens, each on its own mixed input, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import (
    FLOATS,
    expect_contiguous,
    expect_device,
    expect_dtype,
    expect_shape,
)
from mrss_kernels._launch import dependent_launch
from mrss_kernels.time_mix7 import RANK_STEP


@triton.jit
def sigmoid(z):
    """Return the sigmoid of z, in fewer than half the instructions of `tl.sigmoid`.

    A division costs eight of them and the square of 1 / sqrt two; the error is that of fp32.
    """
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * z))
    return root * root


@triton.jit
def activate(z, kind):
    """Return tanh(z) for kind 1, the sigmoid for 2, z for 0: what a first half ends with."""
    z = tl.where(kind == 1, 2 * sigmoid(2 * z) - 1, z)
    return tl.where(kind == 2, sigmoid(z), z)


@triton.jit
def lora_down_kernel(
    p_x,
    p_w,
    p_z,
    T,
    C: tl.constexpr,
    RW: tl.constexpr,
    RA: tl.constexpr,
    RG: tl.constexpr,
    RV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of BN ranks of each LoRA, T / BM). x [6, T, C], w [SUM, C], z [T, SUM]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    SUM: tl.constexpr = RW + RA + RG + RV
    IA: tl.constexpr = (RW + BN - 1) // BN
    IG: tl.constexpr = IA + (RA + BN - 1) // BN
    IV: tl.constexpr = IG + (RG + BN - 1) // BN
    i = tl.program_id(0)
    # Which LoRA this block belongs to; mixed inputs lie in the order r, k, v, w, a, g.
    first, end, source, kind = i * BN, i * 0 + RW, i * 0 + 3, i * 0 + 1
    if i >= IA:
        first, end, source, kind = RW + (i - IA) * BN, end + RA, source + 1, kind - 1
    if i >= IG:
        first, end, source, kind = RW + RA + (i - IG) * BN, end + RG, source + 1, kind + 2
    if i >= IV:
        first, end, source, kind = RW + RA + RG + (i - IV) * BN, end + RV, source - 3, kind - 2
    o_n = first + tl.arange(0, BN)
    m_n = o_n < end
    i_m = tl.program_id(1).to(tl.int64) * BM
    o_m = tl.arange(0, BM)
    m_m = o_m < T - i_m
    o_k = tl.arange(0, BK)
    p_rows = p_x + (source.to(tl.int64) * T + i_m) * C + o_m[:, None] * C + o_k[None, :]
    p_tile = p_w + o_n[:, None] * C + o_k[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, C, BK, num_stages=STAGES):
        x = tl.load(p_rows + k, mask=m_m[:, None], other=0.0)
        w = tl.load(p_tile + k, mask=m_n[:, None], other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    z = activate(acc, kind).to(p_z.dtype.element_ty)
    tl.store(
        p_z + i_m * SUM + o_m[:, None] * SUM + o_n[None, :], z, mask=m_m[:, None] & m_n[None, :]
    )


class DownConfig(NamedTuple):
    """How `lora_down7` is cut: tokens, ranks and C a block, warps, blocks of C ahead."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def lora_down7(
    mixed: Tensor, down: Tensor, ranks: Sequence[int], *, config: DownConfig | None = None
) -> Tensor:
    """Multiply the first halves of a layer's LoRAs with their mixed inputs, and activate them.

    Args:
        mixed: [6, T, C] in the order r, k, v, w, a, g, fp16, bf16 or fp32.
        down: first halves of the LoRAs of w, a, g, v: [sum(ranks), C], same dtype.
        ranks: of the LoRAs, multiples of 64; v's is 0 in layer 0.
        config: how to cut it; None takes what suits T.

    Returns:
        tanh, nothing, the sigmoid, nothing of the products: [T, sum(ranks)] in the dtype of `down`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    num_tokens, channels = mixed.shape[1:]
    expect_shape("mixed", mixed, (6, num_tokens, channels))
    expect_ranks(ranks)
    expect_shape("down", down, (sum(ranks), channels))
    expect_dtype("mixed", mixed, FLOATS)
    expect_dtype("down", down, (mixed.dtype,))
    expect_dense([("mixed", mixed), ("down", down)])
    if channels % RANK_STEP:
        raise ValueError(f"C must be a multiple of {RANK_STEP}, got {channels}")
    out = mixed.new_empty((num_tokens, down.shape[0]))
    if not num_tokens:
        return out
    config = config or _down_config(num_tokens)
    block_m, block_n, block_k, num_warps, num_stages = config
    num_blocks = sum(-(-rank // block_n) for rank in ranks)
    lora_down_kernel[(num_blocks, -(-num_tokens // block_m))](
        mixed,
        down,
        out,
        num_tokens,
        C=channels,
        **rank_names(ranks),
        BM=block_m,
        BN=block_n,
        BK=min(channels & -channels, block_k),
        STAGES=num_stages,
        num_stages=num_stages,
        num_warps=num_warps,
        **dependent_launch(out.device),
    )
    return out


def _down_config(num_tokens: int) -> DownConfig:
    # Few tokens: many small programs with long blocks of C, for latency. Many: tokens and weights
    # are read as seldom as can be.
    if num_tokens <= 512:
        return DownConfig(32, 64, 128, 4, 4)
    if num_tokens <= 2048:
        return DownConfig(64, 128, 64, 4, 4)
    return DownConfig(128, 128, 64, 8, 3)


def expect_ranks(ranks: Sequence[int]) -> None:
    """Raise `ValueError` unless these can be the ranks of w, a, g, v."""
    if len(ranks) != 4 or any(rank % RANK_STEP or rank < 0 for rank in ranks) or not all(ranks[:3]):
        raise ValueError(
            f"ranks must be 4 multiples of {RANK_STEP}, only the last of which may be 0, "
            f"got {list(ranks)}"
        )


def rank_names(ranks: Sequence[int]) -> dict[str, int]:
    """Return the ranks by the names that kernels have for them."""
    return dict(zip(("RW", "RA", "RG", "RV"), ranks, strict=True))


def expect_dense(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise `ValueError` unless all are dense and on the first one's device."""
    for name, tensor in named:
        expect_contiguous(name, tensor)
        expect_device(name, tensor, named[0][1].device)
