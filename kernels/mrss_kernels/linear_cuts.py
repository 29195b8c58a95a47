"""How products of few rows are cut, as measured on an H100 and an H200 (kernels/README.md).

A cut depends on rows, on the weight's shape and on what a program may have of shared memory, so
that on one card a row bucket always adds in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

NUM_MULTIPROCESSORS = 132
"""Of an H100 or H200, for which products are cut. Not asked from the device: the cut decides the
order of sums, and equal inputs are to give equal bits on cards that differ in this alone."""

HOPPER_SHARED = 227 << 10
"""Bytes of shared memory that one program may have on an H100 or H200; other cards have 99 KB."""

LONG_BLOCK = 512
"""Columns of a block for up to 8 rows."""

LONG_BLOCKS_SHARED = 80 << 10
"""Bytes that 32 outputs and 8 rows of two such blocks take."""


class LinearConfig(NamedTuple):
    """How one product is cut: outputs a program, K a block, parts of K, warps, pipeline stages.

    One stage means the ordinary cores (one row only), more the tensor cores with blocks loaded
    ahead. On these the first block comes in `num_pieces`, one after the other, and `prefetch`
    columns of the second one are asked into the L2 behind it.
    """

    block_n: int
    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int = 1
    num_pieces: int = 1
    prefetch: int = 0


def rows_a_program(rows: int, config: LinearConfig) -> int:
    """Return what so many rows (2 or more) are padded to, or cut into.

    8 columns take `mma.sync` and leave room for long blocks; short ones are faster with `wgmma`.
    """
    if rows <= 8 and config.block_k >= LONG_BLOCK:
        return 8
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def choose_config(
    rows: int, size_r: int, size_k: int, *, splittable: bool, shared_bytes: int = 0
) -> LinearConfig:
    """Return the measured cut for `rows` rows with a weight [size_r, size_k].

    Args:
        rows: of the inputs.
        size_r: outputs.
        size_k: what is summed over.
        splittable: whether the reader adds parts up, so that K may be cut.
        shared_bytes: what a program may have of shared memory, for blocks in 16 bits; 0 takes
            short ones.
    """
    if rows == 1:
        if size_k % 1024:
            return LinearConfig(16, _largest_block(size_k, 256), 1, 4)
        if size_k % 4096 == 0 and splittable and size_k > size_r:
            # Few outputs: parts of K make enough programs.
            return LinearConfig(4, 2048, size_k // 4096, 8)
        if size_k >= 4096 and size_r >= 4096 and size_k % 2048 == 0:
            return LinearConfig(4, 2048, 1, 8)
        return LinearConfig(4, 1024, 1, 4)
    if rows <= 8 and shared_bytes >= LONG_BLOCKS_SHARED:
        found = _cut_in_long_blocks(rows, size_r, size_k, splittable, shared_bytes)
        if found is not None:
            return found
    num_splits = 1
    while splittable and size_k % (128 * num_splits * 2) == 0:
        if -(-size_r // 64) * num_splits >= 100:
            break
        num_splits *= 2
    part = size_k // num_splits
    programs = -(-size_r // 64) * num_splits
    # Long blocks where they fit: fewer, longer pieces of a row of memory. Short ones leave room for
    # two programs a multiprocessor, where all of them run at once that way and a second wave would
    # leave many multiprocessors without work.
    in_pairs = NUM_MULTIPROCESSORS < programs <= 2 * NUM_MULTIPROCESSORS
    long = part >= 512 and shared_bytes >= HOPPER_SHARED and not in_pairs
    block_k = _largest_block(part, 256 if long else 128)
    return LinearConfig(64, block_k, num_splits, 4, 3 if block_k == 256 or rows > 32 else 4)


def _cut_in_long_blocks(
    rows: int, size_r: int, size_k: int, splittable: bool, shared_bytes: int
) -> LinearConfig | None:
    """Return the cut for 2 to 8 rows of a weight that is large enough, else None.

    The first block, asked for before the inputs are there, is to arrive meanwhile: 64 KB a
    multiprocessor, by one program or by two that fit side by side. More, or all of it at once where
    a norm is in front, delays the kernel that is waited for.
    """
    num_splits = 1
    programs = -(-size_r // 64)
    while splittable and programs < 100 and size_k % (2 * LONG_BLOCK * num_splits * 2) == 0:
        num_splits *= 2
        programs *= 2
    part = size_k // num_splits
    if 2 * programs < 100 or part < 2 * LONG_BLOCK or part % LONG_BLOCK:
        return None
    if 2 * programs <= NUM_MULTIPROCESSORS and size_r == size_k and shared_bytes >= HOPPER_SHARED:
        # A small square one, after the time mixing, is better in more and shorter parts.
        return LinearConfig(64, 256, 2 * num_splits, 4, 3)
    fills_last_wave = programs % NUM_MULTIPROCESSORS >= 0.9 * NUM_MULTIPROCESSORS
    if rows <= 4 and part >= 4096 and fills_last_wave and shared_bytes >= HOPPER_SHARED:
        return LinearConfig(64, LONG_BLOCK, num_splits, 4, 3)
    all_start_at_once = programs <= NUM_MULTIPROCESSORS
    if not splittable and part <= 2048 and all_start_at_once:
        return LinearConfig(32, LONG_BLOCK, num_splits, 2, 3, num_pieces=4)
    if splittable and num_splits == 1 and programs >= 100 and all_start_at_once:
        # Few bytes each, and a norm in front: what is asked for early decides.
        if rows <= 4:
            return LinearConfig(32, LONG_BLOCK, 1, 2, 3, num_pieces=2, prefetch=256)
        if shared_bytes >= HOPPER_SHARED:
            return LinearConfig(64, LONG_BLOCK, 1, 4, 3)
    return LinearConfig(32, LONG_BLOCK, num_splits, 2, 3)


def _largest_block(size: int, at_most: int) -> int:
    """Return the largest power of two that divides `size`, up to `at_most`."""
    return min(size & -size, at_most)
