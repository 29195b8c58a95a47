# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""RWKV-7's time mixing between its two products: LoRAs, gates, recurrence, group norm, output gate.

One program holds a head of a row: its 64 channels of every vector and its state [V, K]. With few
rows it also computes the second half of the four LoRAs (`lora_up` is skipped), because reading
those small weights once a row from the L2 costs less than one more launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import (
    FLOATS,
    expect_contiguous,
    expect_device,
    expect_dtype,
    expect_head_size,
    expect_rows_of_slots,
    expect_shape,
)
from mrss_kernels._launch import dependent_launch, next_power_of_2

RANK_STEP = 64
"""LoRA ranks are padded with zeros to a multiple of this when weights are packed."""

VECTORS = ("w0", "a0", "v0", "k_k", "k_a", "r_k", "ln_x_weight", "ln_x_bias")
"""Rows of the packed `vectors [8, C]`, fp32."""

MAX_FUSED_ROWS = 4


@triton.jit
def _sum_parts(p, mask, stride, PARTS: tl.constexpr):
    """Add up the parts of a split product, in order, in fp32."""
    x = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, PARTS):
        x += tl.load(p + i * stride, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _load_up(p_up, o_n, SUM: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr):
    o_d = tl.arange(0, BR)
    return tl.load(p_up + o_n[:, None] * SUM + o_d[None, :], mask=(o_d < RANK)[None, :], other=0.0)


@triton.jit
def _lora_rows(
    p_low, p_up, o_n, o_m, B, R, BM: tl.constexpr, BN: tl.constexpr, SUM: tl.constexpr,
    RANK: tl.constexpr, BR: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Return up [BN, RANK] @ act(low [BM, RANK])^T; ACT 1 is tanh, 2 the sigmoid."""
    up = _load_up(p_up, o_n, SUM, RANK, BR)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BN, BM], tl.float32)
    for i in tl.static_range(0, RANK, BR):
        if i > 0:
            up = _load_up(p_up + i, o_n, SUM, RANK - i, BR)
        o_d = i + tl.arange(0, BR)
        m_z = (o_m < B)[:, None] & (o_d < RANK)[None, :]
        z = _sum_parts(p_low + o_m[:, None] * R + o_d[None, :], m_z, B * R, PARTS)
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
        tl.store(p_o, -0.6065306597126334 * tl.sigmoid(w0 + u), mask=m_o)
    elif i_lora == 1:
        a0 = tl.load(p_vectors + C + o_n)[:, None]
        u = _lora_rows(p_low + RW, p_up + RW, o_n, o_m, B, R, BM, BN, SUM, RA, BRA, PARTS, 0, PDL)
        tl.store(p_o, tl.sigmoid(a0 + u), mask=m_o)
    elif i_lora == 2:
        p_g, p_upg = p_low + RW + RA, p_up + RW + RA
        u = _lora_rows(p_g, p_upg, o_n, o_m, B, R, BM, BN, SUM, RG, BRG, PARTS, 2, PDL)
        tl.store(p_o, u, mask=m_o)
    elif RV > 0:
        v0 = tl.load(p_vectors + 2 * C + o_n)[:, None]
        p_v, p_upv = p_low + RW + RA + RG, p_up + RW + RA + RG
        u = _lora_rows(p_v, p_upv, o_n, o_m, B, R, BM, BN, SUM, RV, BRV, PARTS, 0, PDL)
        tl.store(p_o, tl.sigmoid(v0 + u), mask=m_o)


@triton.jit
def _lora_row(
    p_z, up, stride, RANK: tl.constexpr, BR: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr
):
    """Return up [N, BR] @ act(z [BR]) in fp32."""
    o_d = tl.arange(0, BR)
    z = _sum_parts(p_z + o_d, o_d < RANK, stride, PARTS)
    if ACT == 1:
        z = 2 * tl.sigmoid(2 * z) - 1
    if ACT == 2:
        z = tl.sigmoid(z)
    return tl.sum(up.to(tl.float32) * z[None, :], 1)


@triton.jit
def time_mix7_kernel(
    p_in,
    p_low,
    p_lora,
    p_up,
    p_vectors,
    p_first,
    p_pool,
    p_slots,
    p_offset,
    p_out,
    B,
    eps,
    H: tl.constexpr,
    N: tl.constexpr,
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
    STACKED: tl.constexpr,
    FUSED: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (H, B). RV == 0 marks layer 0, which keeps its v for the others instead of mixing.

    STACKED: r, k, v are [3, B, C] and not the first 3C columns of rows of R.
    """
    i_h = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    C: tl.constexpr = H * N
    SUM: tl.constexpr = RW + RA + RG + RV
    o_n = tl.arange(0, N)
    o_c = i_h * N + o_n
    # All of this is older than the kernel in front of us, so it is read before waiting for it.
    slot = tl.load(p_slots + i_b).to(tl.int64)
    live = o_n * 0 + slot >= 0
    p_s = p_pool + (slot * H + i_h) * N * N + o_n[:, None] * N + o_n[None, :]
    state = tl.load(p_s, mask=live[:, None], other=0.0)
    k_k = tl.load(p_vectors + 3 * C + o_c)
    k_a = tl.load(p_vectors + 4 * C + o_c)
    r_k = tl.load(p_vectors + 5 * C + o_c)
    gn_w = tl.load(p_vectors + 6 * C + o_c)
    gn_b = tl.load(p_vectors + 7 * C + o_c)
    if FUSED:
        w0 = tl.load(p_vectors + o_c)
        a0 = tl.load(p_vectors + C + o_c)
        up_w = _load_up(p_up, o_c, SUM, RW, BRW)
        up_a = _load_up(p_up + RW, o_c, SUM, RA, BRA)
        up_g = _load_up(p_up + RW + RA, o_c, SUM, RG, BRG)
        if RV > 0:
            v0 = tl.load(p_vectors + 2 * C + o_c)
            up_v = _load_up(p_up + RW + RA + RG, o_c, SUM, RV, BRV)
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now, so that the next layer's kernel of this kind may read the state early as well.
        tl.extra.cuda.gdc_launch_dependents()
    stride = B * R
    at = i_b * C + o_c
    if STACKED:
        r = tl.load(p_in + at).to(tl.float32)
        k = tl.load(p_in + B * C + at).to(tl.float32)
        v = tl.load(p_in + 2 * B * C + at).to(tl.float32)
    else:
        p_row = p_in + i_b * R + o_c
        r = _sum_parts(p_row, o_c < C, stride, PARTS)
        k = _sum_parts(p_row + C, o_c < C, stride, PARTS)
        v = _sum_parts(p_row + 2 * C, o_c < C, stride, PARTS)
    if FUSED:
        p_z = p_low + i_b * R
        w = w0 + _lora_row(p_z, up_w, stride, RW, BRW, PARTS, 1)
        w = -0.6065306597126334 * tl.sigmoid(w)
        a = tl.sigmoid(a0 + _lora_row(p_z + RW, up_a, stride, RA, BRA, PARTS, 0))
        g = _lora_row(p_z + RW + RA, up_g, stride, RG, BRG, PARTS, 2)
    else:
        w = tl.load(p_lora + at)
        a = tl.load(p_lora + B * C + at)
        g = tl.load(p_lora + 2 * B * C + at)
    if RV > 0:
        if FUSED:
            gate = tl.sigmoid(v0 + _lora_row(p_z + RW + RA + RG, up_v, stride, RV, BRV, PARTS, 0))
        else:
            gate = tl.load(p_lora + 3 * B * C + at)
        v += (tl.load(p_first + at) - v) * gate
    else:
        tl.store(p_first + at, v)
    kk = k * k_k
    kk = kk / tl.maximum(tl.sqrt(tl.sum(kk * kk, 0)), 1e-12)
    k = k * (1 + (a - 1) * k_a)
    s = state.to(tl.float32)
    removed = tl.sum(s * kk[None, :], 1)
    s = s * tl.exp(w)[None, :] - removed[:, None] * (kk * a)[None, :] + v[:, None] * k[None, :]
    tl.store(p_s, s.to(p_pool.dtype.element_ty), mask=live[:, None])
    y = tl.sum(s * r[None, :], 1)
    if OFFSET:
        y *= 1 + tl.load(p_offset + slot * C + o_c, mask=live, other=0.0).to(tl.float32)
    y -= tl.sum(y, 0) / N
    y = y / tl.sqrt(tl.sum(y * y, 0) / N + eps) * gn_w + gn_b
    y += tl.sum(r * k * r_k, 0) * v
    tl.store(p_out + at, tl.where(live, y * g, 0.0).to(p_out.dtype.element_ty))


def time_mix7(
    projected: Tensor,
    up: Tensor,
    vectors: Tensor,
    ranks: Sequence[int],
    v_first: Tensor,
    pool: Tensor,
    slots: Tensor,
    time_offset: Tensor | None = None,
    *,
    low: Tensor | None = None,
    fuse_rows: int = MAX_FUSED_ROWS,
) -> Tensor:
    """Advance one layer's recurrence by one token a row, from its projections to Wo's input.

    Args:
        projected: [P, B, 3C + sum(ranks)], parts to be added up: r, k, v and the first halves of
            the LoRAs of w, a, g, v, in this order and before their nonlinearities.
        up: second halves of the LoRAs [C, sum(ranks)], same order, fp16, bf16 or fp32.
        vectors: [8, C] fp32, rows as `VECTORS`; the decay of a token is
            exp(-0.6065 * sigmoid(w0 + ..)).
        ranks: of the LoRAs of w, a, g, v, multiples of 64; v's is 0 in layer 0.
        v_first: layer 0's values [B, C] fp32, *written* by layer 0 and read by the others.
        pool: the layer's states [S, H, V, K] fp32 or fp16, *modified*.
        slots: int64 [B], no slot twice; -1 is a padding row, which gives zeros.
        time_offset: the layer's output offsets by slot [S or more, C], or None.
        low: the first halves of the LoRAs [P, B, sum(ranks)]; then `projected` is r, k, v stacked
            [3, B, C], in one part.
        fuse_rows: up to so many rows the second halves are computed in the same launch.

    Returns:
        Wo's input [B, C] in the dtype of `up`.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernel cannot take.
    """
    _check_time_mix(projected, low, up, vectors, ranks, v_first, pool, slots, time_offset)
    _, heads, size, _ = pool.shape
    stacked = low is not None
    if low is None:
        low = projected[..., 3 * heads * size :]
    parts, rows, _ = low.shape
    out = up.new_empty((rows, heads * size))
    if not rows:
        return out
    fused = rows <= fuse_rows
    lora = None if fused else lora_up(low, up, vectors, ranks)
    time_mix7_kernel[(heads, rows)](
        projected,
        low,
        lora,
        up,
        vectors,
        v_first,
        pool,
        slots,
        time_offset,
        out,
        rows,
        64e-5,
        H=heads,
        N=size,
        R=low.stride(1),
        **_rank_sizes(ranks),
        PARTS=parts,
        STACKED=stacked,
        FUSED=fused,
        OFFSET=time_offset is not None,
        num_warps=8 if fused else 4 if rows < 32 else 2,
        **dependent_launch(out.device),
    )
    return out


def lora_up(low: Tensor, up: Tensor, vectors: Tensor, ranks: Sequence[int]) -> Tensor:
    """Compute the second halves of a layer's LoRAs and their nonlinearities, for many rows.

    Arguments as `time_mix7`, which checks them; `low` may be a slice of the last dimension.

    Returns:
        [4, B, C] fp32: log decay, a, g and the gate between v and layer 0's v; the last one is
        left unwritten in layer 0.
    """
    parts, rows, _ = low.shape
    channels = up.shape[0]
    out = up.new_empty((4, rows, channels), dtype=torch.float32)
    # Few rows: one wide block a rank, for latency. Many: narrow ones that leave room for rows.
    block_m, widest = (16, 512) if rows <= 16 else (32, 128)
    block_n = 64 if rows > 16 else 32
    sizes = _rank_sizes(ranks)
    sizes |= {name: min(size, widest) for name, size in sizes.items() if name.startswith("B")}
    num_loras = 4 if ranks[3] else 3
    lora_up_kernel[(channels // block_n, num_loras, -(-rows // block_m))](
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
        BN=block_n,
        num_warps=4,
        **dependent_launch(out.device),
    )
    return out


def _rank_sizes(ranks: Sequence[int]) -> dict[str, int]:
    """Return the ranks and the blocks that hold them, as the kernels name them."""
    sizes = dict(zip(("RW", "RA", "RG", "RV"), ranks, strict=True))
    # A dot needs 16 at least, also for the rank that layer 0 does not have.
    return sizes | {"B" + name: next_power_of_2(max(rank, 16)) for name, rank in sizes.items()}


def _check_time_mix(
    projected: Tensor,
    low: Tensor | None,
    up: Tensor,
    vectors: Tensor,
    ranks: Sequence[int],
    v_first: Tensor,
    pool: Tensor,
    slots: Tensor,
    time_offset: Tensor | None,
) -> None:
    num_slots, heads, size, _ = pool.shape
    channels, total = heads * size, sum(ranks)
    if projected.dim() != 3:
        raise ValueError(f"projected must have 3 dimensions, got {list(projected.shape)}")
    if len(ranks) != 4 or any(rank % RANK_STEP or rank < 0 for rank in ranks) or not all(ranks[:3]):
        raise ValueError(
            f"ranks must be 4 multiples of {RANK_STEP}, only the last of which may be 0, "
            f"got {list(ranks)}"
        )
    parts, rows, _ = projected.shape
    expect_head_size(size)
    if channels % RANK_STEP:
        raise ValueError(f"C must be a multiple of {RANK_STEP}, got {channels}")
    named = [("projected", projected), ("up", up), ("vectors", vectors)]
    named += [("v_first", v_first), ("pool", pool)]
    if low is None:
        expect_shape("projected", projected, (parts, rows, 3 * channels + total))
    else:
        expect_shape("projected", projected, (3, rows, channels))
        expect_shape("low", low, (low.shape[0], rows, total))
        expect_dtype("low", low, FLOATS)
        named.append(("low", low))
    expect_shape("up", up, (channels, total))
    expect_shape("vectors", vectors, (len(VECTORS), channels))
    expect_shape("v_first", v_first, (rows, channels))
    expect_shape("pool", pool, (num_slots, heads, size, size))
    expect_dtype("projected", projected, FLOATS)
    expect_dtype("up", up, FLOATS)
    expect_dtype("vectors", vectors, (torch.float32,))
    expect_dtype("v_first", v_first, (torch.float32,))
    expect_dtype("pool", pool, (torch.float32, torch.float16))
    expect_rows_of_slots(slots, rows, pool.device)
    if time_offset is not None:
        rows_of_offset = max(num_slots, time_offset.shape[0])
        expect_shape("time_offset", time_offset, (rows_of_offset, channels))
        expect_dtype("time_offset", time_offset, FLOATS)
        named.append(("time_offset", time_offset))
    for name, tensor in named:
        expect_contiguous(name, tensor)
        expect_device(name, tensor, pool.device)
