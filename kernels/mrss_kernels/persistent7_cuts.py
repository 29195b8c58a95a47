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

SLICE_LEN = 256
"""Columns of a row that one unit of a norm writes."""

# Beside the ring and the inputs: barriers, and what threads hand to each other.
_OTHER_SHARED = 1536

MAX_GROUP = 4
"""Rows of a unit of time mixing: a warp has the vectors of one."""

MAX_HELP = {1024: 2, 2048: 2, 4096: 8}
"""By C, how many blocks of a tile of the first product another program takes at most."""


@dataclass(frozen=True)
class Cuts:
    """How the layers of a model are cut for one number of rows.

    Attributes:
        group: rows of a unit of time mixing.
        output_parts: parts of K that Wo is cut into.
        value_parts: parts of K that the FFN's value is cut into.
        helped: the first tile of 64 outputs of the first product that has a helper.
        help: how many of its last blocks are the helper's, a tile from `helped` on.
        num_stages: blocks that the ring holds.
    """

    group: int
    output_parts: int
    value_parts: int
    helped: int
    help: tuple[int, ...]
    num_stages: int


def find_cuts(
    rows: int, channels: int, rank_sum: int, num_programs: int, shared_bytes: int
) -> Cuts:
    """Return how layers of C channels and LoRAs of so many ranks are cut for so many rows."""
    tiles = channels // 64
    group = min(MAX_GROUP, -(-rows * tiles // num_programs))
    output_parts = num_parts(channels, tiles, num_programs, channels)
    value_parts = num_parts(FFN_FACTOR * channels, tiles, num_programs, channels)
    loads = [0] * num_programs
    for unit in range(tiles * -(-rows // group)):
        loads[-1 - unit % num_programs] += -(-rank_sum // 256)
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
    help_ = plan_help(loads, num_tiles - helped, channels // 256, MAX_HELP[channels])
    stages = num_stages(shared_bytes, channels, value_parts, rows)
    return Cuts(group, output_parts, value_parts, helped, help_, stages)


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


def num_stages(shared_bytes: int, channels: int, value_parts: int, rows: int) -> int:
    """Return how many blocks of weights the ring holds in so many bytes of shared memory."""
    longest = max(channels, FFN_FACTOR * channels // value_parts)
    inputs = longest * (8 if rows <= 8 else 16) * 2
    return (shared_bytes - _OTHER_SHARED - inputs) // BLOCK_BYTES
