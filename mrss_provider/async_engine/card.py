"""card.toml: what a model folder says about its model."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mrss_provider.errors import ConfigError, InvalidRequestError
from mrss_provider.sampling_params import SamplingParams

CARD_FILE = "card.toml"


@dataclass(frozen=True)
class Card:
    """Defaults of one model; a request's own values come first.

    Attributes:
        template: chat template by name, or a `.jinja` file beside the card; None leaves it to the
            model's name.
        temperature: default; None leaves it to the engine's.
        top_p: default; None leaves it to the engine's.
        stop: strings that end a chat's answer; None takes the template's.
        name: what `@model` says; empty takes the folder's.
        description: one line for people.
        licence: of the weights, for people.
        context_length: tokens that the model was trained on, for people; no limit of ours.
    """

    template: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] | None = None
    name: str = ""
    description: str = ""
    licence: str = ""
    context_length: int = 0


def read_card(model: Path) -> Card:
    """Read the card beside or inside `model`; a model without one gets the defaults.

    Raises:
        ConfigError: a malformed card.
    """
    path = model_folder(model) / CARD_FILE
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return Card()
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"cannot read {path} ({exc})") from exc
    known = {field.name for field in fields(Card)}
    for key in raw:
        if key not in known:
            raise ConfigError(f"{path}: {key!r} is no key of a card; known are {sorted(known)}")
    return _checked(path, raw)


def model_folder(model: Path) -> Path:
    """Return the folder that a model's other files are in."""
    return model if model.is_dir() else model.parent


def _checked(path: Path, raw: dict[str, Any]) -> Card:
    for key in ("template", "name", "description", "licence"):
        if not isinstance(raw.get(key, ""), str):
            raise ConfigError(f"{path}: {key} must be a string, got {raw[key]!r}")
    if type(raw.get("context_length", 0)) is not int:
        raise ConfigError(
            f"{path}: context_length must be an integer, got {raw['context_length']!r}"
        )
    stop = raw.get("stop")
    if stop is not None and not isinstance(stop, list):
        raise ConfigError(f"{path}: stop must be a list of strings, got {stop!r}")
    values = {**raw, "stop": None if stop is None else tuple(stop)}
    try:
        SamplingParams(
            temperature=raw.get("temperature"), top_p=raw.get("top_p"), stop=tuple(stop or ())
        )
    except InvalidRequestError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return Card(**values)
