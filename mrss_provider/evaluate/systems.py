"""The systems that an evaluation compares: names of mixtures, the one-row baselines among them.

Every system is a model name of one engine, so what is measured is what is served.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture import BASE, check_name
from mrss_provider.model import ModelConfig, load_tuned_state, save_tuned_state
from mrss_provider.model.state_metadata import StateMetadata
from mrss_provider.model.tuned_state import TunedState

DEFAULT = "mixture-default"
DEFAULT_METHOD = "delta~novelty"
RATIOS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
"""What the weaker state may weigh beside the stronger one."""

MERGES = ("linear", "geometric", "power", "product", "delta")
GATES = ("fixed", "confidence", "novelty")
CURVES = ("linear~fixed", "geometric~fixed", "delta~fixed", "delta~novelty")
"""What the curve over weights is drawn of."""

# Made of the pair: what its two states are multiplied with before they are added.
_SUMS = {"average": 0.5, "sum": 1.0, "sum-0.7": 0.7}
_TAKEN = {*_SUMS, BASE, DEFAULT}
_SUFFIXES = (".safetensors", ".pth", ".st")


@dataclass(frozen=True)
class System:
    """One way to answer.

    Attributes:
        name: in the report.
        model: the mixture's name, for the engine.
        is_baseline: a single row that no joint data made: what mixing must beat.
        trained_on_both: it saw texts with both facts and manner.
        is_hinted: the question comes with the fact and the manner in a system message.
    """

    name: str
    model: str
    is_baseline: bool = False
    trained_on_both: bool = False
    is_hinted: bool = False


@dataclass(frozen=True)
class Pair:
    """Two states that were tuned apart, and one-row baselines of the same data.

    Attributes:
        folder: where the files are, named as below.
        knowledge: name of the state that knows.
        tone: name of the state that has the manner.
    """

    folder: Path
    knowledge: str
    tone: str


def compared(
    pair: Pair, extra: Sequence[str], trained_gates: Sequence[str] = (), *, is_quick: bool
) -> list[System]:
    """Return the systems of one pair, the default first.

    Args:
        pair: the states.
        extra: further one-row states that are there: `union`, `sequential-*` and such are
            baselines; those that begin with `joint` were trained on both.
        trained_gates: gates that were trained for these states, on texts that need both.
        is_quick: leave out all but the ones that a first look needs.
    """
    both = f"{pair.knowledge}+{pair.tone}"
    systems = [
        System(DEFAULT, both),
        System("base", BASE, is_baseline=True),
        System("knowledge alone", pair.knowledge, is_baseline=True),
        System("tone alone", pair.tone, is_baseline=True),
        *[System(name, name, is_baseline=True) for name in _SUMS],
        System("prompt only", BASE, is_hinted=True),
    ]
    for name in extra:
        is_joint = name.startswith("joint")
        systems.append(System(name, name, is_baseline=not is_joint, trained_on_both=is_joint))
    merges, gates = (("linear", "delta"), ("fixed", "novelty")) if is_quick else (MERGES, GATES)
    for merge in merges:
        for gate in gates:
            if f"{merge}~{gate}" == DEFAULT_METHOD:
                continue
            name = f"{merge}, {gate}"
            systems.append(System(name, f"{both}~{merge}~{gate}"))
    for gate in () if is_quick else trained_gates:
        which = f":{gate}" if len(trained_gates) > 1 else ""
        for merge in ("linear", "delta"):
            model = f"{both}~{merge}~learned:{gate}"
            systems.append(System(f"{merge}, learned{which}", model, trained_on_both=True))
    return systems


def fixed_weights(pair: Pair, method: str) -> Iterator[tuple[str, str]]:
    """Yield (title, name) of mixtures from little knowledge to much, such as `.2 : 1`."""
    for ratio in RATIOS:
        yield f"{ratio:g} : 1", f"{pair.knowledge}:{ratio}+{pair.tone}~{method}"
    for ratio in reversed(RATIOS[:-1]):
        yield f"1 : {ratio:g}", f"{pair.knowledge}+{pair.tone}:{ratio}~{method}"


def make_folder(pair: Pair, baselines: Path | None, into: Path, config: ModelConfig) -> list[str]:
    """Put the pair, its sums and the baselines into one folder of states.

    Args:
        pair: the states; more that are in their folder are left out.
        baselines: a folder of further one-row states; None: none.
        into: an empty folder.
        config: of the model that the states are for.

    Returns:
        The baselines' names.

    Raises:
        InvalidRequestError: a state is not there, or a baseline's name is taken.
        StateFileError: a file that is no state of this model.
    """
    if pair.knowledge == pair.tone:
        raise InvalidRequestError(f"--knowledge and --tone must be two states, got {pair.tone!r}")
    files = {name: _file_of(pair.folder, name) for name in (pair.knowledge, pair.tone)}
    for name in files:
        if name in _TAKEN:
            raise InvalidRequestError(f"the name {name!r} is that of a baseline; rename the state")
    extra: list[str] = []
    for path in _files_in(baselines) if baselines is not None else ():
        if path.stem in files or path.stem in _TAKEN:
            raise InvalidRequestError(f"{path}: the name {path.stem!r} is taken; rename the file")
        extra.append(check_name(path.stem))
        files[path.stem] = path
    for name, path in files.items():
        shutil.copyfile(path, into / f"{name}{path.suffix}")
    pairs = (pair.knowledge, pair.tone)
    knows, speaks = (load_tuned_state(files[name], config, name=name) for name in pairs)
    for name, share in _SUMS.items():
        state = _add(knows, speaks, share, name)
        save_tuned_state(into / f"{name}.safetensors", state, config)
    gates = pair.folder / "gates"
    if gates.is_dir():
        shutil.copytree(gates, into / "gates")
    return extra


def digest_of(folder: Path) -> str:
    """Return the SHA-256 of what was put into a folder by `make_folder`."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        # Sums follow from the pair, and safetensors writes metadata in an order of its own.
        if file.is_file() and file.stem not in _SUMS:
            name = str(file.relative_to(folder))
            digest.update(json.dumps([name, file.stat().st_size]).encode() + file.read_bytes())
    return digest.hexdigest()


def _files_in(baselines: Path) -> list[Path]:
    found = sorted(p for suffix in _SUFFIXES for p in baselines.glob(f"*{suffix}"))
    if not found:
        raise InvalidRequestError(f"--baselines: there are no states in {baselines}")
    return found


def _file_of(folder: Path, name: str) -> Path:
    for suffix in _SUFFIXES:
        if (path := folder / f"{name}{suffix}").is_file():
            return path
    if not folder.is_dir():
        raise InvalidRequestError(f"the folder of states {folder} does not exist or is none")
    raise InvalidRequestError(f"{folder} has no state {name!r}; see `mrss states list`")


def _add(one: TunedState, other: TunedState, share: float, name: str) -> TunedState:
    """Return `share * (one + other)`; offsets and shifts are left out."""
    metadata = StateMetadata(
        group="baseline",
        base_name=one.metadata.base_name,
        base_shape=one.metadata.base_shape,
        base_sha256=one.metadata.base_sha256,
        training={"sum_of": [one.name, other.name], "share": share},
    )
    return TunedState(name, share * (one.wkv + other.wkv), metadata=metadata)
