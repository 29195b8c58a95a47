"""The folder of a state library: state files and `mixtures.toml`, read into one snapshot.

A bad file or table spoils only its own name: it becomes a `Problem`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mrss_provider.engine.mixtures_file import MIXTURES_FILE, NamedMixture, read_mixtures
from mrss_provider.errors import ConfigError, MRSSError, StateFileError
from mrss_provider.mixture import BASE, check_name
from mrss_provider.model import TunedState, load_tuned_state

if TYPE_CHECKING:
    from mrss_provider.model import ModelConfig

STATE_SUFFIXES = (".safetensors", ".pth", ".st")


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file or an entry of `mixtures.toml`; naming `name` raises `error`."""

    name: str
    path: Path
    error: MRSSError


@dataclass(frozen=True)
class Entries:
    """One consistent view of what is loaded; never changed, only replaced."""

    states: Mapping[str, TunedState] = field(default_factory=dict)
    mixtures: Mapping[str, NamedMixture] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    created: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [BASE, *sorted(self.states), *sorted(self.mixtures)]


def load_folder(folder: Path, model_config: ModelConfig, *, strict: bool) -> Entries:
    """Read every state file and `mixtures.toml` of a folder.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"the folder of states {str(folder)!r} does not exist", param="states")
    states: dict[str, TunedState] = {}
    created: dict[str, int] = {}
    problems: list[Problem] = []
    by_name: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in STATE_SUFFIXES and path.is_file():
            by_name.setdefault(path.stem, []).append(path)
    for name, paths in by_name.items():
        try:
            states[name] = _load_state(name, paths, model_config, strict=strict)
            created[name] = int(paths[0].stat().st_mtime)
        except MRSSError as exc:
            problems.append(Problem(name, paths[0], exc))
    mixtures_path = folder / MIXTURES_FILE
    mixtures, bad = read_mixtures(mixtures_path)
    for name in list(mixtures):
        fault = _fault_of_mixture(name, mixtures, by_name, states)
        if fault:
            bad[name] = ConfigError(f"{MIXTURES_FILE}, [{name}]: {fault}", param="terms")
    for name, error in bad.items():
        mixtures.pop(name, None)
        problems.append(Problem(name, mixtures_path, error))
    created |= {name: int(mixtures_path.stat().st_mtime) for name in mixtures}
    return Entries(states, mixtures, tuple(problems), created)


def _load_state(
    name: str, paths: Sequence[Path], model_config: ModelConfig, *, strict: bool
) -> TunedState:
    check_name(name)
    if len(paths) > 1:
        files = " and ".join(path.name for path in paths)
        raise StateFileError(f"the state {name!r} has more than one file, {files}; keep one")
    try:
        return load_tuned_state(paths[0], model_config, name=name, strict=strict)
    except OSError as exc:
        raise StateFileError(f"{paths[0].name} cannot be read: {exc}") from exc


def _fault_of_mixture(
    name: str,
    mixtures: Mapping[str, NamedMixture],
    files: Mapping[str, object],
    states: Mapping[str, TunedState],
) -> str | None:
    if name in files:
        return f"a state file has the name {name!r} too, rename one of them"
    for term in mixtures[name].terms:
        if term.name in mixtures and term.name not in files:
            return f"the term {term.name!r} is a mixture, terms are states; write its terms instead"
        if term.name != BASE and term.name not in states:
            what = "cannot be loaded" if term.name in files else "does not exist"
            return f"the state {term.name!r} {what}"
    return None
