# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""The second halves of RWKV-7's four LoRAs in a launch of their own, for many decoding rows.

What stands between the layer's first product and `time_mix7`; few rows compute them there.
`sum_parts` and `load_up` are for other kernels of the layers, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._launch import dependent_launch, next_power_of_2
from mrss_kernels.caching import KEEP


@triton.jit
def sum_parts(p, mask, stride, PARTS: tl.constexpr):
    """Add up the parts of a split product, in order, in fp32."""
    x = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, PARTS):
        x += tl.load(p + i * stride, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def load_up(p_up, o_n, SUM: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr):
    """Return rows o_n of a LoRA's second half, zeros beyond its rank: [.., BR]."""
    o_d = tl.arange(0, BR)
    return tl.load(p_up + o_n[:, None] * SUM + o_d[None, :], mask=(o_d < RANK)[None, :], other=0.0)


@triton.jit
def _lora_rows(
    p_low, p_up, o_n, o_m, B, R, BM: tl.constexpr, BN: tl.constexpr, SUM: tl.constexpr,
    RANK: tl.constexpr, BR: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Return up [BN, RANK] @ act(low [BM, RANK])^T; ACT 1 is tanh, 2 the sigmoid."""
    up = load_up(p_up, o_n, SUM, RANK, BR)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BN, BM], tl.float32)
    for i in tl.static_range(0, RANK, BR):
        if i > 0:
            up = load_up(p_up + i, o_n, SUM, RANK - i, BR)
        o_d = i + tl.arange(0, BR)
        m_z = (o_m < B)[:, None] & (o_d < RANK)[None, :]
        z = sum_parts(p_low + o_m[:, None] * R + o_d[None, :], m_z, B * R, PARTS)
        if ACT == 1:
            z = 2 * tl.sigmoid(2 * z) - 1
        if ACT == 2:
            z = tl.sigmoid(z)
        acc = tl.dot(up, tl.trans(z.to(up.dtype)), acc, input_precision="ieee")
    return acc


@triton.jit
def lora_up_kernel(
    p_low,
    p_up,
    p_vectors,
    p_out,
    B,
    C: tl.constexpr,
    R: tl.constexpr,
    RW: tl.constexpr,
    RA: tl.constexpr,
    RG: tl.constexpr,
    RV: tl.constexpr,
    BRW: tl.constexpr,
    BRA: tl.constexpr,
    BRG: tl.constexpr,
    BRV: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (C / BN, 3 or 4, B / BM). Writes log decay, a, g and the v gate: [4, B, C] fp32.

    R is the distance from one row of the first halves to the next.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    i_lora = tl.program_id(1)
    o_m = tl.program_id(2).to(tl.int64) * BM + tl.arange(0, BM)
    SUM: tl.constexpr = RW + RA + RG + RV
    p_o = p_out + i_lora.to(tl.int64) * B * C + o_m[None, :] * C + o_n[:, None]
    m_o = (o_m < B)[None, :] & (o_n < C)[:, None]
    if i_lora == 0:
        w0 = tl.load(p_vectors + o_n)[:, None]
        u = _lora_rows(p_low, p_up, o_n, o_m, B, R, BM, BN, SUM, RW, BRW, PARTS, 1, PDL)
        y = -0.6065306597126334 * tl.sigmoid(w0 + u)
        tl.store(p_o, y, mask=m_o, eviction_policy=KEEP)
    elif i_lora == 1:
        a0 = tl.load(p_vectors + C + o_n)[:, None]
        u = _lora_rows(p_low + RW, p_up + RW, o_n, o_m, B, R, BM, BN, SUM, RA, BRA, PARTS, 0, PDL)
        tl.store(p_o, tl.sigmoid(a0 + u), mask=m_o, eviction_policy=KEEP)
    elif i_lora == 2:
        p_g, p_upg = p_low + RW + RA, p_up + RW + RA
        u = _lora_rows(p_g, p_upg, o_n, o_m, B, R, BM, BN, SUM, RG, BRG, PARTS, 2, PDL)
        tl.store(p_o, u, mask=m_o, eviction_policy=KEEP)
    elif RV > 0:
        v0 = tl.load(p_vectors + 2 * C + o_n)[:, None]
        p_v, p_upv = p_low + RW + RA + RG, p_up + RW + RA + RG
        u = _lora_rows(p_v, p_upv, o_n, o_m, B, R, BM, BN, SUM, RV, BRV, PARTS, 0, PDL)
        tl.store(p_o, tl.sigmoid(v0 + u), mask=m_o, eviction_policy=KEEP)


def lora_up(low: Tensor, up: Tensor, vectors: Tensor, ranks: Sequence[int]) -> Tensor:
    """Compute the second halves of a layer's LoRAs and their nonlinearities, for many rows.

    Arguments as `mrss_kernels.time_mix7.time_mix7`, which checks them; `low` may be a slice of the
    last dimension.

    Returns:
        [4, B, C] fp32: log decay, a, g and the gate between v and layer 0's v; the last one is
        left unwritten in layer 0.
    """
    parts, rows, _ = low.shape
    channels = up.shape[0]
    out = up.new_empty((4, rows, channels), dtype=torch.float32)
    # Few rows: one wide block a rank, for latency. Many: narrow ones that leave room for rows.
    block_m, widest, num_warps = 32, 128, 4
    if rows <= 32:
        block_m, widest, num_warps = 16, 512 if rows <= 16 else 256, 8
    sizes = rank_sizes(ranks)
    sizes |= {name: min(size, widest) for name, size in sizes.items() if name.startswith("B")}
    num_loras = 4 if ranks[3] else 3
    lora_up_kernel[(channels // 64, num_loras, -(-rows // block_m))](
        low,
        up,
        vectors,
        out,
        rows,
        C=channels,
        R=low.stride(1),
        **sizes,
        PARTS=parts,
        BM=block_m,
        BN=64,
        num_warps=num_warps,
        **dependent_launch(out.device),
    )
    return out


def rank_sizes(ranks: Sequence[int]) -> dict[str, int]:
    """Return the ranks and the blocks that hold them, as the kernels name them."""
    sizes = dict(zip(("RW", "RA", "RG", "RV"), ranks, strict=True))
    # A dot needs 16 at least, also for the rank that layer 0 does not have.
    return sizes | {"B" + name: next_power_of_2(max(rank, 16)) for name, rank in sizes.items()}
