# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="assignment, misc"
"""RWKV-7's time mixing as a unit of `persistent7_kernel`: one head of one to eight rows.

As `time_mix7`. Vectors of a head are [4, 64], a row a warp, so that several rows take the time of
one; states, and what meets them, have eight columns a thread, one row after the other. In between
all rows' vectors go through shared memory at once. The state of a single row waits in registers,
those of several rows come through the ring of weights.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mrss_kernels.caching import KEEP
from mrss_kernels.persistent7_parts import BLOCK_LEN, blank, thread_barrier
from mrss_kernels.persistent7_products import multiply
from mrss_kernels.persistent7_ring import as_states, states_a_slot
from mrss_kernels.persistent7_time_inputs import are_rows, load_inputs, sigmoid, stage_low

GROUP_NORM_EPS = gl.constexpr(64e-5)


@gluon.constexpr_function
def _tile(dtype):
    """Return how threads hold a state: 16 bytes of a row at a time, so that eight fill 128."""
    return gl.BlockedLayout([1, 128 // dtype.primitive_bitwidth], [4, 8], [4, 1], [1, 0])


@gluon.jit
def _state_at(p_pool, slot, i_h, H: gl.constexpr):
    """Return the addresses of a head's state [64, 64], and whether it is one."""
    TILE: gl.constexpr = _tile(p_pool.dtype.element_ty)
    o_v = gl.arange(0, 64, gl.SliceLayout(1, TILE))[:, None]
    o_k = gl.arange(0, 64, gl.SliceLayout(0, TILE))[None, :]
    live = (o_v + o_k) * 0 + slot >= 0
    return p_pool + (slot * H + i_h) * 4096 + o_v * 64 + o_k, live


@gluon.jit
def _advance(state, p_s, live, rows, first, keep):
    """Store a head's next state S' [64, 64] where it was; return its output S' r [64, 1].

    That is taken from two sums over the old state, side by side. rows: [n, 1, 64] in shared memory,
    from `first` on, in steps of four, what `_vectors` puts there.
    """
    TILE: gl.constexpr = state.type.layout
    s = state.to(gl.float32)
    decay = rows.index(first).load(TILE)
    kk = rows.index(first + 4).load(TILE)
    a_kk = rows.index(first + 8).load(TILE)
    k = rows.index(first + 12).load(TILE)
    r_decayed = rows.index(first + 16).load(TILE)
    v = rows.index(first + 20).permute((1, 0)).load(TILE)
    r_a_kk = rows.index(first + 24).permute((1, 0)).load(TILE)
    r_k = rows.index(first + 28).permute((1, 0)).load(TILE)
    removed = gl.sum(s * kk, 1, keep_dims=True)
    y = gl.sum(s * r_decayed, 1, keep_dims=True)
    y += v * r_k - removed * r_a_kk
    s = s * decay - removed * a_kk
    s += v * k
    s = s.to(p_s.dtype.element_ty)
    if keep:
        gl.store(p_s, s, mask=live, eviction_policy=KEEP)
    else:
        gl.store(p_s, s, mask=live)
    return y


@gluon.jit
def _vectors(r, k, v, kk, biases, tiles, groups, v_first, p_first, here, is_first,
             FOUR: gl.constexpr, FOURS: gl.constexpr):  # fmt: skip
    """Put what meets the states of four rows into shared memory; return gate and bonus [4, 64].

    That is decay, removal key, a times it, key, receptance times decay, value, and, in all columns,
    the products of a times the removal key and of the key with the receptance.
    tiles: the LoRAs' outputs [4, 64], four rows of one after the other.
    """
    VECTOR: gl.constexpr = r.type.layout
    w0, a0, v0, k_a, r_k = biases
    w = -0.6065306597126334 * sigmoid(w0 + tiles.index(FOUR).load(VECTOR))
    a = sigmoid(a0 + tiles.index(FOURS + FOUR).load(VECTOR))
    gate = tiles.index(2 * FOURS + FOUR).load(VECTOR)
    mixed = v + (v_first - v) * sigmoid(v0 + tiles.index(3 * FOURS + FOUR).load(VECTOR))
    gl.store(p_first, v, mask=here & is_first)
    v = gl.where(is_first, v, mixed)
    k = k * (1 + (a - 1) * k_a)
    decay = gl.exp(w)
    a_kk = kk * a
    r_a_kk = gl.sum(r * a_kk, 1, keep_dims=True) + r * 0
    r_k_sum = gl.sum(r * k, 1, keep_dims=True) + r * 0
    handed = gl.join(
        gl.join(gl.join(decay, kk), gl.join(a_kk, k)),
        gl.join(gl.join(r * decay, v), gl.join(r_a_kk, r_k_sum)),
    )
    groups.index(1 + FOUR).permute((3, 4, 2, 1, 0)).store(handed)
    return gate, gl.sum(r * k * r_k, 1, keep_dims=True) * v


