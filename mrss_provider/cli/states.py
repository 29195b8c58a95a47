"""`mrss states`: the folder of tuned states, seen and changed from the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mrss_provider.chat import DEFAULT_TEMPLATE, TEMPLATES
from mrss_provider.cli.output import (
    CommandError,
    answer,
    answer_json,
    note,
    quiet,
    read_text,
    table,
)
from mrss_provider.cli.terms import read_terms
from mrss_provider.config import EngineConfig
from mrss_provider.engine.library_files import state_file
from mrss_provider.engine.state_folder import state_paths
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.errors import MRSSError
from mrss_provider.mixture import BASE, Method, check_name
from mrss_provider.model import (
    Model,
    ModelConfig,
    OrientationCheck,
    StateMetadata,
    TunedState,
    average_states,
    check_orientation,
    load_model,
    load_tuned_state,
    save_tuned_state,
)
from mrss_provider.model.state_metadata import Orientation
from mrss_provider.model.weights import load_weights
from mrss_provider.tokenizer import Tokenizer, find_vocabulary

# Nats a token; below it a sample does not tell the two orientations apart.
_CLEAR_DIFFERENCE = 0.02

_SAMPLE = (
    "User: Hello! What can you tell me about this place?\n\n"
    "Assistant: Hello! It is a small town by the sea. Ask me what you want to know about it.\n\n"
)


def list_states(config: EngineConfig, as_json: bool) -> None:
    """Print every state and mixture; what cannot be used goes to stderr with its reason."""
    shape = read_config(config.model)
    library = open_library(config, shape)
    rows = [_about_state(state, shape, config.states) for state in library.states.values()]
    rows += [
        {"name": name, "kind": "mixture", "group": "", "norm": "", "base": _terms(named.terms)}
        for name, named in library.mixtures.items()
    ]
    if as_json:
        for row in rows:
            answer_json(row)
    elif rows:
        header = ("name", "kind", "group", "norm", "base")
        cells = [[_cell(row.get(key)) for key in header] for row in rows]
        answer(table([key.upper() for key in header], cells))
    for problem in library.problems:
        note(f"{problem.name} cannot be used: {problem.error}")


def show_state(config: EngineConfig, name: str) -> None:
    """Print what is known of a state or mixture.

    Raises:
        MRSSError: no such name, or a file that cannot be used.
    """
    shape = read_config(config.model)
    library = open_library(config, shape)
    if name in library.mixtures:
        named = library.mixtures[name]
        answer(f"{name}: a mixture of {_terms(named.terms)}")
        said = {k: v for k, v in vars(named).items() if k != "terms" and v not in (None, "")}
        said |= {k: v.text for k, v in said.items() if isinstance(v, Method)}
        _print_fields(said)
        return
    if name == BASE:
        raise CommandError(f"{BASE!r} is the untuned model, which has no state file to show")
    state = library.get(name)
    answer(f"{name}: a state for {shape.shape_text()}")
    metadata = {k: v for k, v in asdict(state.metadata).items() if v not in (None, {}, "")}
    offsets = {"time_offset": state.time_offset, "shift_att": state.shift_att}
    also = ", ".join(key for key, tensor in offsets.items() if tensor is not None)
    _print_fields(
        {"file": str(_path_of(config.states, name)), "sha256": state.sha256, **metadata}
        | ({"also holds": also} if also else {})
        | {"norm": _norm(state), "norm of each layer": _norms(state)}
    )


def check_states(config: EngineConfig, names: Sequence[str], text: Path | None) -> bool:
    """Score `text` with each state read both ways; return whether every state could be read.

    Raises:
        MRSSError: the model or the vocabulary cannot be read.
    """
    model = open_model(config)
    tokenizer = Tokenizer.load(config.tokenizer or find_vocabulary(config.model))
    sample = tokenizer.encode(_SAMPLE if text is None else read_text(text))
    paths = [_path_of(config.states, name) for name in names] or _all_paths(config.states)
    all_read = True
    for path in paths:
        try:
            found = check_orientation(model, path, sample)
        except MRSSError as exc:
            answer(f"FAIL  {path.stem}: {exc}")
            all_read = False
            continue
        answer(_verdict(path, found, math.log(model.config.vocab_size)))
    return all_read


def _verdict(path: Path, found: OrientationCheck, uniform: float) -> str:
    """Return what a check found; `uniform` is what guessing any token alike costs, in nats.

    Read the wrong way a state does next to nothing, so a reading is told by doing better than the
    model without it; and a text that is not guessed better than blindly tells nothing of anything.
    """
    scores = f"vk {found.nll_vk:.3f}, kv {found.nll_kv:.3f}, base {found.nll_base:.3f}"
    told = f"{path.stem}: read as {found.assumed}; nats a token on the sample: {scores}"
    best, other = sorted((found.nll_vk, found.nll_kv))
    if best > min(other, found.nll_base, uniform) - _CLEAR_DIFFERENCE:
        return (
            f"ok    {told}; it does not tell the orientations apart, give a text of the state's "
            "own kind with --text"
        )
    if found.better == found.assumed:
        return f"ok    {told}"
    return (
        f"warn  {told}; it looks like {found.better}: try a text of its own kind with --text, then "
        f"import it with --orientation {found.better}"
    )


def import_state(
    config: EngineConfig,
    file: Path,
    name: str,
    orientation: Orientation | None,
    metadata: Mapping[str, Any],
    *,
    force: bool,
) -> None:
    """Write `file` as a state `name`; `metadata` replaces what the file says of itself.

    Raises:
        MRSSError: a bad name or file.
        CommandError: a name that is taken.
    """
    if metadata.get("template", DEFAULT_TEMPLATE) not in TEMPLATES:
        raise CommandError(
            f"--template must be one of {', '.join(TEMPLATES)}, got {metadata['template']!r}"
        )
    shape = read_config(config.model)
    target = new_target(config.states, name, shape, force=force)
    state = load_tuned_state(file, shape, name=name, orientation=orientation)
    state = replace(state, metadata=replace(state.metadata, **metadata))
    save_state(target, state, shape, force=force)


def average_into(config: EngineConfig, terms: Sequence[str], name: str, *, force: bool) -> None:
    """Write the weighted average of states as a state `name`; `base` is the untuned model.

    Raises:
        MRSSError: a bad name, an unknown state, weights or states that do not fit together.
        CommandError: a name that is taken.
    """
    shape = read_config(config.model)
    target = new_target(config.states, name, shape, force=force)
    library = open_library(config, shape)
    parts = read_terms(terms, "an average", "terms")
    found = {term.name: library.get(term.name) for term in parts if term.name != BASE}
    if any(term.name == BASE for term in parts):
        found[BASE] = _base_state(config.model, shape, list(found.values()))
    states = [found[term.name] for term in parts]
    state = average_states(states, [term.weight for term in parts], name=name)
    save_state(target, state, shape, force=force)


def _base_state(model: Path, shape: ModelConfig, others: Sequence[TunedState]) -> TunedState:
    """Return the untuned model's state, as a part that changes nothing of what `others` say."""
    wkv = torch.zeros(shape.state_shape)
    inside = load_weights(model).time_state
    if inside is not None:
        wkv = (inside if shape.version == 7 else inside.mT).contiguous()
    return TunedState(BASE, wkv, metadata=others[0].metadata if others else StateMetadata())


