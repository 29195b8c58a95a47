# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""The warp of `persistent7_kernel` that asks for weights and states, through a ring of blocks."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from mrss_kernels.persistent7_parts import BLOCK_LEN, NUM_OUTPUTS, gdc_wait


@gluon.jit
def ask_for_weights(
    w_project,
    w_up,
    w_output,
    w_key,
    w_value,
    w_states,
    p_help,
    p_slots,
    ring,
    full,
    empty,
    num_layers,
    num_programs,
    num_slots,
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
    SUM: gl.constexpr,
    MIX_UNITS: gl.constexpr,
    HELPED: gl.constexpr,
    OUTPUT_PARTS: gl.constexpr,
    VALUE_PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Ask for all blocks of this program's units, in the order in which `compute` reads them."""
    TILES: gl.constexpr = R // NUM_OUTPUTS
    pid = gl.program_id(0)
    block = gl.to_tensor(0)
    for i in range(num_layers):
        for unit in range(pid, TILES, num_programs):
            row = i * R + unit * NUM_OUTPUTS
            for k in range(0, C - help_of(p_help, unit, HELPED) * BLOCK_LEN, BLOCK_LEN):
                ahead = 1 + (ahead_project >> 2 * (k // BLOCK_LEN) & 3)
                block = push(w_project, ring, full, empty, block, row, k, STAGES, ahead)
        first, end = helped_units(pid, num_programs, TILES, HELPED)
        for unit in range(first, end):
            row = i * R + unit * NUM_OUTPUTS
            for k in range(C - help_of(p_help, unit, HELPED) * BLOCK_LEN, C, BLOCK_LEN):
                ahead = 1 + (ahead_project >> 2 * (k // BLOCK_LEN) & 3)
                block = push(w_project, ring, full, empty, block, row, k, STAGES, ahead)
        for unit in range(num_programs - 1 - pid, MIX_UNITS, num_programs):
            row = i * C + unit % (C // 64) * 64
            for k in range(0, SUM, BLOCK_LEN):
                ahead = 1 + (ahead_up >> 2 * (k // BLOCK_LEN) & 3)
                block = push(w_up, ring, full, empty, block, row, k, STAGES, ahead)
            if G > 1:
                if PDL:
                    # States are the only ones here that the step before has written.
                    gdc_wait()
                block = push_states(
                    w_states, ring, full, empty, block, p_slots, unit // (C // 64) * G,
                    unit % (C // 64) * 64, i * num_slots * C, B, C, G, STAGES,
                )  # fmt: skip
        for unit in range(pid, C // NUM_OUTPUTS * OUTPUT_PARTS, num_programs):
            row = i * C + unit // OUTPUT_PARTS * NUM_OUTPUTS
            first = unit % OUTPUT_PARTS * (C // OUTPUT_PARTS)
            for k in range(0, C // OUTPUT_PARTS, BLOCK_LEN):
                ahead = 1 + (ahead_output >> 2 * (k // BLOCK_LEN) & 3)
                block = push(w_output, ring, full, empty, block, row, first + k, STAGES, ahead)
        for unit in range(pid, F // NUM_OUTPUTS, num_programs):
            row = i * F + unit * NUM_OUTPUTS
            for k in range(0, C, BLOCK_LEN):
                ahead = 1 + (ahead_key >> 2 * (k // BLOCK_LEN) & 3)
                block = push(w_key, ring, full, empty, block, row, k, STAGES, ahead)
        for unit in range(pid, C // NUM_OUTPUTS * VALUE_PARTS, num_programs):
            row = i * C + unit // VALUE_PARTS * NUM_OUTPUTS
            first = unit % VALUE_PARTS * (F // VALUE_PARTS)
            for k in range(0, F // VALUE_PARTS, BLOCK_LEN):
                ahead = 1 + (ahead_value >> 2 * (k // BLOCK_LEN) & 3)
                block = push(w_value, ring, full, empty, block, row, first + k, STAGES, ahead)


@gluon.jit
def help_of(p_help, unit, HELPED: gl.constexpr):
    """Return how many blocks of a unit of the first product are another program's."""
    blocks = gl.to_tensor(0)
    if unit >= HELPED:
        blocks = gl.load(p_help + unit - HELPED)
    return blocks


@gluon.jit
def helped_units(pid, num_programs, TILES: gl.constexpr, HELPED: gl.constexpr):
    """Return the first unit of the first product that a program helps with, and its end."""
    NUM_HELPED: gl.constexpr = TILES - HELPED
    first = gl.to_tensor(0)
    end = gl.to_tensor(0)
    if pid >= NUM_HELPED:
        num_helpers = num_programs - NUM_HELPED
        i = pid - NUM_HELPED
        first = HELPED + (i * NUM_HELPED + num_helpers - 1) // num_helpers
        end = HELPED + ((i + 1) * NUM_HELPED + num_helpers - 1) // num_helpers
    return first, end


@gluon.jit
def push(weight, ring, full, empty, block, row, column, STAGES: gl.constexpr, ahead):
    """Ask for a block of weights as soon as its slot is empty and the one `ahead` before it here.

    More under way would delay what all programs wait for, as it stands behind it in the L2.
    """
    slot = block % STAGES
    mbarrier.wait(empty.index(slot), ((block // STAGES) & 1) ^ 1)
    before = gl.maximum(block - ahead, 0)
    mbarrier.wait(full.index(before % STAGES), (before // STAGES) & 1, pred=block >= ahead)
    mbarrier.expect(full.index(slot), NUM_OUTPUTS * BLOCK_LEN * 2)
    tma.async_copy_global_to_shared(weight, [row, column], full.index(slot), ring.index(slot))
    return block + 1


@gluon.jit
def push_states(
    pool, ring, full, empty, block, p_slots, i_b, i_row, layer_row,
    B: gl.constexpr, C: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Ask for a head's states of G rows, as `push` does for weights; return the block behind them.

    pool: [n, 64], states one below the other. A row without a slot has zeros.
    """
    states = as_states(ring, pool.dtype, STAGES)
    PER_SLOT: gl.constexpr = states_a_slot(pool.dtype)
    for i in range((G + PER_SLOT - 1) // PER_SLOT):
        at = block % STAGES
        mbarrier.wait(empty.index(at), ((block // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(at), NUM_OUTPUTS * BLOCK_LEN * 2)
        for j in gl.static_range(PER_SLOT):
            row = i * PER_SLOT + j
            slot = gl.load(p_slots + i_b + row, mask=(row < G) & (i_b + row < B), other=-1)
            first = gl.where(slot >= 0, layer_row + slot.to(gl.int32) * C + i_row, -64)
            place = states.index(at * PER_SLOT + j)
            tma.async_copy_global_to_shared(pool, [first, 0], full.index(at), place)
        block += 1
    return block


@gluon.constexpr_function
def states_a_slot(dtype):
    """Return how many states [64, 64] a slot of the ring holds: two in fp32 or four in fp16."""
    return 64 // dtype.primitive_bitwidth


@gluon.jit
def as_states(ring, dtype: gl.constexpr, STAGES: gl.constexpr):
    """Return the ring as places for states [64, 64]."""
    PER_SLOT: gl.constexpr = states_a_slot(dtype)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, dtype.primitive_bitwidth)
    return ring._reinterpret(dtype, [STAGES * PER_SLOT, 64, 64], LAYOUT)
