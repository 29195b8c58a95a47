"""How the persistent decode step is cut, and what it refuses; its numbers are checked on a GPU."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from mrss_kernels import persistent7
from mrss_kernels import persistent7_ahead as ahead7
from mrss_kernels import persistent7_choice as choice7
from mrss_kernels import persistent7_cuts as cuts7
from mrss_kernels.linear_cuts import HOPPER_SHARED
from persistent_sizes import RANK_SUMS

CUDA = torch.device("cuda", 0)
H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("num_programs", [78, 114, 132, 144])
@pytest.mark.parametrize("width", cuts7.MAX_HELP)
def test_parts_fill_the_programs_in_whole_blocks_and_are_no_longer_than_a_row(
    width: int, num_programs: int
) -> None:
    tiles = width // 64
    for size in (width, 4 * width):
        parts = cuts7.num_parts(size, tiles, num_programs, width)
        assert size % (parts * 256) == 0
        assert size // parts <= width
        assert tiles * parts <= num_programs or 2 * size // parts > width
        assert 2 * tiles * parts > num_programs or size // parts == 256


def rank_sums(width: int) -> list[tuple[int, int]]:
    """Return a model's, the least and the most that the kernel takes, and wide ones hardly used."""
    return [RANK_SUMS[width], (256, 32), (width // 2, width // 2), (width // 2, 32)]


@pytest.mark.parametrize("width", cuts7.MAX_HELP)
def test_ring_inputs_and_barriers_fit_one_program_whatever_the_ranks(width: int) -> None:
    for rows, (rank_sum, up_sum) in product(choice7.ROWS, rank_sums(width)):
        cuts = cuts7.find_cuts(rows, width, rank_sum, up_sum, 132, HOPPER_SHARED)
        padded = cuts7.padded(rows)
        assert padded >= rows
        inputs = cuts.input_blocks * 256 * padded * 2
        longest = max(width, 4 * width // cuts.value_parts)
        # All inputs of a product, or two chunks of them in turn.
        assert inputs >= padded * 2 * (512 * cuts.chunk if cuts.chunk else longest)
        # The second halves have a column a LoRA and row, which come by four.
        fours = -(-cuts.group // 4)
        assert inputs >= -(-up_sum // 256) * 16 * fours * 256 * 2
        # Then tiles [4, 64] in fp32, sixteen for each four rows: outputs of the LoRAs and of the
        # states, and eight vectors that meet the states.
        assert inputs >= 16 * fours * 1024
        assert inputs >= 4 * width
        # A program that may ask for more than the ring holds would wait for what it has not asked.
        for card in ahead7.AHEAD:
            packed = ahead7.blocks_ahead(card, width, up_sum, rows, cuts)
            assert len(packed) == 5
            assert 1 + max(each >> 2 * k & 3 for each in packed for k in range(16)) <= (
                cuts.num_stages
            )
        ring = cuts.num_stages * (64 * 256 * 2 + 2 * 8)
        assert ring + inputs + 3 * 16 < HOPPER_SHARED
    cuts = [
        cuts7.find_cuts(rows, width, *RANK_SUMS[width], 132, HOPPER_SHARED) for rows in choice7.ROWS
    ]
    assert all(each.num_stages >= 5 for each in cuts)


@pytest.mark.parametrize(
    ("num_helped", "num_programs"), [(105, 132), (74, 132), (53, 132), (1, 128), (127, 128)]
)
def test_each_tile_has_one_helper_and_each_helper_tiles_in_a_row(
    num_helped: int, num_programs: int
) -> None:
    num_helpers = num_programs - num_helped
    # As `helped_units` of the kernel has it.
    edges = [-(-i * num_helped // num_helpers) for i in range(num_helpers + 1)]
    for i in range(num_helpers):
        for tile in range(edges[i], edges[i + 1]):
            assert cuts7.helper_of(tile, num_helped, num_helpers) == i
    assert edges[0] == 0
    assert edges[-1] == num_helped


@pytest.mark.parametrize("num_programs", [128, 132, 144])
@pytest.mark.parametrize("rows", [1, 4, 8, 12, 32])
@pytest.mark.parametrize("width", cuts7.MAX_HELP)
def test_help_takes_load_off_the_programs_that_have_most(
    width: int, rows: int, num_programs: int
) -> None:
    rank_sum, up_sum = RANK_SUMS[width]
    cuts = cuts7.find_cuts(rows, width, rank_sum, up_sum, num_programs, HOPPER_SHARED)
    num_tiles, blocks = (3 * width + rank_sum) // 64, width // 256
    num_helped, num_helpers = len(cuts.help), num_programs - len(cuts.help)
    assert cuts.helped % num_programs == 0
    assert cuts.helped + num_helped == num_tiles
    most = cuts7.MAX_HELP_PADDED_TO_32 if rows > 16 else cuts7.MAX_HELP
    assert all(1 <= taken <= most[width] < blocks for taken in cuts.help)
    # Of the first product alone, no helper has more than its tiles' first programs keep by much.
    own = [blocks - taken for taken in cuts.help]
    helpers = [0] * num_helpers
    for tile, taken in enumerate(cuts.help):
        helpers[cuts7.helper_of(tile, num_helped, num_helpers)] += taken
    assert max(own) < blocks
    assert sum(own) + sum(helpers) == num_helped * blocks


@pytest.mark.parametrize("width", cuts7.MAX_HELP)
def test_a_norms_slices_fill_a_row_in_whole_vectors(width: int) -> None:
    for rows in choice7.ROWS:
        cuts = cuts7.find_cuts(rows, width, *RANK_SUMS[width], 132, HOPPER_SHARED)
        # Four warps of 32 threads write one, each thread the same number of columns.
        assert width % cuts.slice_len == cuts.slice_len % 128 == 0


def test_help_stops_where_it_would_only_move_the_load() -> None:
    # Program 0 and 1 have a tile each, 2 and 3 help: tile 0's helper is idle, tile 1's is not.
    assert cuts7.plan_help([0, 0, 0, 6], 2, 8, 7) == (4, 1)
    assert cuts7.plan_help([0, 0, 0, 6], 2, 8, 2) == (2, 1)
    assert cuts7.plan_help([5, 5], 0, 8, 2) == ()


def test_a_layers_buffers_hold_what_the_docstring_counts() -> None:
    rows, width, ranks = 3, 1024, 320
    floats, halves = cuts7.buffer_sizes(rows, width, ranks, (4, 8))
    projected, parts, residual = rows * (3 * width + ranks), 12 * rows * width, 2 * rows * width
    assert floats == 2 * projected + parts + residual
    assert halves == 6 * rows * width + 2 * rows * width + rows * 4 * width
    # Words of 16 bytes are read from every buffer.
    assert floats % 4 == halves % 8 == 0


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 8, 16])
def test_digits_are_stretched_over_the_blocks_in_32_bits(num_blocks: int) -> None:
    packed = ahead7.packed_digits("01233210", num_blocks)
    assert -(1 << 31) <= packed < 1 << 31
    unpacked = [packed >> 2 * k & 3 for k in range(num_blocks)]
    wanted = {1: "0", 2: "03", 3: "022", 4: "0231", 8: "01233210", 16: "0011223333221100"}
    assert "".join(map(str, unpacked)) == wanted[num_blocks]


def test_how_far_ahead_is_said_in_a_word_a_product() -> None:
    for card, width in product(ahead7.AHEAD, cuts7.MAX_HELP):
        for words in ahead7.table_of(card, width).values():
            assert len(words.split()) == 5
            assert set(words) <= set("0123 ")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((24, 768, 64), "the width 768 is none of 1024, 2048, 4096"),
        ((24, 2048, 128), "heads have 128 channels, not 64"),
        ((23, 2048, 64), "23 layers are not an even number of them"),
        ((24, 1024, 64, (64, 64, 1024, 64)), "LoRAs of ranks [64, 64, 1024, 64] do not fit"),
        ((24, 1024, 64, (64, 64, 128, 0)), "LoRAs of ranks [64, 64, 128, 0] do not fit"),
        ((24, 2048, 64, (128, 128, 256, 64)), None),
        ((24, 2048, 64), None),
    ],
)
def test_models_that_the_kernel_does_not_take_are_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], words: str | None
) -> None:
    card(monkeypatch)
    assert choice7.persistent_obstacle(CUDA, *shape) == words


def card(monkeypatch: pytest.MonkeyPatch, name: str = H100) -> None:
    monkeypatch.delenv("MRSS_DECODE", raising=False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: name)
    about = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device=None: about)


