# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""All layers of RWKV-7's decode step in one launch, for up to 32 rows.

A program a multiprocessor. One warp asks for the blocks of weights that its program will need, in
that order, through a ring in shared memory, from layer to layer without waiting for anybody; four
warps compute. So memory works on while they wait for each other's numbers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mrss_kernels.persistent7_await import await_word
from mrss_kernels.persistent7_norm import norm_unit
from mrss_kernels.persistent7_parts import (
    BLOCK_LEN,
    NUM_OUTPUTS,
    blank,
    fence,
    gdc_wait,
)
from mrss_kernels.persistent7_products import product
from mrss_kernels.persistent7_ring import ask_for_weights, help_of, helped_units
from mrss_kernels.persistent7_time import time_mix_unit

NUM_COMPUTING_WARPS = 4


@gluon.jit
def compute(
    ring,
    full,
    empty,
    inputs,
    votes,
    more_votes,
    p_groups,
    p_help,
    p_norm1,
    p_norm2,
    p_mix,
    p_ffn_mix,
    p_vectors,
    p_pool,
    p_shift_att,
    p_shift_ffn,
    p_slots,
    p_x,
    p_mixed,
    p_first,
    p_floats,
    p_halves,
    num_layers,
    keep_states,
    num_programs,
    pool_stride,
    shift_stride,
    B: gl.constexpr,
    C: gl.constexpr,
    F: gl.constexpr,
    G: gl.constexpr,
    R: gl.constexpr,
    RW: gl.constexpr,
    RA: gl.constexpr,
    RG: gl.constexpr,
    RV: gl.constexpr,
    LOW_A: gl.constexpr,
    LOW_G: gl.constexpr,
    LOW_V: gl.constexpr,
    MIX_UNITS: gl.constexpr,
    HELPED: gl.constexpr,
    HELP_LEN: gl.constexpr,
    OUTPUT_PARTS: gl.constexpr,
    VALUE_PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    CHUNK: gl.constexpr,
    SLICE: gl.constexpr,
    PDL: gl.constexpr,
):
    """Compute this program's units of every layer, each as soon as its inputs are there."""
    NORM_UNITS: gl.constexpr = B * (C // SLICE)
    VALUE_UNITS: gl.constexpr = C // NUM_OUTPUTS * VALUE_PARTS
    # A helper's units mostly have the same inputs: those of one chunk are staged but once.
    HELP_CHUNK: gl.constexpr = 0 if HELP_LEN <= CHUNK * BLOCK_LEN else CHUNK
    # A layer's buffers, in elements: see `buffer_sizes`.
    TILES: gl.constexpr = R // NUM_OUTPUTS
    ATT_PARTS: gl.constexpr = 2 * B * R
    FFN_PARTS: gl.constexpr = ATT_PARTS + OUTPUT_PARTS * B * C
    BEFORE: gl.constexpr = FFN_PARTS + VALUE_PARTS * B * C
    BETWEEN: gl.constexpr = BEFORE + B * C
    FLOATS: gl.constexpr = BETWEEN + B * C
    ATT: gl.constexpr = 6 * B * C
    FFN_IN: gl.constexpr = ATT + B * C
    SQUARED: gl.constexpr = FFN_IN + B * C
    HALVES: gl.constexpr = SQUARED + B * F
    if PDL:
        gdc_wait()
    pid = gl.program_id(0)
    block = gl.to_tensor(0)
    pool_stride = gl.to_tensor(pool_stride).to(gl.int64)
    shift_stride = gl.to_tensor(shift_stride).to(gl.int64)
    for i in range(num_layers):
        # Two sets of buffers in turn: while a layer fills one, it empties the next layer's.
        floats = p_floats + i % 2 * FLOATS
        next_floats = p_floats + (1 - i % 2) * FLOATS
        halves = p_halves + i % 2 * HALVES
        next_halves = p_halves + (1 - i % 2) * HALVES
        p_residual = p_x
        p_inputs = p_mixed
        if i > 0:
            p_residual = floats + BEFORE
            p_inputs = halves
        for unit in range(pid, TILES, num_programs):
            at = unit * NUM_OUTPUTS
            blocks = C // BLOCK_LEN - help_of(p_help, unit, HELPED)
            block = product(
                ring, full, empty, inputs, p_inputs + gl.load(p_groups + unit) * B * C, C, 0,
                blocks, block, floats + at, next_floats + at, R, B, C, STAGES, CHUNK,
            )  # fmt: skip
        first, end = helped_units(pid, num_programs, TILES, HELPED)
        staged = gl.to_tensor(-1)
        for unit in range(first, end):
            at = B * R + unit * NUM_OUTPUTS
            blocks = help_of(p_help, unit, HELPED)
            group = gl.load(p_groups + unit)
            # Inputs of the last blocks that may be helped with.
            p_last = p_inputs + group * B * C + C - HELP_LEN
            block = product(
                ring, full, empty, inputs, p_last, C, HELP_LEN // BLOCK_LEN - blocks, blocks,
                block, floats + at, next_floats + at, R, B, HELP_LEN, STAGES, HELP_CHUNK,
                is_staged=group == staged,
            )  # fmt: skip
            staged = group
        for unit in range(num_programs - 1 - pid, MIX_UNITS, num_programs):
            if pid >= TILES and first == end:
                # It has no part in what it reads next: not before the last layer's value is done.
                await_word(p_inputs)
            block = time_mix_unit(
                unit, i == 0, keep_states > 0, ring, full, empty, inputs, block, floats,
                p_vectors + i * 8 * C, p_first, p_pool + i * pool_stride, p_slots,
                halves + ATT, next_halves + ATT, B, C, G, R, RW, RA, RG, RV,
                LOW_A, LOW_G, LOW_V, HELPED, STAGES,
            )  # fmt: skip
        for unit in range(pid, C // NUM_OUTPUTS * OUTPUT_PARTS, num_programs):
            PART: gl.constexpr = C // OUTPUT_PARTS
            part = unit % OUTPUT_PARTS
            at = ATT_PARTS + part * B * C + unit // OUTPUT_PARTS * NUM_OUTPUTS
            block = product(
                ring, full, empty, inputs, halves + ATT + part * PART, C, 0,
                PART // BLOCK_LEN, block, floats + at, next_floats + at, C, B, PART, STAGES,
                CHUNK,
            )  # fmt: skip
        for unit in range(pid, NORM_UNITS, num_programs):
            norm_unit(
                unit, inputs, votes, more_votes, p_residual, floats + ATT_PARTS, floats + BETWEEN,
                next_floats + BETWEEN, p_norm2 + i * 2 * C, p_shift_ffn + i * shift_stride,
                p_slots, p_ffn_mix + i * C, halves + FFN_IN, next_halves + FFN_IN,
                B, C, OUTPUT_PARTS, 1, SLICE,
            )  # fmt: skip
        for unit in range(pid, F // NUM_OUTPUTS, num_programs):
            at = SQUARED + unit * NUM_OUTPUTS
            block = product(
                ring, full, empty, inputs, halves + FFN_IN, C, 0, C // BLOCK_LEN, block,
                halves + at, next_halves + at, F, B, C, STAGES, CHUNK, SQUARED=True,
            )  # fmt: skip
        for unit in range(pid, VALUE_UNITS, num_programs):
            LONG: gl.constexpr = F // VALUE_PARTS
            part = unit % VALUE_PARTS
            if pid >= F // NUM_OUTPUTS:
                # Likewise.
                await_word(halves + FFN_IN)
            # What this program has emptied is empty for all before anybody fills it again.
            fence()
            at = FFN_PARTS + part * B * C + unit // VALUE_PARTS * NUM_OUTPUTS
            block = product(
                ring, full, empty, inputs, halves + SQUARED + part * LONG, F, 0,
                LONG // BLOCK_LEN, block, floats + at, next_floats + at, C, B, LONG, STAGES,
                CHUNK, POSITIVE=True,
            )  # fmt: skip
        if i < num_layers - 1:
            n = i + 1
            for unit in range(pid, NORM_UNITS, num_programs):
                norm_unit(
                    unit, inputs, votes, more_votes, floats + BETWEEN, floats + FFN_PARTS,
                    next_floats + BEFORE, floats + BEFORE, p_norm1 + n * 2 * C,
                    p_shift_att + n * shift_stride, p_slots, p_mix + n * 6 * C, next_halves, halves,
                    B, C, VALUE_PARTS, 6, SLICE,
                )  # fmt: skip
        elif pid < VALUE_UNITS:
            # Whoever had no part of the last product may be here before others have read these.
            step = gl.minimum(num_programs, VALUE_UNITS)
            o = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
            for unit in range(pid, B * C // 128, step):
                gl.store(floats + BEFORE + unit * 128 + o, blank(floats))
            for unit in range(pid, 6 * B * C // 128, step):
                gl.store(halves + unit * 128 + o, blank(halves))


@gluon.jit(
    do_not_specialize=[
        "keep_states", "ahead_project", "ahead_up", "ahead_output", "ahead_key", "ahead_value",
    ]
)  # fmt: skip
def persistent7_kernel(
    w_project,
    w_up,
    w_output,
    w_key,
    w_value,
    w_states,
    p_groups,
    p_help,
    p_norm1,
    p_norm2,
    p_mix,
    p_ffn_mix,
    p_vectors,
    p_pool,
    p_shift_att,
    p_shift_ffn,
    p_slots,
    p_x,
    p_mixed,
    p_first,
    p_floats,
    p_halves,
    num_layers,
    keep_states,
    num_programs,
    num_slots,
    pool_stride,
    shift_stride,
    ahead_project,
    ahead_up,
    ahead_output,
    ahead_key,
    ahead_value,
    B: gl.constexpr,
    C: gl.constexpr,
    F: gl.constexpr,
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
    HELP_LEN: gl.constexpr,
    OUTPUT_PARTS: gl.constexpr,
    VALUE_PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    INPUT_BLOCKS: gl.constexpr,
    CHUNK: gl.constexpr,
    SLICE: gl.constexpr,
    PDL: gl.constexpr,
):
    """Grid (num_programs), all running at once. See `PersistentLayers7`."""
    MIX_UNITS: gl.constexpr = C // 64 * ((B + G - 1) // G)
    SUM: gl.constexpr = RW + RA + RG + RV
    dtype: gl.constexpr = w_key.dtype
    ring = gl.allocate_shared_memory(dtype, [STAGES, NUM_OUTPUTS, BLOCK_LEN], w_key.layout)
    rows_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    ROWS: gl.constexpr = 8 if B <= 8 else 16 if B <= 16 else 32
    shape: gl.constexpr = [INPUT_BLOCKS, ROWS, BLOCK_LEN]
    inputs = gl.allocate_shared_memory(dtype, shape, rows_layout)
    votes_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    votes = gl.allocate_shared_memory(gl.int32, [4], votes_layout)
    more_votes = gl.allocate_shared_memory(gl.int32, [4], votes_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                compute,
                (
                    ring, full, empty, inputs, votes, more_votes, p_groups, p_help, p_norm1,
                    p_norm2, p_mix, p_ffn_mix, p_vectors, p_pool, p_shift_att, p_shift_ffn,
                    p_slots, p_x, p_mixed, p_first, p_floats, p_halves, num_layers,
                    keep_states, num_programs, pool_stride, shift_stride, B, C, F, G, R, RW, RA,
                    RG, RV, LOW_A, LOW_G, LOW_V, MIX_UNITS, HELPED, HELP_LEN, OUTPUT_PARTS,
                    VALUE_PARTS, STAGES, CHUNK, SLICE, PDL,
                ),
            ),
            (
                ask_for_weights,
                (
                    w_project, w_up, w_output, w_key, w_value, w_states, p_help, p_slots, ring,
                    full, empty, num_layers, num_programs, num_slots, ahead_project, ahead_up,
                    ahead_output, ahead_key, ahead_value, B, C, F, G, R, SUM, MIX_UNITS, HELPED,
                    OUTPUT_PARTS, VALUE_PARTS, STAGES, PDL,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
