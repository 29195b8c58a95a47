"""Whether RWKV-7's decode step runs all layers in one launch: where it can and was faster."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

import torch

from mrss_kernels.persistent7_cuts import MAX_HELP

ROWS = (*range(1, 13), 14, 16, 20, 24, 28, 32)
"""Numbers of rows that the kernel takes. Products are padded to 8, 16 or 32."""


def _up_to(most: int) -> tuple[int, ...]:
    return tuple(rows for rows in ROWS if rows <= most)


FASTER: dict[str, dict[int, Collection[int]]] = {
    "NVIDIA H100 80GB HBM3": {1024: ROWS, 2048: ROWS, 4096: _up_to(16)},
    "NVIDIA H200": {2048: _up_to(8)},
}
"""By card and C, with how many rows it was measured to be faster than launch by launch."""


HEAD_SIZE = 64
"""N of every RWKV-7 so far."""

CAPABILITY = (9, 0)
"""Of the only cards that have `wgmma`."""

MIN_PROGRAMS = 128
"""Multiprocessors: with fewer, more programs mark numbers as not written and pass no fence."""


def decode_choice() -> str:
    """Return what `MRSS_DECODE` chooses: "auto", "persistent" or "launches".

    Raises:
        ValueError: it says something else.
    """
    choice = os.environ.get("MRSS_DECODE", "auto")
    if choice not in ("auto", "persistent", "launches"):
        raise ValueError(f"MRSS_DECODE must be auto, persistent or launches, got {choice!r}")
    return choice


def persistent_obstacle(
    device: torch.device,
    num_layers: int,
    channels: int,
    head_size: int,
    ranks: Sequence[int] = (),
) -> str | None:
    """Return why the kernel cannot or should not run a model's layers, None where it should.

    `MRSS_DECODE` decides for a card and a width that `FASTER` has not.

    Args:
        device: of the weights.
        num_layers: L.
        channels: C, with an FFN of 4C.
        head_size: N.
        ranks: of the LoRAs of w, a, g, v, multiples of 64; none where they are not known.

    Raises:
        ValueError: `MRSS_DECODE` is no choice.
    """
    choice = decode_choice()
    found = obstacle_to_one_launch(device, num_layers, channels, head_size, ranks)
    if choice == "launches":
        return "MRSS_DECODE is launches"
    if choice == "auto" and found is None:
        name = torch.cuda.get_device_name(device)
        if channels not in FASTER.get(name, {}):
            return f"it was not found to be faster on this card, {name}, for {channels} channels"
    return found


def rows_in_one_launch(device: torch.device, channels: int) -> Collection[int]:
    """Return with how many rows the steps of a model that nothing is against use the kernel.

    Raises:
        ValueError: `MRSS_DECODE` is no choice.
    """
    if decode_choice() == "persistent":
        return ROWS
    return FASTER.get(torch.cuda.get_device_name(device), {}).get(channels, ())


def obstacle_to_one_launch(
    device: torch.device, num_layers: int, channels: int, head_size: int, ranks: Sequence[int]
) -> str | None:
    """Return why the kernel cannot run a model's layers, None where it can.

    Arguments as `persistent_obstacle`.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return "the device is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return "the card has compute capability {}.{}, not 9.0".format(*capability)
    num_programs = torch.cuda.get_device_properties(device).multi_processor_count
    if num_programs < MIN_PROGRAMS:
        return f"the card has {num_programs} multiprocessors, not {MIN_PROGRAMS} or more"
    if channels not in MAX_HELP:
        return f"the width {channels} is none of {', '.join(map(str, MAX_HELP))}"
    if head_size != HEAD_SIZE:
        return f"heads have {head_size} channels, not {HEAD_SIZE}"
    if num_layers % 2 or num_layers < 2:
        return f"{num_layers} layers are not an even number of them"
    if not all(ranks) or sum(ranks) > channels // 2:
        return f"LoRAs of ranks {list(ranks)} do not fit"
    return None