def test_cards_that_the_kernel_does_not_run_on_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch)
    shape = (24, 2048, 64)
    assert "no CUDA" in (choice7.persistent_obstacle(torch.device("cpu"), *shape) or "")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (12, 0))
    found = choice7.persistent_obstacle(CUDA, *shape)
    assert found == "the card has compute capability 12.0, not 9.0"
    card(monkeypatch)
    about = SimpleNamespace(multi_processor_count=114)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device=None: about)
    found = choice7.persistent_obstacle(CUDA, *shape)
    assert found == "the card has 114 multiprocessors, not 128 or more"
    monkeypatch.setattr("torch.version.hip", "6.4")
    assert "no CUDA" in (choice7.persistent_obstacle(CUDA, *shape) or "")


def test_a_card_that_was_not_measured_needs_to_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "Other")
    shape = (24, 2048, 64)
    found = choice7.persistent_obstacle(CUDA, *shape)
    assert found == "it was not found to be faster on this card, Other, for 2048 channels"
    assert not choice7.rows_in_one_launch(CUDA, 2048)
    card(monkeypatch, "NVIDIA H200")
    assert choice7.persistent_obstacle(CUDA, *shape) is None
    assert 8 in choice7.rows_in_one_launch(CUDA, 2048)
    assert "for 4096" in (choice7.persistent_obstacle(CUDA, 32, 4096, 64) or "")
    card(monkeypatch, "Other")
    monkeypatch.setenv("MRSS_DECODE", "persistent")
    assert choice7.persistent_obstacle(CUDA, *shape) is None
    rows = choice7.rows_in_one_launch(CUDA, 2048)
    assert rows == choice7.ROWS
    found = choice7.persistent_obstacle(CUDA, 24, 768, 64)
    assert found == "the width 768 is none of 1024, 2048, 4096"
    monkeypatch.setenv("MRSS_DECODE", "launches")
    assert choice7.persistent_obstacle(CUDA, *shape) == "MRSS_DECODE is launches"
    monkeypatch.setenv("MRSS_DECODE", "fast")
    with pytest.raises(ValueError, match="must be auto, persistent or launches, got 'fast'"):
        choice7.persistent_obstacle(CUDA, *shape)


