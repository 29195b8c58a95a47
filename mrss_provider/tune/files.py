"""Checkpoints in and tuned states out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrss_provider.errors import StateFileError
from mrss_provider.model import ModelConfig, StateMetadata, TunedState, save_tuned_state
from mrss_provider.model.weights import Weights as CheckpointWeights
from mrss_provider.model.weights import load_weights
from mrss_provider.replacing import replace_file
from mrss_provider.tune.config import TuneConfig, TuneResult

_LORA = re.compile(r"att\.([wavg][12]|time_maa_w[12]|time_decay_w[12])$")

LOSSES_KEPT = 10
"""Steps whose mean loss is written down as the first and as the last."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read an RWKV-7 or RWKV-6 checkpoint, file or folder, in the official names and layout.

    Returns:
        name -> tensor on the CPU, all in the file's dtype, or in the smallest that holds every
        value where the file mixes dtypes. A `time_state` in the file comes too, always in fp32.

    Raises:
        ModelFileError: no checkpoint.
    """
    checkpoint = load_weights(path)
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in checkpoint.tensors.values()})
    # The loader keeps every matrix as [out, in]; officially the low-rank ones are [in, out].
    weights = {
        name: (tensor.mT.contiguous() if _LORA.search(name) else tensor).to(dtype)
        for name, tensor in checkpoint.tensors.items()
    }
    if checkpoint.time_state is not None:
        for i, state in enumerate(checkpoint.time_state):
            weights[f"blocks.{i}.att.time_state"] = state
    return weights


def save_result(
    path: Path,
    result: TuneResult,
    model: Path,
    *,
    group: str | None,
    config: TuneConfig,
    licence: str | None = None,
    display_name: str | None = None,
    template: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> TunedState:
    """Write a learnt state, with how it came to be, and return it.

    Args:
        path: `.safetensors`, or `.pth` for RWKV-PEFT's form; its stem is the state's name. What a
            `.pth` cannot say goes into a file beside it, with `.json` added to its name.
        result: from `tune_state`.
        model: the checkpoint that it was tuned on.
        group: what the state is about: knowledge, tone, task, ...
        config: that it was tuned with.
        licence: an SPDX name, or words.
        display_name: for people.
        template: chat template by name, where it was tuned on another one than its model's.
        notes: more about how it was made, as JSON has it; goes into the metadata.

    Raises:
        ModelFileError: `model` cannot be read.
        StateFileError: the state is of another shape, or cannot be written.
    """
    checkpoint = load_weights(model)
    training = asdict(config) | {
        "first_loss": _mean(result.losses[:LOSSES_KEPT]),
        "last_loss": _mean(result.losses[-LOSSES_KEPT:]),
        "seconds": round(result.seconds, 1),
    }
    metadata = StateMetadata(
        group=group,
        loss_on=config.loss_on,
        local=config.locality > 0,
        orientation="vk",
        licence=licence,
        training=training | dict(notes or {}),
        display_name=display_name,
        template=template,
    )
    model_config = _config(checkpoint)
    state = TunedState(
        path.stem,
        result.wkv,
        time_offset=result.time_offset,
        metadata=metadata.with_base(model_config),
    )
    save_tuned_state(path, state, model_config)
    if path.suffix == ".pth":
        strings = state.metadata.to_strings(model_config)
        about = strings | {"training": state.metadata.training}
        _write_json(path.with_name(path.name + ".json"), about)
    return state


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    try:
        replace_file(path, (json.dumps(value, indent=1) + "\n").encode())
    except OSError as exc:
        raise StateFileError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def _config(checkpoint: CheckpointWeights) -> ModelConfig:
    return ModelConfig(
        version=checkpoint.version,
        num_layers=checkpoint.num_layers,
        hidden_size=checkpoint.hidden_size,
        num_heads=checkpoint.num_heads,
        head_size=checkpoint.head_size,
        vocab_size=checkpoint.vocab_size,
        ffn_size=checkpoint.ffn_size,
        dtype="fp32",
        fingerprint=checkpoint.fingerprint,
        name=checkpoint.name,
    )


def _mean(values: tuple[float, ...]) -> float:
    return round(sum(values) / max(1, len(values)), 4)
