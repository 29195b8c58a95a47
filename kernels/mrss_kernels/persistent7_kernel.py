# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""All layers of RWKV-7's decode step in one launch, for up to 12 rows.

A program a multiprocessor. One warp asks for the blocks of weights that its program will need, in
that order, through a ring in shared memory, from layer to layer without waiting for anybody; four
warps compute. So memory works on while they wait for each other's numbers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mrss_kernels.persistent7_parts import (
    BLOCK_LEN,
    NUM_OUTPUTS,
    blank,
    fence,
    gdc_wait,
    mark,
    multiply,
    norm_unit,
    push,
    put,
    stage_rows,
)
from mrss_kernels.persistent7_time import time_mix_unit

NUM_COMPUTING_WARPS = 4


@gluon.jit
def ask_for_weights(
    w_project,
    w_up,
    w_output,
    w_key,
    w_value,
    ring,
    full,
    empty,
    num_layers,
    num_programs,
    C: gl.constexpr,
    F: gl.constexpr,
    SUM: gl.constexpr,
    MIX_UNITS: gl.constexpr,
    OUTPUT_PARTS: gl.constexpr,
    VALUE_PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """Ask for all blocks of this program's units, in the order in which `compute` reads them."""
    R: gl.constexpr = 3 * C + SUM
    pid = gl.program_id(0)
    block = gl.to_tensor(0)
    for i in range(num_layers):
        for unit in range(pid, R // NUM_OUTPUTS, num_programs):
            row = i * R + unit * NUM_OUTPUTS
            for k in range(0, C, BLOCK_LEN):
                block = push(w_project, ring, full, empty, block, row, k, STAGES, AHEAD)
        for unit in range(pid, MIX_UNITS, num_programs):
            row = i * C + unit % (C // 64) * 64
            for k in range(0, SUM, BLOCK_LEN):
                block = push(w_up, ring, full, empty, block, row, k, STAGES, AHEAD)
        for unit in range(pid, C // NUM_OUTPUTS * OUTPUT_PARTS, num_programs):
            row = i * C + unit // OUTPUT_PARTS * NUM_OUTPUTS
            first = unit % OUTPUT_PARTS * (C // OUTPUT_PARTS)
            for k in range(0, C // OUTPUT_PARTS, BLOCK_LEN):
                block = push(w_output, ring, full, empty, block, row, first + k, STAGES, AHEAD)
        for unit in range(pid, F // NUM_OUTPUTS, num_programs):
            row = i * F + unit * NUM_OUTPUTS
            for k in range(0, C, BLOCK_LEN):
                block = push(w_key, ring, full, empty, block, row, k, STAGES, AHEAD)
        for unit in range(pid, C // NUM_OUTPUTS * VALUE_PARTS, num_programs):
            row = i * C + unit // VALUE_PARTS * NUM_OUTPUTS
            first = unit % VALUE_PARTS * (F // VALUE_PARTS)
            for k in range(0, F // VALUE_PARTS, BLOCK_LEN):
                block = push(w_value, ring, full, empty, block, row, first + k, STAGES, AHEAD)


@gluon.jit
def compute(
    ring,
    full,
    empty,
    inputs,
    p_groups,
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
    num_programs,
    pool_stride,
    shift_stride,
    B: gl.constexpr,
    C: gl.constexpr,
    F: gl.constexpr,
    G: gl.constexpr,
    RW: gl.constexpr,
    RA: gl.constexpr,
    RG: gl.constexpr,
    RV: gl.constexpr,
    MIX_UNITS: gl.constexpr,
    OUTPUT_PARTS: gl.constexpr,
    VALUE_PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    SLICE: gl.constexpr,
    PDL: gl.constexpr,
):
    """Compute this program's units of every layer, each as soon as its inputs are there."""
    R: gl.constexpr = 3 * C + RW + RA + RG + RV
    NORM_UNITS: gl.constexpr = B * (C // SLICE)
    VALUE_UNITS: gl.constexpr = C // NUM_OUTPUTS * VALUE_PARTS
    # A layer's buffers, in elements: see `buffer_sizes`.
    ATT_PARTS: gl.constexpr = B * R
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
        if i > 0:
            p_residual = floats + BEFORE
        for unit in range(pid, R // NUM_OUTPUTS, num_programs):
            at = gl.load(p_groups + unit) * B * C
            if i == 0:
                stage_rows(inputs, p_mixed + at, C, B, C, False)
            else:
                stage_rows(inputs, halves + at, C, B, C, True)
            at = unit * NUM_OUTPUTS
            mark(next_floats + at, R, B)
            acc, block = multiply(ring, full, empty, inputs, block, C // BLOCK_LEN, STAGES)
            put(floats + at, acc, R, B)
        for unit in range(pid, MIX_UNITS, num_programs):
            block = time_mix_unit(
                unit, i == 0, ring, full, empty, inputs, block, floats, p_vectors + i * 8 * C,
                p_first, p_pool + i * pool_stride, p_slots, halves + ATT, next_halves + ATT,
                B, C, G, RW, RA, RG, RV, STAGES,
            )  # fmt: skip
        for unit in range(pid, C // NUM_OUTPUTS * OUTPUT_PARTS, num_programs):
            PART: gl.constexpr = C // OUTPUT_PARTS
            part = unit % OUTPUT_PARTS
            stage_rows(inputs, halves + ATT + part * PART, C, B, PART, True)
            at = ATT_PARTS + part * B * C + unit // OUTPUT_PARTS * NUM_OUTPUTS
            mark(next_floats + at, C, B)
            acc, block = multiply(ring, full, empty, inputs, block, PART // BLOCK_LEN, STAGES)
            put(floats + at, acc, C, B)
        for unit in range(pid, NORM_UNITS, num_programs):
            norm_unit(
                unit, inputs, p_residual, floats + ATT_PARTS, floats + BETWEEN,
                next_floats + BETWEEN, p_norm2 + i * 2 * C, p_shift_ffn + i * shift_stride,
                p_slots, p_ffn_mix + i * C, halves + FFN_IN, next_halves + FFN_IN,
                B, C, OUTPUT_PARTS, 1, SLICE,
            )  # fmt: skip
        for unit in range(pid, F // NUM_OUTPUTS, num_programs):
            stage_rows(inputs, halves + FFN_IN, C, B, C, True)
            at = SQUARED + unit * NUM_OUTPUTS
            mark(next_halves + at, F, B)
            acc, block = multiply(ring, full, empty, inputs, block, C // BLOCK_LEN, STAGES)
            acc = gl.maximum(acc, 0.0)
            put(halves + at, acc * acc, F, B)
        for unit in range(pid, VALUE_UNITS, num_programs):
            LONG: gl.constexpr = F // VALUE_PARTS
            part = unit % VALUE_PARTS
            stage_rows(inputs, halves + SQUARED + part * LONG, F, B, LONG, True)
            # What this program has emptied is empty for all before anybody fills it again.
            fence()
            at = FFN_PARTS + part * B * C + unit // VALUE_PARTS * NUM_OUTPUTS
            mark(next_floats + at, C, B)
            acc, block = multiply(ring, full, empty, inputs, block, LONG // BLOCK_LEN, STAGES)
            put(floats + at, acc, C, B)
        if i < num_layers - 1:
            n = i + 1
            for unit in range(pid, NORM_UNITS, num_programs):
                norm_unit(
                    unit, inputs, floats + BETWEEN, floats + FFN_PARTS, next_floats + BEFORE,
                    floats + BEFORE, p_norm1 + n * 2 * C, p_shift_att + n * shift_stride,
                    p_slots, p_mix + n * 6 * C, next_halves, halves,
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


@gluon.jit
def persistent7_kernel(
    w_project,
    w_up,
    w_output,
    w_key,
    w_value,
    p_groups,
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
    num_programs,
    pool_stride,
    shift_stride,
    B: gl.constexpr,
    C: gl.constexpr,
    F: gl.constexpr,
    G: gl.constexpr,
    RW: gl.constexpr,
    RA: gl.constexpr,
    RG: gl.constexpr,
    RV: gl.constexpr,
    OUTPUT_PARTS: gl.constexpr,
    VALUE_PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
    SLICE: gl.constexpr,
    PDL: gl.constexpr,
):
    """Grid (num_programs), all running at once. See `PersistentLayers7`."""
    MIX_UNITS: gl.constexpr = C // 64 * ((B + G - 1) // G)
    SUM: gl.constexpr = RW + RA + RG + RV
    LONGEST: gl.constexpr = C if C >= F // VALUE_PARTS else F // VALUE_PARTS
    dtype: gl.constexpr = w_key.dtype
    ring = gl.allocate_shared_memory(dtype, [STAGES, NUM_OUTPUTS, BLOCK_LEN], w_key.layout)
    rows_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    shape: gl.constexpr = [LONGEST // BLOCK_LEN, 8 if B <= 8 else 16, BLOCK_LEN]
    inputs = gl.allocate_shared_memory(dtype, shape, rows_layout)
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
                    ring, full, empty, inputs, p_groups, p_norm1, p_norm2, p_mix, p_ffn_mix,
                    p_vectors, p_pool, p_shift_att, p_shift_ffn, p_slots, p_x, p_mixed, p_first,
                    p_floats, p_halves, num_layers, num_programs, pool_stride, shift_stride,
                    B, C, F, G, RW, RA, RG, RV, MIX_UNITS, OUTPUT_PARTS, VALUE_PARTS, STAGES,
                    SLICE, PDL,
                ),
            ),
            (
                ask_for_weights,
                (
                    w_project, w_up, w_output, w_key, w_value, ring, full, empty, num_layers,
                    num_programs, C, F, SUM, MIX_UNITS, OUTPUT_PARTS, VALUE_PARTS, STAGES, AHEAD,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
