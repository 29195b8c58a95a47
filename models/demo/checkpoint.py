"""Checkpoints of a training run: all that the next step depends on, whole on the disk or not there.

A run goes on with the settings that it began with, and ends between two steps when it is asked to.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

# What comes of reading a file that is none of ours, or a part of one.
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    pickle.PickleError,
)


@dataclass(frozen=True)
class Left:
    """A run as it was left.

    Attributes:
        step: batches learnt from; the next batch is of this number.
        seconds: that all parts of the run took so far.
        weights: name -> tensor on the CPU.
        optimizer: its `state_dict`.
    """

    step: int = 0
    seconds: float = 0.0
    weights: Mapping[str, Tensor] | None = None
    optimizer: Mapping[str, Any] | None = None


class Checkpoint:
    """The file of an unfinished run.

    Args:
        path: of the file.
        settings: all that decides what the run learns, as plain values.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = dict(settings)

    def load(self) -> Left:
        """Return where the run was left, or its beginning if there is no file.

        Raises:
            SystemExit: the file is of a run with other settings, which are named, or of none.
        """
        if not self.path.exists():
            return Left()
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            was = dict(found["settings"])
            left = Left(found["step"], found["seconds"], found["weights"], found["optimizer"])
        except _UNREADABLE as exc:
            raise SystemExit(
                f"{self.path} is no unfinished run ({exc}); remove it to begin anew"
            ) from exc
        changed = [
            f"--{key} was {was.get(key)!r} and is {self._settings.get(key)!r}"
            for key in sorted({*was, *self._settings})
            if was.get(key) != self._settings.get(key)
        ]
        if changed:
            raise SystemExit(
                f"{self.path} goes on only as it began: {'; '.join(changed)}; remove it to begin "
                "anew"
            )
        return left

    def save(
        self,
        step: int,
        seconds: float,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Write the run down; what was written before stays until this is whole."""
        content = {
            "settings": self._settings,
            "step": step,
            "seconds": seconds,
            "weights": {name: tensor.detach() for name, tensor in weights.items()},
            "optimizer": optimizer.state_dict(),
        }
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def remove(self) -> None:
        """Remove the file: the run is finished."""
        self.path.unlink(missing_ok=True)


@contextmanager
def until_asked() -> Iterator[Callable[[], bool]]:
    """Yield what tells whether Ctrl-C or SIGTERM came; a second one ends at once."""
    asked: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(one, hear) for one in signals]
    try:
        yield lambda: bool(asked)
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)
