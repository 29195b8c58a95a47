"""How the persistent decode step is cut into units and blocks, and which program takes which.

A block is 64 outputs by 256 columns of a weight, the unit in which memory is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FFN_FACTOR = 4
"""F / C of every RWKV-7."""

BLOCK_BYTES = 64 * 256 * 2
"""Of a block of weights: 64 outputs, 256 columns."""

# Beside the ring and the inputs: barriers, and what threads hand to each other.
_OTHER_SHARED = 1536

MAX_GROUP = 8
"""Rows of a unit of time mixing: a warp has the vectors of two."""

MAX_STAGED_BYTES = 32 << 10
"""Of a product's inputs in shared memory at once; more come in chunks."""

CHUNK_BLOCKS = 2
"""Blocks of such a chunk."""

KEPT_ROWS = {1024: range(1, 3), 2048: range(4, 7)}
"""By C, with how many rows the L2 is asked to keep the states from one step to the next."""

MAX_HELP = {1024: 2, 2048: 2, 4096: 8}
"""By C, how many blocks of a tile of the first product another program takes at most."""

MAX_HELP_PADDED_TO_32 = MAX_HELP | {2048: 1}
"""The same where products are padded to 32 rows. Measured."""

SLICES = {
    1024: {8: 256, 32: 512},
    2048: {6: 256, 7: 512, 8: 1024, 16: 512, 32: 1024},
    4096: {8: 256, 32: 512},
}
"""By C and up to how many rows, columns of a row that one unit of a norm writes.

Fewer columns are written sooner, but by more programs that all look for the whole row. Measured."""


@dataclass(frozen=True)
class Cuts:
    """How the layers of a model are cut for one number of rows.

    Attributes:
        group: rows of a unit of time mixing.
        output_parts: parts of K that Wo is cut into.
        value_parts: parts of K that the FFN's value is cut into.
        helped: the first tile of 64 outputs of the first product that has a helper.
        help: how many of its last blocks are the helper's, a tile from `helped` on.
        slice_len: columns of a row that one unit of a norm writes.
        chunk: blocks of a product's inputs that come at a time, 0 for all.
        input_blocks: 256 columns of inputs, padded as `padded`, that fit beside the ring.
        num_stages: blocks that the ring holds.
    """

    group: int
    output_parts: int
    value_parts: int
    helped: int
    help: tuple[int, ...]
    slice_len: int
    chunk: int
    input_blocks: int
    num_stages: int


