"""Files of learned gates: `<states>/gates/<name>.safetensors`, read and checked for a model.

Tensors, fp32: `features.mean` [5], `features.scale` [5], `hidden.weight` [16, 10],
`hidden.bias` [16], `score.weight` [16]. The metadata is `GateMetadata`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrss_provider.engine.gate_metadata import GateMetadata
from mrss_provider.engine.gates.learned import Learned
from mrss_provider.engine.gating_layer import FEATURES, HIDDEN, fold
from mrss_provider.errors import FileFormatError
from mrss_provider.model.checkpoint import read_tensors

if TYPE_CHECKING:
    from mrss_provider.model import ModelConfig

GATES_FOLDER = "gates"
"""Inside the folder of states."""

GATE_SUFFIX = ".safetensors"

SHAPES: Mapping[str, tuple[int, ...]] = {
    "features.mean": (len(FEATURES),),
    "features.scale": (len(FEATURES),),
    "hidden.weight": (HIDDEN, 2 * len(FEATURES)),
    "hidden.bias": (HIDDEN,),
    "score.weight": (HIDDEN,),
}
"""The tensors of a file."""


def load_gate(path: Path, config: ModelConfig, *, name: str) -> Learned:
    """Read a gate for a model.

    Args:
        path: `.safetensors`.
        config: of the loaded model.
        name: what requests will call it.

    Raises:
        FileFormatError: not a gate, a damaged one, or one that was trained on another model.
    """
    tensors, strings = read_tensors(path, FileFormatError)
    metadata = GateMetadata.from_strings(strings, path)
    if metadata.base_sha256 != config.fingerprint:
        raise FileFormatError(
            f"the gate {name!r} was trained on {metadata.base_name} ({metadata.base_shape}, sha256 "
            f"{metadata.base_sha256[:12]}), and the loaded model is {config.name} "
            f"({config.shape_text()}, sha256 {config.fingerprint[:12]}); train one on it with "
            f"`mrss gate train`"
        )
    _check_tensors(tensors, path)
    layer = fold(*(tensors[key].float() for key in SHAPES))
    if not torch.isfinite(layer.table).all():
        raise FileFormatError(f"{path.name}: features.scale is too small for these weights")
    return Learned(name, layer, metadata)


def _check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != dict(SHAPES):
        raise FileFormatError(
            f"{path.name} holds {found or 'nothing'}; a gate holds {dict(SHAPES)}"
        )
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FileFormatError(f"{path.name}: {key} holds NaN or infinite values")
    if not (tensors["features.scale"] > 0).all():
        raise FileFormatError(f"{path.name}: features.scale must be above 0")