def stacked_layers(
    ranks: tuple[int, int, int, int], up: tuple[int, int, int, int]
) -> persistent7.StackedLayers7:
    norms, matrix = torch.zeros(2, 2, 1024), torch.zeros(2048, 1024, dtype=torch.float16)
    return persistent7.StackedLayers7(
        project=matrix,
        up=matrix,
        output=matrix,
        ffn_key=matrix,
        ffn_value=matrix,
        groups=torch.zeros(53, dtype=torch.int32),
        norm1=norms,
        norm2=norms,
        mix=norms,
        ffn_mix=norms,
        vectors=norms,
        ranks=ranks,
        up_ranks=up,
    )


def test_weights_on_a_cpu_are_refused() -> None:
    layers = stacked_layers((64, 64, 128, 64), (64, 64, 128, 64))
    with pytest.raises(ValueError, match="the device is no CUDA device"):
        persistent7.PersistentLayers7(layers)


@pytest.mark.parametrize(
    ("ranks", "up", "words"),
    [
        ((64, 72, 128, 64), (64, 64, 128, 64), "ranks must be multiples of 64, got [64, 72, "),
        ((64, 64, 128, 64), (64, 72, 128, 64), "at most [64, 64, 128, 64], got [64, 72, 128, 64]"),
        ((64, 64, 128, 64), (64, 64, 100, 64), "up_ranks must be multiples of 8 of at least 8 and"),
        ((64, 64, 128, 64), (0, 64, 128, 64), "up_ranks must be multiples of 8 of at least 8 and"),
    ],
)
def test_ranks_that_the_kernel_would_misread_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    ranks: tuple[int, int, int, int],
    up: tuple[int, int, int, int],
    words: str,
) -> None:
    monkeypatch.setattr("mrss_kernels.persistent7.obstacle_to_one_launch", lambda *_: None)
    with pytest.raises(ValueError, match=re.escape(words)):
        persistent7.PersistentLayers7(stacked_layers(ranks, up))


def starting_at(num_bytes: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros that start so many bytes behind a multiple of 16."""
    first = num_bytes // dtype.itemsize
    size = math.prod(shape)
    memory = torch.zeros(size + first + 16 // dtype.itemsize, dtype=dtype)
    first += -memory.data_ptr() % 16 // dtype.itemsize
    return memory[first : first + size].view(shape)


@pytest.mark.parametrize(
    ("x_at", "mixed_at", "words"),
    [
        (0, 0, ""),
        (4, 0, "x must start at a multiple of 16 bytes, got 4 bytes past one"),
        (0, 8, "mixed must start at a multiple of 16 bytes, got 8 bytes past one"),
    ],
)
def test_inputs_that_words_of_16_bytes_cannot_be_read_from_are_refused(
    monkeypatch: pytest.MonkeyPatch, x_at: int, mixed_at: int, words: str
) -> None:
    monkeypatch.setattr("mrss_kernels._checks.is_interpreted", lambda: True)
    layers = stacked_layers((64, 64, 128, 64), (64, 64, 128, 64))
    step = SimpleNamespace(_layers=layers, _rows=[2])
    x = starting_at(x_at, 2, 1024, dtype=torch.float32)
    mixed = starting_at(mixed_at, 6, 2, 1024, dtype=torch.float16)
    shift, pool = torch.zeros(2, 3, 1024), torch.zeros(2, 3, 16, 64, 64)
    refusal = pytest.raises(ValueError, match=f"^{words}$") if words else nullcontext()
    with refusal:
        persistent7.PersistentLayers7._check(
            step, x, mixed, shift, shift.clone(), pool, torch.tensor([2, 0])
        )
