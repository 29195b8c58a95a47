"""The folder of a state library: state files, `mixtures.toml` and `gates`, read into one snapshot.

A bad file or table spoils only its own name: it becomes a `Problem`. That of a gate is called
`gates/<name>`, as gates have names of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mrss_provider.engine.gate_file import GATE_SUFFIX, GATES_FOLDER, load_gate
from mrss_provider.engine.gates.learned import Learned
from mrss_provider.engine.mixtures_file import MIXTURES_FILE, NamedMixture, read_mixtures
from mrss_provider.errors import ConfigError, InvalidRequestError, MRSSError, StateFileError
from mrss_provider.mixture import BASE, Mixture, Term, check_name, parse_mixture
from mrss_provider.model import TunedState, load_tuned_state
from mrss_provider.sampling_params import SamplingOrder

if TYPE_CHECKING:
    from mrss_provider.model import ModelConfig

STATE_SUFFIXES = (".safetensors", ".pth", ".st")

ADDED_FOLDER = "added"
"""Inside the folder of states: those that a server was given while it ran."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file or an entry of `mixtures.toml`; naming `name` raises `error`."""

    name: str
    path: Path
    error: MRSSError


@dataclass(frozen=True)
class SamplingDefaults:
    """What requests for a name leave unsaid; None leaves it to the model's card."""

    temperature: float | None = None
    top_p: float | None = None
    sampling_order: SamplingOrder | None = None


@dataclass(frozen=True)
class Entries:
    """One consistent view of what is loaded; never changed, only replaced.

    Attributes:
        created: Unix time of each state and mixture.
        sampling: of single states that have defaults of their own.
        view: what people call the model.
    """

    states: Mapping[str, TunedState] = field(default_factory=dict)
    mixtures: Mapping[str, NamedMixture] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    created: Mapping[str, int] = field(default_factory=dict)
    gates: Mapping[str, Learned] = field(default_factory=dict)
    sampling: Mapping[str, SamplingDefaults] = field(default_factory=dict)
    view: str = ""

    @property
    def names(self) -> list[str]:
        return [BASE, *sorted(self.states), *sorted(self.mixtures)]

    @cached_property
    def display_names(self) -> Mapping[str, str]:
        """What people call a name, for those that have such a name."""
        shown = {name: state.metadata.display_name or "" for name, state in self.states.items()}
        shown |= {name: mixture.display_name for name, mixture in self.mixtures.items()}
        return {name: text for name, text in shown.items() if text}

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """What else the names may be called -> name: display names, and RWKV-Infer's ids."""
        known = {text: name for name, text in sorted(self.display_names.items())}
        ids = {f"{self.view} {text}": name for text, name in known.items()}
        ids |= {f"{self.view} {name}": name for name in self.names}
        names = set(self.names)
        aliases = {self.view: BASE, **ids, **known}
        # What people call a state never takes the meaning of a name or a mixture that is typed.
        return {k: v for k, v in aliases.items() if k not in names and not _is_compound(k)}


def _is_compound(text: str) -> bool:
    """Tell whether a typed name has a meaning that its terms give it: `a+b`, `a~linear`."""
    try:
        return parse_mixture(text) != Mixture((Term(text),))
    except InvalidRequestError:
        return False


def load_folder(folder: Path, model_config: ModelConfig, *, strict: bool) -> Entries:
    """Read every state file, `mixtures.toml` and every gate of a folder.

    Raises:
        ConfigError: there is no such folder, or it cannot be read.
    """
    try:
        if not folder.is_dir():
            raise ConfigError(
                f"the folder of states {str(folder)!r} does not exist", param="states"
            )
        return _load_files(folder, model_config, strict=strict)
    except OSError as exc:
        raise ConfigError(
            f"the folder of states {str(folder)!r} cannot be read: {exc.strerror}: {exc.filename}",
            param="states",
        ) from exc


def _load_files(folder: Path, model_config: ModelConfig, *, strict: bool) -> Entries:
    states: dict[str, TunedState] = {}
    created: dict[str, int] = {}
    problems: list[Problem] = []
    by_name: dict[str, list[Path]] = {}
    for path in state_paths(folder):
        by_name.setdefault(path.stem, []).append(path)
    for name, paths in by_name.items():
        try:
            states[name] = _load_state(name, paths, model_config, strict=strict)
            created[name] = int(paths[0].stat().st_mtime)
        except MRSSError as exc:
            problems.append(Problem(name, paths[0], exc))
    mixtures_path = folder / MIXTURES_FILE
    mixtures, bad = read_mixtures(mixtures_path)
    gates, bad_gates = _load_gates(folder / GATES_FOLDER, model_config)
    for name in list(mixtures):
        if fault := _fault_of_mixture(name, mixtures, by_name, states):
            bad[name] = ConfigError(f"{MIXTURES_FILE}, [{name}]: {fault}", param="terms")
        elif fault := fault_of_gate(mixtures[name], gates):
            bad[name] = ConfigError(f"{MIXTURES_FILE}, [{name}]: {fault}", param="gate")
    for name, error in bad.items():
        mixtures.pop(name, None)
        problems.append(Problem(name, mixtures_path, error))
    created |= {name: int(mixtures_path.stat().st_mtime) for name in mixtures}
    return Entries(states, mixtures, (*problems, *bad_gates), created, gates)


def state_paths(folder: Path) -> list[Path]:
    """Return the state files of a folder, by name, then those that a server has added."""
    places = [place for place in (folder, folder / ADDED_FOLDER) if place.is_dir()]
    files = [path for place in places for path in sorted(place.iterdir())]
    return [path for path in files if path.suffix in STATE_SUFFIXES and path.is_file()]


def problem_of_gate(name: str) -> str:
    """Return what a `Problem` with the gate `name` is called."""
    return f"{GATES_FOLDER}/{name}"


def fault_of_gate(mixture: NamedMixture, gates: Collection[str]) -> str | None:
    """Return what is wrong with a mixture's gate in view of its terms and of the trained gates."""
    parameters = mixture.gate.parameters if mixture.gate is not None else {}
    file, points = parameters.get("file"), parameters.get("points", ())
    if file is not None and file not in gates:
        return f"the trained gate {file!r} does not exist or cannot be loaded"
    terms = [term.name for term in mixture.terms]
    assert isinstance(points, tuple)
    for name, _ in points:
        if name not in terms:
            return f"the schedule has points for {name!r}, which is none of the terms"
    return None


def _load_gates(
    folder: Path, model_config: ModelConfig
) -> tuple[dict[str, Learned], list[Problem]]:
    gates: dict[str, Learned] = {}
    problems: list[Problem] = []
    # Not glob, which takes a folder that cannot be read for an empty one.
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in paths:
        if path.suffix != GATE_SUFFIX:
            continue
        try:
            check_name(path.stem, "gate")
            gates[path.stem] = load_gate(path, model_config, name=path.stem)
        except MRSSError as exc:
            problems.append(Problem(problem_of_gate(path.stem), path, exc))
    return gates, problems


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
        raise StateFileError(f"{paths[0].name} cannot be read: {exc.strerror or exc}") from exc


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
