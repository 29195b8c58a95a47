# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="assignment, misc"
"""RWKV-7's time mixing as a unit of `persistent7_kernel`: one head of one to three rows.

As `time_mix7`. A LoRA's second half multiplies all rows' columns at once: each LoRA of each row has
a column of its own among the 8 or 16, zeros where the others' ranks are. Vectors of a head have two
elements a thread, the same in every warp; the state, and what meets it, eight columns a thread.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from mrss_kernels.caching import KEEP
from mrss_kernels.persistent7_parts import (
    BLANK,
    BLOCK_LEN,
    bits,
    blank,
    count,
    multiply,
    thread_barrier,
)

GROUP_NORM_EPS = gl.constexpr(64e-5)


@gluon.jit
def _sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))


@gluon.jit
def _activate(z, o_r, RW: gl.constexpr, RA: gl.constexpr, RG: gl.constexpr):
    """Return tanh(z) at the ranks of w, sigmoid(z) at those of g, z at the others'."""
    slope = gl.where(o_r < RW, 2.0, 1.0)
    bent = slope * _sigmoid(slope * z) - (slope - 1.0)
    return gl.where((o_r < RW) | ((o_r >= RW + RA) & (o_r < RW + RA + RG)), bent, z)


@gluon.jit
def _load_rows(
    p_rows,
    i_b,
    o_c,
    o_r,
    B: gl.constexpr,
    C: gl.constexpr,
    G: gl.constexpr,
    SUM: gl.constexpr,
    BLOCKS: gl.constexpr,
):
    """Return r, k, v of the head, first halves of LoRAs, of G rows, and the largest bits of all."""
    rs = ()
    ks = ()
    vs = ()
    lows = ()
    seen = (o_r * 0 + o_c * 0).to(gl.uint32)
    for j in gl.static_range(G):
        here = (o_c >= 0) & (i_b + j < B)
        p_row = p_rows + (i_b + j) * (3 * C + SUM)
        r = gl.load(p_row + o_c, mask=here, other=0.0, volatile=True)
        k = gl.load(p_row + C + o_c, mask=here, other=0.0, volatile=True)
        v = gl.load(p_row + 2 * C + o_c, mask=here, other=0.0, volatile=True)
        seen = gl.maximum(seen, gl.maximum(gl.maximum(bits(r), bits(k)), bits(v)))
        rs = rs + (r,)  # noqa: RUF005 (no * in Gluon)
        ks = ks + (k,)  # noqa: RUF005
        vs = vs + (v,)  # noqa: RUF005
        for i in gl.static_range(BLOCKS):
            at = i * BLOCK_LEN + o_r
            low = gl.load(p_row + 3 * C + at, mask=here & (at < SUM), other=0.0, volatile=True)
            seen = gl.maximum(seen, bits(low))
            lows = lows + (low,)  # noqa: RUF005
    return rs, ks, vs, lows, seen


@gluon.jit
def _stage_low(
    inputs,
    lows,
    o_r,
    G: gl.constexpr,
    RW: gl.constexpr,
    RA: gl.constexpr,
    RG: gl.constexpr,
    BLOCKS: gl.constexpr,
):
    """Put activated first halves into shared memory: column `lora * G + row` holds a LoRA's."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    o_n = gl.arange(0, inputs.shape[1], gl.SliceLayout(1, LAYOUT))
    o_j = gl.arange(0, BLOCK_LEN, gl.SliceLayout(0, LAYOUT))
    for i in gl.static_range(BLOCKS):
        at = i * BLOCK_LEN + o_j
        lora = gl.where(at < RW, 0, gl.where(at < RW + RA, 1, 2))
        lora = gl.where(at < RW + RA + RG, lora, 3)
        tile = (o_n[:, None] + o_j[None, :]).to(gl.float32) * 0
        for j in gl.static_range(G):
            z = _activate(lows[j * BLOCKS + i], i * BLOCK_LEN + o_r, RW, RA, RG)
            z = gl.convert_layout(gl.reshape(z, [BLOCK_LEN]), gl.SliceLayout(0, LAYOUT))
            tile = gl.where(o_n[:, None] == (lora * G + j)[None, :], z[None, :], tile)
        inputs.index(i).store(tile.to(inputs.dtype))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _unit_norm(k, k_k):
    kk = k * k_k
    return kk / gl.maximum(gl.sqrt(gl.sum(kk * kk, 1, keep_dims=True)), 1e-12)


@gluon.jit
def _advance_row(
    loaded,
    r,
    k,
    v,
    v_first,
    kk,
    vectors,
    handed,
    p_first,
    p_out,
    o_c,
    is_first,
    ROW: gl.constexpr,
    G: gl.constexpr,
):
    """Advance one row's state of the head and write its part of Wo's input."""
    state, p_s, live = loaded
    TILE: gl.constexpr = state.type.layout
    VECTOR: gl.constexpr = r.type.layout
    # Behind the LoRAs' columns.
    AT: gl.constexpr = 4 * G + 8 * ROW
    w0, a0, v0, _, k_a, r_k, norm_weight, norm_bias = vectors
    w = -0.6065306597126334 * _sigmoid(w0 + handed.index(ROW).load(VECTOR))
    a = _sigmoid(a0 + handed.index(G + ROW).load(VECTOR))
    gate = handed.index(2 * G + ROW).load(VECTOR)
    if is_first:
        gl.store(p_first + o_c, v)
    else:
        v += (v_first - v) * _sigmoid(v0 + handed.index(3 * G + ROW).load(VECTOR))
    k = k * (1 + (a - 1) * k_a)
    handed.index(AT).store(gl.exp(w))
    handed.index(AT + 1).store(kk)
    handed.index(AT + 2).store(kk * a)
    handed.index(AT + 3).store(k)
    handed.index(AT + 4).store(r)
    handed.index(AT + 5).store(v)
    thread_barrier()
    s = state.to(gl.float32)
    removed = gl.sum(s * handed.index(AT + 1).load(TILE), 1, keep_dims=True)
    s = s * handed.index(AT).load(TILE) - removed * handed.index(AT + 2).load(TILE)
    s += handed.index(AT + 5).permute((1, 0)).load(TILE) * handed.index(AT + 3).load(TILE)
    y = gl.sum(s * handed.index(AT + 4).load(TILE), 1, keep_dims=True)
    handed.index(AT + 6).permute((1, 0)).store(y)
    bonus = gl.sum(r * k * r_k, 1, keep_dims=True) * v
    thread_barrier()
    y = handed.index(AT + 6).load(VECTOR)
    y -= gl.sum(y, 1, keep_dims=True) / 64
    deviation = gl.sqrt(gl.sum(y * y, 1, keep_dims=True) / 64 + GROUP_NORM_EPS)
    y = (y / deviation * norm_weight + norm_bias + bonus) * gate
    gl.store(p_out + o_c, y.to(p_out.dtype.element_ty), eviction_policy=KEEP)
    gl.store(p_s, s.to(p_s.dtype.element_ty), mask=live)


@gluon.jit
def _load_state(p_pool, slot, i_h, H: gl.constexpr):
    """Return a head's state [64, 64], its addresses, and whether it is one."""
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    o_v = gl.arange(0, 64, gl.SliceLayout(1, TILE))[:, None]
    o_k = gl.arange(0, 64, gl.SliceLayout(0, TILE))[None, :]
    live = (o_v + o_k) * 0 + slot >= 0
    p_s = p_pool + (slot * H + i_h) * 4096 + o_v * 64 + o_k
    return gl.load(p_s, mask=live, other=0.0), p_s, live


