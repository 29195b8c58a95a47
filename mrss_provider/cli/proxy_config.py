"""The LiteLLM proxy's configuration: which one is meant, and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mrss_provider.cli.output import CommandError
from mrss_provider.client import parse_address
from mrss_provider.config import BUNDLED_STATES
from mrss_provider.errors import MRSSError
from mrss_provider.mixture import check_name, parse_mixture

_FILE = "proxy_config.yaml"
BUNDLED_PROXY_CONFIG = BUNDLED_STATES.parent / _FILE
_HANDLER = "mrss_provider.handler"
_FROM_ENVIRONMENT = "os.environ/"


def find_proxy_config(path: Path | None) -> Path:
    """Return `path`, else `proxy_config.yaml` in this folder, else the one that came with us.

    Raises:
        CommandError: a path that is no file.
    """
    if path is None:
        here = Path(_FILE)
        return here if here.is_file() else BUNDLED_PROXY_CONFIG
    if not path.is_file():
        raise CommandError(f"the proxy's configuration {path} does not exist")
    return path


def examine(path: Path) -> list[str]:
    """Return what is wrong with a configuration, as LiteLLM would read it; [] if nothing is.

    Raises:
        CommandError: not a YAML file with a table at its top.
    """
    config = read_proxy_config(path)
    return [*_handler_problems(config, path), *_entry_problems(config)]


def read_proxy_config(path: Path) -> Mapping[str, Any]:
    """Return what is in the file.

    Raises:
        CommandError: not a YAML file with a table at its top, or not with tables in it where
            LiteLLM has some.
    """
    # YAML comes with LiteLLM.
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise CommandError(f"{path} is no YAML: {' '.join(str(exc).split())}") from exc
    if not isinstance(config, Mapping):
        raise CommandError(f"{path} has no table at its top, LiteLLM needs one with model_list")
    _check_form(config, path)
    return config


def _check_form(config: Mapping[str, Any], path: Path) -> None:
    """Refuse what is looked into and is no table, or no list of tables."""
    settings = _table(config, "litellm_settings", path)
    _table(config, "general_settings", path)
    _tables(settings, "custom_provider_map", path)
    for entry in _tables(config, "model_list", path):
        _table(entry, "litellm_params", path)


def _table(config: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise CommandError(f"{path}: {key} must be a table, got {found!r:.40}")
    return found


def _tables(config: Mapping[str, Any], key: str, path: Path) -> list[Mapping[str, Any]]:
    found = config.get(key) or []
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise CommandError(f"{path}: {key} must be a list of tables, got {found!r:.40}")
    return found


def _handler_problems(config: Mapping[str, Any], path: Path) -> list[str]:
    settings = config.get("litellm_settings") or {}
    entries = settings.get("custom_provider_map") or []
    handlers = [e.get("custom_handler") for e in entries if e.get("provider") == "mrss"]
    if not handlers:
        return [
            "litellm_settings.custom_provider_map has no provider mrss; add one with "
            f"custom_handler: {_HANDLER}"
        ]
    if handlers != [_HANDLER]:
        return [f"the custom_handler of mrss must be {_HANDLER}, once, got {handlers}"]
    shadow = path.parent / "mrss_provider.py"
    if shadow.exists():
        return [f"{shadow} stands beside the configuration: LiteLLM would load it as the provider"]
    return _import_problems()


def _import_problems() -> list[str]:
    # Else its import asks the network for prices, and waits where there is none.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    from litellm import CustomLLM

    from mrss_provider import handler

    return [] if isinstance(handler, CustomLLM) else [f"{_HANDLER} is no LiteLLM handler"]


def _entry_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for entry in config.get("model_list") or []:
        params = entry.get("litellm_params") or {}
        model = str(params.get("model", ""))
        name = model.removeprefix("mrss/")
        if name == model:
            continue
        if "*" not in name:
            yield from _name_problems(name, entry)
        yield from _address_problems(model, params)


def _name_problems(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    try:
        for term in parse_mixture(name).terms:
            if term.name != "base":
                check_name(term.name)
    except MRSSError as exc:
        yield f"model mrss/{name}: {exc}"
    if "," in str(entry.get("model_name")):
        yield f"model_name {entry['model_name']}: LiteLLM splits names at commas"


def _address_problems(model: str, params: Mapping[str, Any]) -> Iterator[str]:
    for key in ("api_base", "base_url"):
        address = params.get(key)
        if isinstance(address, str) and address.startswith(_FROM_ENVIRONMENT):
            # A variable that is not set here may be where the proxy runs.
            address = os.environ.get(address.removeprefix(_FROM_ENVIRONMENT))
        if not address:
            continue
        try:
            parse_address(str(address))
        except MRSSError as exc:
            yield f"{key} of {model}: {exc}"
