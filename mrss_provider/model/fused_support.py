"""Whether a model decodes through the fused kernels and CUDA graphs, and if not, why.

Knows no kernels but their limits, so that it can be asked on any machine.
"""

from __future__ import annotations

import torch
from mrss_kernels import persistent7_choice, persistent7_cuts

from mrss_provider.errors import ConfigError
from mrss_provider.model.config import ModelConfig

MIN_CAPABILITY = (8, 0)
"""Of a CUDA device: from there on tensor cores take both 16-bit dtypes."""

GROUP_LEN = 64
"""Outputs of a product that one program computes: widths are multiples of it."""

_DTYPES = ("fp16", "bf16")
_HEAD_SIZES = (16, 32, 64, 128)

FP8_CAPABILITY = (8, 9)
"""Of a CUDA device: from there on it converts e4m3."""

INT4_PAIR_SIZE = 128
"""Widths of weights in 4 bits are multiples of it."""


def check_quantizable(config: ModelConfig, device: torch.device) -> None:
    """Refuse a model whose weights a device cannot hold as `config.quantize` says.

    Raises:
        ConfigError: on CUDA, what the fused kernels do not take, or widths that int4 has no form
            for.
    """
    if config.quantize == "none" or device.type != "cuda":
        return
    obstacle = fused_obstacle(config, device)
    widths = (("width", config.hidden_size), ("ffn width", config.ffn_size))
    for what, width in widths if config.quantize == "int4" else ():
        if obstacle is None and width % INT4_PAIR_SIZE:
            obstacle = f"the {what} {width} is no multiple of {INT4_PAIR_SIZE}"
    if obstacle is not None:
        raise ConfigError(
            f"{config.quantize} weights cannot be had here: {obstacle}; choose quantize none",
            param="quantize",
        )


def fp8_obstacle(device: torch.device) -> str | None:
    """Return why a CUDA device cannot read weights in fp8, or None."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= FP8_CAPABILITY:
        return None
    got, needed = (".".join(map(str, pair)) for pair in (capability, FP8_CAPABILITY))
    return f"the card has compute capability {got}, fp8 needs {needed}"


def fused_obstacle(config: ModelConfig, device: torch.device) -> str | None:
    """Return why the kernels do not take this model on this device, None where they do."""
    if device.type != "cuda":
        return "the device is no CUDA device"
    if torch.version.hip is not None:
        return "the fused kernels were never run on ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        got, needed = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
        return f"the card has compute capability {got}, the fused kernels need {needed}"
    if config.dtype not in _DTYPES:
        return f"the weights are {config.dtype}, the fused kernels take {' and '.join(_DTYPES)}"
    for what, width in (("width", config.hidden_size), ("ffn width", config.ffn_size)):
        if width % GROUP_LEN:
            return f"the {what} {width} is no multiple of {GROUP_LEN}"
    if config.head_size not in _HEAD_SIZES:
        sizes = ", ".join(map(str, _HEAD_SIZES))
        return f"heads have {config.head_size} channels, the fused kernels take {sizes}"
    return None


def decode_choice() -> str:
    """Return what `MRSS_DECODE` chooses: "auto", "persistent" or "launches".

    Raises:
        ConfigError: it says something else.
    """
    try:
        return persistent7_choice.decode_choice()
    except ValueError as error:
        raise ConfigError(str(error), param="MRSS_DECODE") from error


def persistent_rows(config: ModelConfig, device: torch.device) -> int:
    """Return with up to how many rows a step on CUDA runs all layers in one kernel; 0 is never.

    As far as the config says, which knows no LoRAs: `FusedDecoder.persistent_rows` has the last
    word.

    Raises:
        ConfigError: `MRSS_DECODE` is no choice.
    """
    decode_choice()
    if config.version != 7 or config.quantize != "none":
        return 0
    if config.ffn_size != persistent7_cuts.FFN_FACTOR * config.hidden_size:
        return 0
    shape = (config.num_layers, config.hidden_size, config.head_size)
    obstacle = persistent7_choice.persistent_obstacle(device, *shape)
    if obstacle:
        return 0
    return max(persistent7_choice.rows_in_one_launch(device, config.hidden_size), default=0)
