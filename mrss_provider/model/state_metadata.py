"""What a state file says of itself: strings in safetensors metadata, a dataclass in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from mrss_provider.chat import TEMPLATES
from mrss_provider.errors import StateFileError
from mrss_provider.model.config import ModelConfig

FORMAT = "mrss-state"
VERSION = "1"

Orientation = Literal["vk", "kv"]
LossOn = Literal["all", "answer"]
ORIENTATIONS: tuple[Orientation, ...] = get_args(Orientation)

_BOOLS = {"true": True, "false": False}


@dataclass(frozen=True)
class StateMetadata:
    """What a state file says of itself; None and defaults where it says nothing.

    Attributes:
        group: what it is about: knowledge, tone, task, ...; gates choose within a group.
        loss_on: which tokens it was tuned on.
        local: tuned to leave other text as it was.
        bos: tuned with a leading token 0, which a row then reads first.
        orientation: of the file, `[H, V, K]` or `[H, K, V]`.
        base_name: the model that it was tuned on.
        base_shape: that model's `ModelConfig.shape_text`.
        base_sha256: that model's fingerprint.
        licence: an SPDX name, or words.
        training: how it was made; anything that JSON holds.
        display_name: for people; may have spaces.
        template: chat template by name, where it was tuned on another one than its model's.
    """

    group: str | None = None
    loss_on: LossOn | None = None
    local: bool = False
    bos: bool = False
    orientation: Orientation | None = None
    base_name: str | None = None
    base_shape: str | None = None
    base_sha256: str | None = None
    licence: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    display_name: str | None = None
    template: str | None = None

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], path: Path) -> StateMetadata:
        """Read safetensors metadata; strings of another format, or none, give the defaults.

        Raises:
            StateFileError: our format with a value that it does not allow.
        """
        if strings.get("format") != FORMAT:
            return cls()
        if strings.get("version") != VERSION:
            raise StateFileError(
                f"{path.name} has version {strings.get('version')!r} of the state format; this "
                f"program reads {VERSION!r}"
            )
        base = _json(strings, "base_model", path)
        return cls(
            group=strings.get("group"),
            loss_on=_choice(strings, "loss_on", get_args(LossOn), path),
            local=_BOOLS[_choice(strings, "local", tuple(_BOOLS), path) or "false"],
            bos=_BOOLS[_choice(strings, "bos", tuple(_BOOLS), path) or "false"],
            orientation=_choice(strings, "orientation", ORIENTATIONS, path),
            base_name=_text(base, "name"),
            base_shape=_text(base, "shape"),
            base_sha256=_text(base, "sha256"),
            licence=strings.get("licence"),
            training=_json(strings, "training", path),
            display_name=strings.get("display_name"),
            template=_choice(strings, "template", tuple(TEMPLATES), path),
        )

    def with_base(self, config: ModelConfig) -> StateMetadata:
        """Return this metadata for a state that was tuned on `config`'s weights."""
        return replace(
            self,
            base_name=config.name,
            base_shape=config.shape_text(),
            base_sha256=config.fingerprint,
        )

    def to_strings(self, config: ModelConfig) -> dict[str, str]:
        """Return safetensors metadata for a state of the shape of `config`'s model.

        Of the base only the shape is taken from `config`: which weights a state was tuned on is
        known to whoever tuned it, and left out if this metadata does not say (see `with_base`).
        """
        told = {
            "name": self.base_name,
            "shape": self.base_shape or config.shape_text(),
            "sha256": self.base_sha256,
        }
        base = {key: value for key, value in told.items() if value is not None}
        strings = {
            "format": FORMAT,
            "version": VERSION,
            "base_model": json.dumps(base),
            "orientation": self.orientation or "vk",
            "local": str(self.local).lower(),
            "bos": str(self.bos).lower(),
            "training": json.dumps(dict(self.training), sort_keys=True),
        }
        texts = {
            "group": self.group,
            "loss_on": self.loss_on,
            "licence": self.licence,
            "display_name": self.display_name,
            "template": self.template,
        }
        return strings | {key: text for key, text in texts.items() if text is not None}


def _choice(strings: Mapping[str, str], key: str, allowed: tuple[Any, ...], path: Path) -> Any:
    value = strings.get(key)
    if value is not None and value not in allowed:
        raise StateFileError(
            f"{path.name}: {key} in its metadata must be one of {', '.join(allowed)}, got {value!r}"
        )
    return value


def _json(strings: Mapping[str, str], key: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(strings.get(key, "{}"))
    except ValueError as exc:
        raise StateFileError(f"{path.name}: {key} in its metadata is not JSON") from exc
    if not isinstance(value, dict):
        raise StateFileError(f"{path.name}: {key} in its metadata must be a JSON object")
    return value


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    return value if isinstance(value, str) else None
