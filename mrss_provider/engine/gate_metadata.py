"""What a gate file says of itself: strings in safetensors metadata, a dataclass in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mrss_provider.engine.gating_layer import FEATURES, HIDDEN
from mrss_provider.errors import FileFormatError

FORMAT = "mrss-gate"
VERSION = "1"


@dataclass(frozen=True)
class GateMetadata:
    """What a gate file says of itself.

    Attributes:
        base_name: the model that it was trained on.
        base_shape: that model's `ModelConfig.shape_text`.
        base_sha256: that model's fingerprint.
        states: name -> sha256 of the states it was trained with; it may be used with others.
        training: how it came to be and what it gained on held-out text; anything that JSON holds.
        licence: an SPDX name, or words.
    """

    base_name: str
    base_shape: str
    base_sha256: str
    states: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None

    def to_strings(self) -> dict[str, str]:
        """Return safetensors metadata."""
        base = {"name": self.base_name, "shape": self.base_shape, "sha256": self.base_sha256}
        strings = {
            "format": FORMAT,
            "version": VERSION,
            "features": json.dumps(FEATURES),
            "hidden": str(HIDDEN),
            "base_model": json.dumps(base),
            "states": json.dumps(dict(self.states), sort_keys=True),
            "training": json.dumps(dict(self.training), sort_keys=True),
        }
        return strings | ({"licence": self.licence} if self.licence else {})

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], path: Path) -> GateMetadata:
        """Read safetensors metadata.

        Raises:
            FileFormatError: not a gate, or one that this program does not compute.
        """
        if strings.get("format") != FORMAT:
            raise FileFormatError(
                f"{path.name} is not a gate: its metadata must say format={FORMAT!r}, got "
                f"{strings.get('format')!r}; `mrss gate train` writes one"
            )
        wanted = {"version": VERSION, "features": json.dumps(FEATURES), "hidden": str(HIDDEN)}
        for key, value in wanted.items():
            if strings.get(key) != value:
                raise FileFormatError(
                    f"{path.name} is a gate with {key} {strings.get(key)!r}; this program computes "
                    f"{value!r}"
                )
        base = _object(strings, "base_model", path)
        known = {key: base.get(key) for key in ("name", "shape", "sha256")}
        if not all(isinstance(value, str) for value in known.values()):
            raise FileFormatError(f"{path.name} does not name its model's name, shape and sha256")
        return cls(
            base_name=str(known["name"]),
            base_shape=str(known["shape"]),
            base_sha256=str(known["sha256"]),
            states=_object(strings, "states", path),
            training=_object(strings, "training", path),
            licence=strings.get("licence"),
        )


def _object(strings: Mapping[str, str], key: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(strings.get(key, "{}"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise FileFormatError(f"{path.name}: {key} must be a JSON object")
    return value