@gluon.jit
def time_mix_unit(
    unit,
    is_first,
    ring,
    full,
    empty,
    inputs,
    block,
    p_projected,
    p_vectors,
    p_first,
    p_pool,
    p_slots,
    p_out,
    p_next_out,
    B: gl.constexpr,
    C: gl.constexpr,
    G: gl.constexpr,
    RW: gl.constexpr,
    RA: gl.constexpr,
    RG: gl.constexpr,
    RV: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Advance a head of G rows, from projections to Wo's input; return the next block of weights.

    States and vectors are read before the projections are waited for.
    """
    VECTOR: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    H: gl.constexpr = C // 64
    SUM: gl.constexpr = RW + RA + RG + RV
    BLOCKS: gl.constexpr = (SUM + BLOCK_LEN - 1) // BLOCK_LEN
    i_h = unit % H
    i_b = unit // H * G
    o_n = gl.arange(0, 64, gl.SliceLayout(0, VECTOR))[None, :]
    # The warps' parts of a block of ranks.
    o_r = gl.arange(0, 4, gl.SliceLayout(1, VECTOR))[:, None] * 64 + o_n
    o_c = i_h * 64 + o_n
    states = ()
    firsts = ()
    for j in gl.static_range(G):
        slot = gl.load(p_slots + i_b + j, mask=i_b + j < B, other=-1)
        states = states + (_load_state(p_pool, slot, i_h, H),)  # noqa: RUF005 (no * in Gluon)
        here = (o_c >= 0) & (i_b + j < B) & (is_first ^ True)
        first = gl.load(p_first + (i_b + j) * C + o_c, mask=here, other=0.0)
        firsts = firsts + (first,)  # noqa: RUF005
    vectors = ()
    for i in gl.static_range(8):
        vectors = vectors + (gl.load(p_vectors + i * C + o_c),)  # noqa: RUF005
    rs, ks, vs, lows, seen = _load_rows(p_projected, i_b, o_c, o_r, B, C, G, SUM, BLOCKS)
    polls = gl.to_tensor(0)
    # Warps read the same r, k and v, each for itself: only what crosses warps is one for all.
    while gl.max(gl.max(seen, 1), 0) == BLANK:
        polls = count(polls)
        rs, ks, vs, lows, seen = _load_rows(p_projected, i_b, o_c, o_r, B, C, G, SUM, BLOCKS)
    _stage_low(inputs, lows, o_r, G, RW, RA, RG, BLOCKS)
    kks = ()
    for j in gl.static_range(G):
        kks = kks + (_unit_norm(ks[j], vectors[3]),)  # noqa: RUF005
        # As `mark`, before this layer's are stored.
        here = (o_c >= 0) & (i_b + j < B)
        p_mark = p_next_out + (i_b + j) * C + o_c
        gl.store(p_mark, blank(p_out), mask=here, eviction_policy=KEEP)
    acc, block = multiply(ring, full, empty, inputs, block, BLOCKS, STAGES)
    # The inputs are read: their place takes what threads hand to each other.
    ROWS: gl.constexpr = acc.shape[1]
    inputs._reinterpret(gl.float32, [ROWS, 64], LINEAR).permute((1, 0)).store(acc)
    NUM_HANDED: gl.constexpr = ROWS + 8 * G
    handed = inputs._reinterpret(gl.float32, [NUM_HANDED, 1, 64], LINEAR)
    thread_barrier()
    for j in gl.static_range(G):
        if i_b + j < B:
            at = (i_b + j) * C
            _advance_row(
                states[j], rs[j], ks[j], vs[j], firsts[j], kks[j], vectors, handed,
                p_first + at, p_out + at, o_c, is_first, j, G,
            )  # fmt: skip
    thread_barrier()
    return block