@gluon.jit
def _advance_from_ring(
    ring, full, empty, block, rows, p_pool, slots, i_h, keep,
    C: gl.constexpr, G: gl.constexpr, Y_ROW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Advance a head's states of G rows as they come through the ring; return the next block.

    slots: of the rows, -1 for none; as many as the ring has places for them.
    """
    TILE: gl.constexpr = _tile(p_pool.dtype.element_ty)
    states = as_states(ring, p_pool.dtype.element_ty, STAGES)
    PER_SLOT: gl.constexpr = states_a_slot(p_pool.dtype.element_ty)
    for i in range((G + PER_SLOT - 1) // PER_SLOT):
        at = block % STAGES
        mbarrier.wait(full.index(at), (block // STAGES) & 1)
        ys = ()
        for j in gl.static_range(PER_SLOT):
            row = i * PER_SLOT + j
            slot = slots[j]
            for n in gl.static_range(1, len(slots) // PER_SLOT):
                slot = gl.where(i == n, slots[n * PER_SLOT + j], slot)
            p_s, live = _state_at(p_pool, slot.to(gl.int64), i_h, C // 64)
            state = states.index(at * PER_SLOT + j).load(TILE)
            first = 32 * (1 + row // 4) + row % 4
            y = _advance(state, p_s, live, rows, first, keep)
            ys = ys + (y,)  # noqa: RUF005 (no * in Gluon)
        # Behind all reads of these rows: a store would let them wait.
        for j in gl.static_range(PER_SLOT):
            rows.index(Y_ROW + i * PER_SLOT + j).permute((1, 0)).store(ys[j])
        thread_barrier()
        mbarrier.arrive(empty.index(at), count=1)
        block += 1
    return block


@gluon.jit
def time_mix_unit(
    unit,
    is_first,
    keep,
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
    R: gl.constexpr,
    RW: gl.constexpr,
    RA: gl.constexpr,
    RG: gl.constexpr,
    RV: gl.constexpr,
    LOW_A: gl.constexpr,
    LOW_G: gl.constexpr,
    LOW_V: gl.constexpr,
    HELPED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Advance a head of G rows, from projections to Wo's input; return the next block of the ring.

    What a step does not write is read before the projections are waited for.
    """
    VECTOR: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    LOW: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [1, 4], [1, 0])
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    O5: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    H: gl.constexpr = C // 64
    BLOCKS: gl.constexpr = (RW + RA + RG + RV + BLOCK_LEN - 1) // BLOCK_LEN
    # Of rows four at a time: tiles of shared memory [4, 64] have outputs of the LoRAs from 0 on,
    # eight vectors for the states behind the first eight, outputs of the states at Y_TILE.
    FOURS: gl.constexpr = (G + 3) // 4
    Y_TILE: gl.constexpr = 4 if G <= 4 else 24
    i_h = unit % H
    i_b = unit // H * G
    o_j = gl.arange(0, 4, gl.SliceLayout(1, VECTOR))[:, None]
    o_c = i_h * 64 + gl.arange(0, 64, gl.SliceLayout(0, VECTOR))[None, :]
    if G == 1:
        p_s, live = _state_at(p_pool, gl.load(p_slots + i_b), i_h, H)
        if keep:
            state = gl.load(p_s, mask=live, other=0.0, eviction_policy=KEEP)
        else:
            state = gl.load(p_s, mask=live, other=0.0)
    slots = ()
    if G > 1:
        PER_SLOT: gl.constexpr = states_a_slot(p_pool.dtype.element_ty)
        for j in gl.static_range((G + PER_SLOT - 1) // PER_SLOT * PER_SLOT):
            mask = (j < G) & (i_b + j < B)
            slot = gl.load(p_slots + i_b + j, mask=mask, other=-1).to(gl.int32)
            slots = slots + (slot,)  # noqa: RUF005 (no * in Gluon)
    v_firsts = ()
    for i in gl.static_range(FOURS):
        here = are_rows(i_b, o_j, o_c, i, B, G)
        at = (i_b + 4 * i + o_j) * C + o_c
        v_first = gl.load(p_first + at, mask=here & (is_first ^ True), other=0.0)
        v_firsts = v_firsts + (v_first,)  # noqa: RUF005 (no * in Gluon)
    biases = (
        gl.load(p_vectors + o_c),
        gl.load(p_vectors + C + o_c),
        gl.load(p_vectors + 2 * C + o_c),
        gl.load(p_vectors + 4 * C + o_c),
        gl.load(p_vectors + 5 * C + o_c),
    )
    k_k = gl.load(p_vectors + 3 * C + o_c)
    norm_weight = gl.load(p_vectors + 6 * C + o_c)
    norm_bias = gl.load(p_vectors + 7 * C + o_c)
    o_r = gl.arange(0, BLOCK_LEN, gl.SliceLayout(0, LOW))
    rs, ks, vs, lows = load_inputs(
        p_projected, i_b, o_c, o_r, B, C, G, R, RW, RA, RG, RV, LOW_A, LOW_G, LOW_V, HELPED
    )  # fmt: skip
    columns = inputs._reinterpret(inputs.dtype, [BLOCKS, 16 * FOURS, BLOCK_LEN], inputs.layout)
    stage_low(columns, lows, o_r, G, RW, RA, RG, RV)
    kks = ()
    for i in gl.static_range(FOURS):
        kk = ks[i] * k_k
        kk /= gl.maximum(gl.sqrt(gl.sum(kk * kk, 1, keep_dims=True)), 1e-12)
        kks = kks + (kk,)  # noqa: RUF005
        # As `mark`, before this layer's are stored.
        here = are_rows(i_b, o_j, o_c, i, B, G)
        at = (i_b + 4 * i + o_j) * C + o_c
        gl.store(p_next_out + at, blank(p_out), mask=here, eviction_policy=KEEP)
    acc, block = multiply(ring, full, empty, columns, 0, BLOCKS, block, STAGES)
    # The inputs are read: their place takes what threads hand to each other.
    inputs._reinterpret(gl.float32, [16 * FOURS, 64], LINEAR).permute((1, 0)).store(acc)
    tiles = inputs._reinterpret(gl.float32, [16 * FOURS, 4, 64], LINEAR)
    rows = inputs._reinterpret(gl.float32, [64 * FOURS, 1, 64], LINEAR)
    groups = inputs._reinterpret(gl.float32, [2 * FOURS, 2, 2, 2, 4, 64], O5)
    thread_barrier()
    outs = ()
    for i in gl.static_range(FOURS):
        here = are_rows(i_b, o_j, o_c, i, B, G)
        at = (i_b + 4 * i + o_j) * C + o_c
        out = _vectors(
            rs[i], ks[i], vs[i], kks[i], biases, tiles, groups, v_firsts[i], p_first + at, here,
            is_first, i, FOURS,
        )  # fmt: skip
        outs = outs + (out,)  # noqa: RUF005
    thread_barrier()
    if G == 1:
        y = _advance(state, p_s, live, rows, 32, keep)
        rows.index(4 * Y_TILE).permute((1, 0)).store(y)
    else:
        block = _advance_from_ring(
            ring, full, empty, block, rows, p_pool, slots, i_h, keep, C, G, 4 * Y_TILE, STAGES,
        )  # fmt: skip
    thread_barrier()
    for i in gl.static_range(FOURS):
        y = tiles.index(Y_TILE + i).load(VECTOR)
        y -= gl.sum(y, 1, keep_dims=True) / 64
        deviation = gl.sqrt(gl.sum(y * y, 1, keep_dims=True) / 64 + GROUP_NORM_EPS)
        y = (y / deviation * norm_weight + norm_bias + outs[i][1]) * outs[i][0]
        here = are_rows(i_b, o_j, o_c, i, B, G)
        at = (i_b + 4 * i + o_j) * C + o_c
        gl.store(p_out + at, y.to(p_out.dtype.element_ty), mask=here, eviction_policy=KEEP)
    thread_barrier()
    return block
