"""How the persistent decode step is cut, and what it refuses; its numbers are checked on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mrss_kernels import persistent7
from mrss_kernels.linear_cuts import HOPPER_SHARED

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("num_programs", [78, 114, 132, 144])
@pytest.mark.parametrize("width", persistent7.WIDTHS)
def test_parts_fill_the_programs_once_in_whole_blocks(width: int, num_programs: int) -> None:
    tiles = width // 64
    for size in (width, 4 * width):
        parts = persistent7.num_parts(size, tiles, num_programs)
        assert size % (parts * 256) == 0
        assert tiles * parts <= num_programs
        assert 2 * tiles * parts > num_programs or size // parts == 256


@pytest.mark.parametrize("width", persistent7.WIDTHS)
def test_ring_inputs_and_barriers_fit_one_program(width: int) -> None:
    parts = persistent7.num_parts(4 * width, width // 64, 132)
    for rows, padded in ((1, 8), (8, 8), (9, 16), (12, 16)):
        stages = persistent7.num_stages(HOPPER_SHARED, width, parts, rows)
        inputs = padded * 2 * max(width, 4 * width // parts)
        assert stages >= 4
        assert stages * 64 * 256 * 2 + inputs + 2 * 8 * stages < HOPPER_SHARED


def test_a_layers_buffers_hold_what_the_docstring_counts() -> None:
    rows, width, ranks = 3, 1024, 320
    floats, halves = persistent7.buffer_sizes(rows, width, ranks, (4, 8))
    projected, parts, residual = rows * (3 * width + ranks), 12 * rows * width, 2 * rows * width
    assert floats == projected + parts + residual
    assert halves == 6 * rows * width + 2 * rows * width + rows * 4 * width
    # Words of 16 bytes are read from every buffer.
    assert floats % 4 == halves % 8 == 0


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((24, 768, 64), "the width 768 is none of 1024, 2048"),
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
    assert persistent7.persistent_obstacle(CUDA, *shape) == words


def card(monkeypatch: pytest.MonkeyPatch, name: str = persistent7.CARDS[0]) -> None:
    monkeypatch.delenv("MRSS_DECODE", raising=False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: name)
    about = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device=None: about)


def test_cards_that_the_kernel_does_not_run_on_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch)
    shape = (24, 2048, 64)
    assert "no CUDA" in (persistent7.persistent_obstacle(torch.device("cpu"), *shape) or "")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (12, 0))
    found = persistent7.persistent_obstacle(CUDA, *shape)
    assert found == "the card has compute capability 12.0, not 9.0"
    card(monkeypatch)
    about = SimpleNamespace(multi_processor_count=114)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device=None: about)
    found = persistent7.persistent_obstacle(CUDA, *shape)
    assert found == "the card has 114 multiprocessors, not 128 or more"
    monkeypatch.setattr("torch.version.hip", "6.4")
    assert "no CUDA" in (persistent7.persistent_obstacle(CUDA, *shape) or "")


def test_a_card_that_was_not_measured_needs_to_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "Other")
    shape = (24, 2048, 64)
    found = persistent7.persistent_obstacle(CUDA, *shape)
    assert found == "it was not found to be faster on this card, Other"
    monkeypatch.setenv("MRSS_DECODE", "persistent")
    assert persistent7.persistent_obstacle(CUDA, *shape) is None
    found = persistent7.persistent_obstacle(CUDA, 24, 768, 64)
    assert found == "the width 768 is none of 1024, 2048"
    monkeypatch.setenv("MRSS_DECODE", "launches")
    assert persistent7.persistent_obstacle(CUDA, *shape) == "MRSS_DECODE is launches"
    monkeypatch.setenv("MRSS_DECODE", "fast")
    with pytest.raises(ValueError, match="must be auto, persistent or launches, got 'fast'"):
        persistent7.persistent_obstacle(CUDA, *shape)


def test_weights_on_a_cpu_are_refused() -> None:
    norms, matrix = torch.zeros(2, 2, 1024), torch.zeros(2048, 1024, dtype=torch.float16)
    layers = persistent7.StackedLayers7(
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
        ranks=(64, 64, 128, 64),
    )
    with pytest.raises(ValueError, match="the device is no CUDA device"):
        persistent7.PersistentLayers7(layers)
