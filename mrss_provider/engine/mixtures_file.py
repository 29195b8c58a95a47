"""`mixtures.toml`: named mixtures, one table each.

    [story]
    terms = "knowledge+tone:0.4"    # names and weights, as in a typed name
    merge = "delta"                 # as after `~` in a name; optional, as the rest
    gate = {name = "novelty", tau = 0.1}    # or "novelty:0.1"
    cut = 0.1
    reinject = "turn"               # states are given anew at turns of the user's; or "never"
    temperature = 0.9
    top_p = 0.7
    sampling_order = "openai"
    template = "g1"                 # chat template, where the states' or the model's is not it
    description = "Facts, told warmly"
    display_name = "Story teller"   # for people, who may ask for it by this name too

Keys are strict. A bad table spoils only its own name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from mrss_provider.backend import Reinject
from mrss_provider.chat import TEMPLATES
from mrss_provider.engine.merges import make_merge
from mrss_provider.errors import ConfigError, InvalidRequestError
from mrss_provider.mixture import (
    DEFAULT_MERGE,
    Kind,
    Method,
    Term,
    check_name,
    check_signs,
    parse_method,
    parse_mixture,
)
from mrss_provider.sampling_params import SamplingOrder, SamplingParams

MIXTURES_FILE = "mixtures.toml"

_SAMPLING_KEYS = ("temperature", "top_p", "sampling_order")
_KEYS = (
    *("terms", "merge", "gate", "cut", "reinject"),
    *_SAMPLING_KEYS,
    *("template", "description", "display_name"),
)


@dataclass(frozen=True)
class NamedMixture:
    """One table of the file. None is "not said": the default of the request takes its place.

    `keeps_states` is in no file: whether its terms stay what they were when one of their names gets
    another state.
    """

    terms: tuple[Term, ...]
    merge: Method | None = None
    gate: Method | None = None
    cut: float | None = None
    reinject: Reinject | None = None
    temperature: float | None = None
    top_p: float | None = None
    sampling_order: SamplingOrder | None = None
    template: str | None = None
    description: str = ""
    display_name: str = ""
    keeps_states: bool = False


def read_mixtures(path: Path) -> tuple[dict[str, NamedMixture], dict[str, ConfigError]]:
    """Read a file: the good tables by name, and what is wrong with the bad ones.

    Whether the terms' states exist is not known here. A file that cannot be read at all is one
    error under the file's own name. A file that does not exist is empty.
    """
    if not path.exists():
        return {}, {}
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as exc:
        # TOMLDecodeError and UnicodeDecodeError are ValueErrors; brackets may be nested too deeply.
        return {}, {path.name: ConfigError(f"{path.name} cannot be read: {exc}")}
    good: dict[str, NamedMixture] = {}
    bad: dict[str, ConfigError] = {}
    for name, table in tables.items():
        try:
            check_name(name, "mixture")
            good[name] = parse_table(table)
        except (ConfigError, InvalidRequestError) as exc:
            bad[name] = ConfigError(f"{path.name}, [{name}]: {exc.message}", param=exc.param)
    return good, bad


def check_cut(value: object, where: str) -> float:
    """Return a plausibility cut in [0, 1).

    Raises:
        InvalidRequestError: anything else.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 <= value < 1):  # type: ignore[operator]
        raise InvalidRequestError(f"{where} must be in [0, 1), got {value!r:.40}", param=where)
    return float(value)  # type: ignore[arg-type]


def parse_table(table: object) -> NamedMixture:
    """Read one table.

    Raises:
        ConfigError: a key or a value that it cannot have.
        InvalidRequestError: the same, of terms, merge, gate and sampling.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"a mixture is a table with the key 'terms', got {table!r:.40}")
    for key in table:
        if key not in _KEYS:
            raise ConfigError(f"unknown key {key!r}, the keys are {', '.join(_KEYS)}", param=key)
    terms, merge = _parse_terms(table), _parse_method(table, "merge")
    check_signs(terms, merge or DEFAULT_MERGE, "terms")
    sampling = SamplingParams(**{key: table[key] for key in _SAMPLING_KEYS if key in table})
    return NamedMixture(
        terms=terms,
        merge=merge,
        gate=_parse_method(table, "gate"),
        cut=_parse_cut(table, merge or DEFAULT_MERGE),
        reinject=_parse_reinject(table),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        sampling_order=sampling.sampling_order,
        template=_parse_template(table),
        description=_text(table, "description", ""),
        display_name=_text(table, "display_name", ""),
    )


def _parse_terms(table: Mapping[str, Any]) -> tuple[Term, ...]:
    text = _text(table, "terms", None)
    mixture = parse_mixture(text)
    if mixture.model or mixture.merge or mixture.gate:
        raise ConfigError(
            f"terms are names and weights only (merge and gate are keys of their own), "
            f"got {text!r:.200}",
            param="terms",
        )
    return mixture.terms


def _parse_method(table: Mapping[str, Any], key: Kind) -> Method | None:
    return parse_method(table[key], key, key) if key in table else None


def _parse_cut(table: Mapping[str, Any], merge: Method) -> float | None:
    if "cut" not in table:
        return None
    cut = check_cut(table["cut"], "cut")
    if cut > 0 and not make_merge(merge).has_cut:
        raise ConfigError(f"the merge rule {merge.text!r} has no cut, remove it", param="cut")
    return cut


def _parse_reinject(table: Mapping[str, Any]) -> Reinject | None:
    value = table.get("reinject")
    if value is not None and value not in get_args(Reinject):
        raise ConfigError(
            f"reinject must be one of {', '.join(get_args(Reinject))}, got {value!r:.40}",
            param="reinject",
        )
    return cast(Reinject | None, value)


def _parse_template(table: Mapping[str, Any]) -> str | None:
    if "template" not in table:
        return None
    name = _text(table, "template", None)
    if name not in TEMPLATES:
        raise ConfigError(
            f"template must be one of {', '.join(TEMPLATES)}, got {name!r:.40}", param="template"
        )
    return name


def _text(table: Mapping[str, Any], key: str, default: str | None) -> str:
    value = table.get(key, default)
    if not isinstance(value, str):
        raise ConfigError(f"{key} must be a string, got {value!r:.40}", param=key)
    return value
