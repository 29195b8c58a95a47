"""Cuts of products of few rows, over sizes of models and of shared memory, without a GPU."""

from __future__ import annotations

from itertools import product

import pytest
from mrss_kernels import linear_cuts
from mrss_kernels.linear_cuts import LinearConfig, choose_config, rows_a_program
from mrss_kernels.rows_linear import check_config

WIDTHS = (64, 768, 832, 1024, 2048, 2304, 2560, 4096, 4608, 5120)
ROWS = (1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 64)
HOPPER, OTHER = linear_cuts.HOPPER_SHARED, 99 << 10


def shapes(channels: int) -> list[tuple[int, int, bool]]:
    """Return outputs, what is summed over, and whether in parts, of a model's products."""
    ffn_sizes = (4 * channels, channels * 7 // 2 // 64 * 64)
    found = [(3 * channels + 576, channels, True), (channels, channels, True)]
    found += [(size_v, channels, False) for size_v in (65536, 65529)]
    found += [(size, channels, False) for size in ffn_sizes]
    return found + [(channels, size, True) for size in ffn_sizes]


def shared_bytes_of(rows: int, config: LinearConfig) -> int:
    """Return what blocks of weights and inputs take, in 16 bits."""
    block_m = rows_a_program(rows, config)
    # `mma.sync` reads a block into registers before the next one is asked for.
    num_blocks = config.num_stages - (block_m == 8)
    return num_blocks * 2 * config.block_k * (config.block_n + block_m)


@pytest.mark.parametrize("shared_bytes", [0, OTHER, HOPPER])
def test_every_chosen_cut_is_possible_and_fits(shared_bytes: int) -> None:
    for channels, rows in product(WIDTHS, ROWS):
        for size_r, size_k, splittable in shapes(channels):
            config = choose_config(
                rows, size_r, size_k, splittable=splittable, shared_bytes=shared_bytes
            )
            grouped, activation = size_r % 64 == 0, "none" if splittable else "relu2"
            check_config(config, rows, size_k, grouped, activation)
            if rows > 1:
                assert shared_bytes_of(rows, config) <= (shared_bytes or OTHER), config


def test_programs_that_fill_a_multiprocessor_come_in_no_second_wave_of_few() -> None:
    for channels, rows in product(WIDTHS, ROWS[1:]):
        for size_r, size_k, splittable in shapes(channels):
            config = choose_config(rows, size_r, size_k, splittable=splittable, shared_bytes=HOPPER)
            num_programs = -(-size_r // config.block_n) * config.num_splits
            num_waves = num_programs / linear_cuts.NUM_MULTIPROCESSORS
            is_alone = 2 * shared_bytes_of(rows, config) > HOPPER
            assert not (is_alone and 1 < num_waves < 1.5), (channels, rows, config)
