# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="assignment, misc"
"""RWKV-7's time mixing as a unit of `persistent7_kernel`: one head of one to four rows.

As `time_mix7`. Vectors of a head are [4, 64], a row a warp, so that several rows take the time of
one; states, and what meets them, have eight columns a thread, one row after the other. In between
all rows' vectors go through shared memory at once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from mrss_kernels.caching import KEEP
from mrss_kernels.persistent7_parts import (
    BLANK,
    BLOCK_LEN,
    NUM_OUTPUTS,
    bits,
    blank,
    count,
    get_votes,
    multiply,
    put_votes,
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
def _load_sum(p, column, mask, seen, ROWS_LEN: gl.constexpr, HELPED: gl.constexpr):
    """Return numbers of the first product, and the largest of seen and their bits [4, 64].

    From unit HELPED on they are a sum of two parts.
    """
    x = gl.load(p, mask=mask, other=0.0, volatile=True)
    part_mask = mask & (column >= HELPED * NUM_OUTPUTS)
    part = gl.load(p + ROWS_LEN, mask=part_mask, other=0.0, volatile=True)
    largest = gl.reshape(gl.maximum(bits(x), bits(part)), [4, 64])
    largest = gl.convert_layout(largest, seen.type.layout, assert_trivial=True)
    return x + part, gl.maximum(seen, largest)


@gluon.jit
def _load_inputs(
    p_rows,
    i_b,
    o_c,
    o_r,
    here,
    B: gl.constexpr,
    C: gl.constexpr,
    G: gl.constexpr,
    SUM: gl.constexpr,
    HELPED: gl.constexpr,
):
    """Return r, k, v of a head [4, 64], first halves of LoRAs, and the largest of their bits.

    First halves are in a tuple, 256 ranks of a row each.
    """
    ROW: gl.constexpr = 3 * C + SUM
    o_j = gl.arange(0, 4, gl.SliceLayout(1, o_c.type.layout))[:, None]
    p_row = p_rows + (i_b + o_j) * ROW + o_c
    seen = (o_j * 0 + o_c * 0).to(gl.uint32)
    r, seen = _load_sum(p_row, o_c, here, seen, B * ROW, HELPED)
    k, seen = _load_sum(p_row + C, C + o_c, here, seen, B * ROW, HELPED)
    v, seen = _load_sum(p_row + 2 * C, 2 * C + o_c, here, seen, B * ROW, HELPED)
    lows = ()
    for j in gl.static_range(G):
        p_low = p_rows + (i_b + j) * ROW
        for rank in gl.static_range(0, SUM, BLOCK_LEN):
            column = 3 * C + rank + o_r
            mask = (rank + o_r < SUM) & (i_b + j < B)
            low, seen = _load_sum(p_low + column, column, mask, seen, B * ROW, HELPED)
            lows = lows + (low,)  # noqa: RUF005 (no * in Gluon)
    return r, k, v, lows, seen


@gluon.jit
def _stage_low(
    inputs,
    lows,
    o_r,
    G: gl.constexpr,
    RW: gl.constexpr,
    RA: gl.constexpr,
    RG: gl.constexpr,
    RV: gl.constexpr,
):
    """Put activated first halves into shared memory: column `4 * lora + row` holds a LoRA's."""
    LAYOUT: gl.constexpr = o_r.type.layout.parent
    SHAPE: gl.constexpr = [inputs.shape[1], inputs.shape[2]]
    BLOCKS: gl.constexpr = (RW + RA + RG + RV + BLOCK_LEN - 1) // BLOCK_LEN
    # Columns lie in registers, so that to choose among them costs no more than what is stored.
    o_n = gl.arange(0, inputs.shape[1], gl.SliceLayout(1, LAYOUT))[:, None]
    for i in gl.static_range(BLOCKS):
        at = i * BLOCK_LEN + o_r
        lora = gl.where(at < RW, 0, gl.where(at < RW + RA, 1, 2))
        lora = gl.where(at < RW + RA + RG, lora, 3) * 4
        tile = gl.zeros(SHAPE, inputs.dtype, LAYOUT)
        for j in gl.static_range(G):
            z = _activate(lows[j * BLOCKS + i], at, RW, RA, RG).to(inputs.dtype)
            tile = gl.where(o_n == (lora + j)[None, :], z[None, :], tile)
        inputs.index(i).store(tile)
    fence_async_shared()
    thread_barrier()


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
def _advance(state, vectors, FIRST: gl.constexpr, ROW: gl.constexpr):
    """Return a head's next state [64, 64] fp32 and its output [64, 1].

    vectors: tiles [4, 64] in shared memory, from FIRST on: decay, removal key, a times it, key,
    receptance, value.
    """
    TILE: gl.constexpr = state.type.layout
    s = state.to(gl.float32)
    decay = vectors.index(FIRST).slice(ROW, 1).load(TILE)
    kk = vectors.index(FIRST + 1).slice(ROW, 1).load(TILE)
    a_kk = vectors.index(FIRST + 2).slice(ROW, 1).load(TILE)
    k = vectors.index(FIRST + 3).slice(ROW, 1).load(TILE)
    r = vectors.index(FIRST + 4).slice(ROW, 1).load(TILE)
    v = vectors.index(FIRST + 5).slice(ROW, 1).permute((1, 0)).load(TILE)
    removed = gl.sum(s * kk, 1, keep_dims=True)
    s = s * decay - removed * a_kk
    s += v * k
    return s, gl.sum(s * r, 1, keep_dims=True)


