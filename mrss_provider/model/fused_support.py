"""Whether a model decodes through the fused kernels and CUDA graphs, and if not, why.

Knows no kernels, so that it can be asked on any machine.
"""

from __future__ import annotations

import torch

from mrss_provider.model.config import ModelConfig

MIN_CAPABILITY = (8, 0)
"""Of a CUDA device: from there on tensor cores take both 16-bit dtypes."""

GROUP_LEN = 64
"""Outputs of a product that one program computes: widths are multiples of it."""

_DTYPES = ("fp16", "bf16")
_HEAD_SIZES = (16, 32, 64, 128)


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
