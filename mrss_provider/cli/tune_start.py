"""Where a state that is tuned begins, if not at the base: another state, read and checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mrss_provider.chat import ChatTemplate
from mrss_provider.cli.states import open_library, read_config
from mrss_provider.config import EngineConfig
from mrss_provider.engine.state_folder import STATE_SUFFIXES
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture import BASE
from mrss_provider.model import TunedState, load_tuned_state


def read_start(
    engine: EngineConfig, told: str, template: ChatTemplate, *, offsets: bool
) -> TunedState:
    """Return the state that `--from` names.

    Args:
        engine: where the model and the states are.
        told: a file, or a name in the folder of states.
        template: that the run renders chats in.
        offsets: whether the run learns offsets.

    Raises:
        StateFileError: no state file, or one for another shape, RWKV version or other weights.
        UnknownNameError: no state of that name.
        InvalidRequestError: it has something that tuning would lose, or another chat template.
    """
    model = read_config(engine.model)
    path = Path(told)
    if path.suffix in STATE_SUFFIXES or path.name != told:
        state = load_tuned_state(path, model, name=path.stem, strict=True)
    else:
        library = open_library(replace(engine, strict=True), model)
        _check_name(library, told)
        state = library.get(told)
    _check_whole(state, offsets=offsets)
    own = state.metadata.template
    if own not in (None, template.name):
        raise InvalidRequestError(
            f"--from {state.name} was tuned in the chat template {own!r}, and this run renders in "
            f"{template.name!r}; give --template {own}",
            param="from",
        )
    return state


def _check_name(library: StateLibrary, told: str) -> None:
    if told == BASE:
        raise InvalidRequestError(
            f"--from names a state to go on from, and {BASE!r} is where tuning begins by itself; "
            "leave it out",
            param="from",
        )
    if not told or "+" in told or told in library.mixtures:
        raise InvalidRequestError(
            f"--from takes one state, a file or a name, got {told!r}; `mrss states average` makes "
            "one of several",
            param="from",
        )


def _check_whole(state: TunedState, *, offsets: bool) -> None:
    """Refuse a state of which something would be missing in what comes out."""
    reasons = {
        "has offsets; give --offsets, with which they are learnt on": (
            state.time_offset is not None and not offsets
        ),
        "has shift states, which tuning would lose; begin at a state without them": (
            state.shift_att is not None or state.shift_ffn is not None
        ),
        "was tuned with a leading token 0, which tuning here does not read; begin at another": (
            state.metadata.bos
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InvalidRequestError(f"--from {state.name} {reason}", param="from")