def read_config(path: Path) -> ModelConfig:
    """Return a checkpoint's shape without loading its weights (they stay on disk, mapped).

    Raises:
        ModelFileError: not a checkpoint that we run.
    """
    weights = load_weights(path)
    return ModelConfig(
        version=weights.version,
        num_layers=weights.num_layers,
        hidden_size=weights.hidden_size,
        num_heads=weights.num_heads,
        head_size=weights.head_size,
        vocab_size=weights.vocab_size,
        ffn_size=weights.ffn_size,
        dtype=str(weights.dtype).removeprefix("torch."),
        fingerprint=weights.fingerprint,
        name=weights.name,
    )


def open_model(config: EngineConfig) -> Model:
    """Load the model as the configuration says.

    Raises:
        MRSSError: no checkpoint that we run, or no such device.
    """
    return load_model(
        config.model,
        device=config.device,
        dtype=config.dtype,
        quantize=config.quantize,
        threads=config.threads,
    )


def open_library(config: EngineConfig, shape: ModelConfig) -> StateLibrary:
    """Return the states of a folder, without a word on the unusable ones.

    Raises:
        ConfigError: there is no such folder.
    """
    with quiet():
        return StateLibrary(config.states, shape, strict=config.strict)


def _about_state(state: TunedState, shape: ModelConfig, folder: Path) -> dict[str, object]:
    sha256 = state.metadata.base_sha256
    base = {None: "not said", shape.fingerprint: "this model"}.get(sha256, "other weights")
    return {
        "name": state.name,
        "kind": "state",
        "group": state.metadata.group or "",
        "norm": _norm(state),
        "base": base,
        "file": _path_of(folder, state.name).name,
        "licence": state.metadata.licence,
        "template": state.metadata.template,
    }


def new_target(folder: Path, name: str, shape: ModelConfig, *, force: bool) -> Path:
    """Return where a new state goes.

    Raises:
        InvalidRequestError: a name that no state may have.
        CommandError: a name that is taken, or a folder that is part of the installation.
    """
    check_name(name)
    if "_bundled" in folder.parts:
        raise CommandError(
            "the bundled states are part of the installation; copy them to a folder of your own "
            f"and name it with --states or MRSS_STATES: cp -r {folder} my-states"
        )
    with quiet():
        library = StateLibrary(folder, shape)
    if name in library.mixtures:
        raise CommandError(f"{name!r} is a mixture of mixtures.toml; choose another name")
    taken = _files_of(folder, name)
    if taken and not force:
        raise CommandError(f"{taken[0]} exists; choose another name, or replace it with --force")
    return folder / f"{name}.safetensors"


def save_state(target: Path, state: TunedState, shape: ModelConfig, *, force: bool) -> None:
    """Write a new state and print its path.

    Raises:
        StateFileError: it cannot be written.
    """
    save_tuned_state(target, state, shape)
    for other in _files_of(target.parent, state.name):
        # Two files of one name would both be refused.
        if force and other != target:
            other.unlink(missing_ok=True)
    answer(str(target))
    note(f"requests call it mrss/{state.name}; an engine that runs reads it at its next start")


def _files_of(folder: Path, name: str) -> list[Path]:
    return [path for path in state_paths(folder) if path.stem == name]


def _all_paths(folder: Path) -> list[Path]:
    return sorted(state_paths(folder), key=lambda path: path.name)


def _path_of(folder: Path, name: str) -> Path:
    path = state_file(folder, name)
    if path is not None:
        return path
    raise CommandError(f"there is no state {name!r} in {folder} (mrss states list shows them)")


def _terms(terms: Sequence[Any]) -> str:
    return "+".join(t.name if t.weight == 1 else f"{t.name}:{t.weight:g}" for t in terms)


def _norm(state: TunedState) -> float:
    return round(math.hypot(*state.layer_norms), 3)


def _norms(state: TunedState) -> str:
    return " ".join(f"{norm:.3g}" for norm in state.layer_norms)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_fields(fields: Mapping[str, object]) -> None:
    for key, value in fields.items():
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
        answer(f"  {key.replace('_', ' ')}: {text}")
