"""Tuned states kept on the device: the last used ones, fewer where memory is short."""

from __future__ import annotations

import pytest
import torch

from mrss_provider.engine.model_runner import ResidentStates
from mrss_provider.model import StateSnapshot, TunedState

CPU = torch.device("cpu")


def state(value: float) -> TunedState:
    return TunedState(f"s{value}", torch.full((1, 1, 4, 4), value))


class Crowded(ResidentStates):
    """A device with room for so many states."""

    def __init__(self, room: int, max_states: int = 64) -> None:
        super().__init__(CPU, max_states)
        self.room = room
        self.copied: list[str] = []

    def _copy(self, state: TunedState) -> StateSnapshot:
        if len(self._states) >= self.room:
            raise torch.OutOfMemoryError("no memory")
        self.copied.append(state.name)
        return super()._copy(state)


def test_the_last_used_are_kept_and_the_others_copied_again() -> None:
    resident = Crowded(room=9, max_states=2)
    for value in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0):
        assert float(resident.get(state(value)).wkv.max()) == value
    assert resident.copied == ["s1.0", "s2.0", "s3.0", "s2.0"]


def test_the_others_make_room_before_a_request_has_to_end() -> None:
    resident = Crowded(room=2)
    for value in (1.0, 2.0, 3.0):
        assert float(resident.get(state(value)).wkv.max()) == value
    assert resident.copied == ["s1.0", "s2.0", "s3.0"]
    with pytest.raises(torch.OutOfMemoryError):
        Crowded(room=0).get(state(1.0))