@gluon.jit
def _store_columns(memory, ys, G: gl.constexpr):
    """Store G columns [64, 1] as rows of 64 at the beginning of memory."""
    O3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    O4: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    if G == 1:
        memory._reinterpret(gl.float32, [1, 64], LINEAR).permute((1, 0)).store(ys[0])
    elif G == 2:
        both = gl.join(ys[0], ys[1])
        memory._reinterpret(gl.float32, [2, 1, 64], O3).permute((2, 1, 0)).store(both)
    else:
        tile = gl.join(gl.join(ys[0], ys[1]), gl.join(ys[2], ys[G - 1]))
        memory._reinterpret(gl.float32, [2, 2, 1, 64], O4).permute((3, 2, 1, 0)).store(tile)


@gluon.jit
def time_mix_unit(
    unit,
    is_first,
    ring,
    full,
    empty,
    inputs,
    votes,
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
    HELPED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Advance a head of G rows, from projections to Wo's input; return the next block of weights.

    States and vectors are read before the projections are waited for.
    """
    VECTOR: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    H: gl.constexpr = C // 64
    SUM: gl.constexpr = RW + RA + RG + RV
    NUM_LOWS: gl.constexpr = G * ((SUM + BLOCK_LEN - 1) // BLOCK_LEN)
    LOW: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [1, 4], [1, 0])
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    O5: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    i_h = unit % H
    i_b = unit // H * G
    states = ()
    for j in gl.static_range(G):
        slot = gl.load(p_slots + i_b + j, mask=i_b + j < B, other=-1)
        states = states + (_load_state(p_pool, slot, i_h, H),)  # noqa: RUF005 (no * in Gluon)
    o_j = gl.arange(0, 4, gl.SliceLayout(1, VECTOR))[:, None]
    o_c = i_h * 64 + gl.arange(0, 64, gl.SliceLayout(0, VECTOR))[None, :]
    here = (o_j < G) & (i_b + o_j < B) & (o_c >= 0)
    at = (i_b + o_j) * C + o_c
    v_first = gl.load(p_first + at, mask=here & (is_first ^ True), other=0.0)
    w0 = gl.load(p_vectors + o_c)
    a0 = gl.load(p_vectors + C + o_c)
    v0 = gl.load(p_vectors + 2 * C + o_c)
    k_k = gl.load(p_vectors + 3 * C + o_c)
    k_a = gl.load(p_vectors + 4 * C + o_c)
    r_k = gl.load(p_vectors + 5 * C + o_c)
    norm_weight = gl.load(p_vectors + 6 * C + o_c)
    norm_bias = gl.load(p_vectors + 7 * C + o_c)
    o_r = gl.arange(0, BLOCK_LEN, gl.SliceLayout(0, LOW))
    r, k, v, lows, seen = _load_inputs(
        p_projected, i_b, o_c, o_r, here, B, C, G, SUM, HELPED
    )  # fmt: skip
    polls = gl.to_tensor(0)
    # Over all warps: they must agree on whether to read again.
    while gl.max(get_votes(put_votes(gl.max(seen, 1), votes)), 0) == BLANK:
        polls = count(polls)
        r, k, v, lows, seen = _load_inputs(
            p_projected, i_b, o_c, o_r, here, B, C, G, SUM, HELPED
        )  # fmt: skip
    columns = inputs._reinterpret(inputs.dtype, [NUM_LOWS // G, 16, BLOCK_LEN], inputs.layout)
    _stage_low(columns, lows, o_r, G, RW, RA, RG, RV)
    kk = k * k_k
    kk /= gl.maximum(gl.sqrt(gl.sum(kk * kk, 1, keep_dims=True)), 1e-12)
    # As `mark`, before this layer's are stored.
    gl.store(p_next_out + at, blank(p_out), mask=here, eviction_policy=KEEP)
    acc, block = multiply(ring, full, empty, columns, 0, NUM_LOWS // G, block, STAGES)
    # The inputs are read: their place takes what threads hand to each other.
    inputs._reinterpret(gl.float32, [16, 64], LINEAR).permute((1, 0)).store(acc)
    tiles = inputs._reinterpret(gl.float32, [16, 4, 64], LINEAR)
    thread_barrier()
    w = -0.6065306597126334 * _sigmoid(w0 + tiles.index(0).load(VECTOR))
    a = _sigmoid(a0 + tiles.index(1).load(VECTOR))
    gate = tiles.index(2).load(VECTOR)
    mixed = v + (v_first - v) * _sigmoid(v0 + tiles.index(3).load(VECTOR))
    gl.store(p_first + at, v, mask=here & is_first)
    v = gl.where(is_first, v, mixed)
    k = k * (1 + (a - 1) * k_a)
    handed = gl.join(
        gl.join(gl.join(gl.exp(w), kk), gl.join(kk * a, k)), gl.join(gl.join(r, v), gl.join(r, v))
    )
    groups = inputs._reinterpret(gl.float32, [2, 2, 2, 2, 4, 64], O5)
    groups.index(1).permute((3, 4, 2, 1, 0)).store(handed)
    bonus = gl.sum(r * k * r_k, 1, keep_dims=True) * v
    thread_barrier()
    ys = ()
    for j in gl.static_range(G):
        s, y = _advance(states[j][0], tiles, 8, j)
        gl.store(states[j][1], s.to(p_pool.dtype.element_ty), mask=states[j][2])
        ys = ys + (y,)  # noqa: RUF005
    _store_columns(inputs, ys, G)
    thread_barrier()
    y = tiles.index(0).load(VECTOR)
    y -= gl.sum(y, 1, keep_dims=True) / 64
    deviation = gl.sqrt(gl.sum(y * y, 1, keep_dims=True) / 64 + GROUP_NORM_EPS)
    y = (y / deviation * norm_weight + norm_bias + bonus) * gate
    gl.store(p_out + at, y.to(p_out.dtype.element_ty), mask=here, eviction_policy=KEEP)
    thread_barrier()
    return block
