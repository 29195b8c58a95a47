"""Trained gates out: into the folder where requests name them."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import save

from mrss_provider.engine.gate_file import GATE_SUFFIX, GATES_FOLDER
from mrss_provider.engine.gate_metadata import GateMetadata
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.errors import FileFormatError
from mrss_provider.model import ModelConfig
from mrss_provider.replacing import replace_file
from mrss_provider.tune.gate_data import GateData
from mrss_provider.tune.gate_report import GateReport
from mrss_provider.tune.gate_training import GateConfig, GateResult


def gate_path(states: Path, name: str) -> Path:
    """Return where the gate `name` of a folder of states is."""
    return states / GATES_FOLDER / f"{name}{GATE_SUFFIX}"


def save_gate(
    path: Path,
    result: GateResult,
    report: GateReport,
    learnt_from: GateData,
    *,
    model: ModelConfig,
    mixture: ResolvedMixture,
    config: GateConfig,
    data_sha256: str,
    licence: str | None = None,
) -> GateMetadata:
    """Write a gate with how it came to be and what it gained, whole or not at all.

    Args:
        path: `.safetensors`; its folder is made.
        result: from `train_gate`.
        report: from `report_gate`.
        learnt_from: what it was trained on.
        model: that it was trained on, and is for.
        mixture: whose rows it was trained with.
        config: that it was trained with.
        data_sha256: of the files it was trained on and judged by.
        licence: an SPDX name, or words.

    Raises:
        FileFormatError: it cannot be written.
    """
    training = asdict(config) | {
        "mixture": mixture.canonical,
        "epochs_run": result.epochs,
        "documents": learnt_from.num_documents,
        "tokens": len(learnt_from.document),
        "data_sha256": data_sha256,
        "date": datetime.now(UTC).date().isoformat(),
        "held_out": _rounded(asdict(report)),
    }
    metadata = GateMetadata(
        base_name=model.name,
        base_shape=model.shape_text(),
        base_sha256=model.fingerprint,
        states={state.name: state.sha256 for state in mixture.states if state is not None},
        training=training,
        licence=licence,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save(result.tensors, metadata=metadata.to_strings()))
    except OSError as exc:
        raise FileFormatError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    return metadata


def _rounded(value: object) -> object:
    """Return `value` with every float in it at 5 digits; JSON has no infinite ones: None."""
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