def find_cuts(
    rows: int, channels: int, rank_sum: int, up_sum: int, num_programs: int, shared_bytes: int
) -> Cuts:
    """Return how layers of C channels are cut for so many rows.

    Args:
        rows: B.
        channels: C.
        rank_sum: of the LoRAs' first halves.
        up_sum: columns of their second halves.
        num_programs: multiprocessors.
        shared_bytes: shared memory of a program.
    """
    tiles = channels // 64
    group = min(MAX_GROUP, -(-rows * tiles // num_programs))
    output_parts = num_parts(channels, tiles, num_programs, channels)
    value_parts = num_parts(FFN_FACTOR * channels, tiles, num_programs, channels)
    loads = [0] * num_programs
    for unit in range(tiles * -(-rows // group)):
        loads[-1 - unit % num_programs] += -(-up_sum // 256) + (group > 1) * -(-group // 2)
    inner = FFN_FACTOR * channels
    products = [(tiles * output_parts, channels // output_parts), (inner // 64, channels)]
    products.append((tiles * value_parts, inner // value_parts))
    for num_units, size_k in products:
        for unit in range(num_units):
            loads[unit % num_programs] += size_k // 256
    num_tiles = (3 * channels + rank_sum) // 64
    helped = num_tiles // num_programs * num_programs
    for unit in range(helped):
        loads[unit % num_programs] += channels // 256
    max_help = MAX_HELP_PADDED_TO_32 if padded(rows) == 32 else MAX_HELP
    help_ = plan_help(loads, num_tiles - helped, channels // 256, max_help[channels])
    chunk = CHUNK_BLOCKS if channels * padded(rows) * 2 > MAX_STAGED_BYTES else 0
    blocks = input_blocks(rows, channels, up_sum, group, chunk)
    return Cuts(
        group=group,
        output_parts=output_parts,
        value_parts=value_parts,
        helped=helped,
        help=help_,
        slice_len=SLICES[channels][min(most for most in SLICES[channels] if rows <= most)],
        chunk=chunk,
        input_blocks=blocks,
        num_stages=(shared_bytes - _OTHER_SHARED - blocks * padded(rows) * 512) // BLOCK_BYTES,
    )


def keeps_states(channels: int, rows: int) -> bool:
    """Return whether the L2 is asked to keep the states of so many rows, as was measured."""
    return rows in KEPT_ROWS.get(channels, ())


def padded(rows: int) -> int:
    """Return how many rows the products of so many rows have."""
    return 8 if rows <= 8 else 16 if rows <= 16 else 32


def num_parts(size_k: int, num_tiles: int, num_programs: int, longest: int) -> int:
    """Return in how many parts of 256 columns or more K is cut.

    So that units fill the programs, and no part is longer than `longest`.
    """
    parts = 1
    while size_k % (parts * 512) == 0 and (
        num_tiles * parts * 2 <= num_programs or size_k // parts > longest
    ):
        parts *= 2
    return parts


def plan_help(
    loads: Sequence[int], num_helped: int, num_blocks: int, max_help: int
) -> tuple[int, ...]:
    """Return how many blocks of each of the last tiles of a product another program takes.

    Tile i is program i's; the programs behind these help, each with as many tiles in a row. Each
    tile has one block or more taken off, so that all have two parts.

    Args:
        loads: blocks that each program has without these tiles.
        num_helped: tiles, fewer than programs.
        num_blocks: of a tile.
        max_help: blocks that are taken off a tile at most.
    """
    total = [load + (i < num_helped) * num_blocks for i, load in enumerate(loads)]
    taken = [0] * num_helped
    num_helpers = len(loads) - num_helped

    def helper(tile: int) -> int:
        return num_helped + helper_of(tile, num_helped, num_helpers)

    def take(tile: int) -> None:
        taken[tile] += 1
        total[tile] -= 1
        total[helper(tile)] += 1

    for i in range(num_helped):
        take(i)
    while True:
        able = [i for i in range(num_helped) if taken[i] < min(max_help, num_blocks - 1)]
        able = [i for i in able if total[helper(i)] + 1 < total[i]]
        if not able:
            return tuple(taken)
        take(max(able, key=lambda i: (total[i], -total[helper(i)])))


def helper_of(tile: int, num_helped: int, num_helpers: int) -> int:
    """Return which of the helpers has a tile: each has as many in a row, as in `helped_units`."""
    return tile * num_helpers // num_helped


def buffer_sizes(
    rows: int, channels: int, rank_sum: int, parts: tuple[int, int]
) -> tuple[int, int]:
    """Return how many numbers in fp32 and in 16 bits one layer's buffers hold.

    In fp32: two parts of r, k, v and first halves [2, B, 3C + sum(ranks)], the parts of Wo's and
    of the FFN's product [P, B, C], the residual stream before the layer and before its FFN
    [B, C]. In 16 bits: six mixed inputs [6, B, C], Wo's input and the FFN's [B, C], the FFN's
    inner activations [B, 4C].
    """
    floats = rows * (2 * (3 * channels + rank_sum) + (sum(parts) + 2) * channels)
    return floats, rows * (8 + FFN_FACTOR) * channels


def input_blocks(rows: int, channels: int, up_sum: int, group: int, chunk: int) -> int:
    """Return how many times 256 columns of padded inputs make room for what is kept there.

    That is a product's inputs, of which no part is longer than C; first halves of LoRAs in 16
    columns for four rows of a unit of time mixing, and then 16 KB for each four; a row of a norm.
    """
    num_fours = -(-group // 4)
    inputs = (2 * 256 * chunk or channels) * padded(rows) * 2
    first_halves = -(-up_sum // 256) * 16 * num_fours * 512
    return -(-max(inputs, first_halves, num_fours * 16384, 4 * channels) // (padded(rows) * 512))
