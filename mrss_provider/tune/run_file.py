"""The file of an unfinished run: all that the next step depends on, whole or not there at all."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrss_provider.errors import ConflictError, FileFormatError
from mrss_provider.replacing import replace_file

SUFFIX = ".unfinished"

_FORMAT = "mrss-tune-run-1"


@dataclass
class Record:
    """What a run has done so far.

    Attributes:
        step: batches learnt from.
        losses: one a step, nats a token, before the step.
        held_out: (steps, loss) of every evaluation; the first is the start's.
        best_step: of the evaluation with the least loss.
        tokens: read, those of frozen rows and of the base not counted.
        seconds: of the whole run, over all its parts.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Unfinished:
    """A run as it was left.

    Attributes:
        settings: all that a run is made of, as JSON has it; a run goes on only with the same.
        found: what was found out before the first step, such as the learning rate.
        record: what it did.
        learner: `Learner.snapshot`.
        best: the same at the best evaluation; empty where there is no held-out data.
    """

    settings: Mapping[str, Any]
    found: Mapping[str, Any]
    record: Record
    learner: Mapping[str, Tensor]
    best: Mapping[str, Tensor]


def run_path(out: Path) -> Path:
    """Return where the unfinished run of a state that will be `out` is."""
    return out.with_name(out.name + SUFFIX)


def save_run(path: Path, run: Unfinished) -> None:
    """Write a run.

    Raises:
        FileFormatError: it cannot be written.
    """
    content = {
        "format": _FORMAT,
        "settings": dict(run.settings),
        "found": dict(run.found),
        "record": asdict(run.record),
        "learner": dict(run.learner),
        "best": dict(run.best),
    }
    # Straight to a file, torch hides why it could not be written.
    data = io.BytesIO()
    torch.save(content, data)
    try:
        replace_file(path, data.getbuffer())
    except OSError as exc:
        raise FileFormatError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def load_run(path: Path, settings: Mapping[str, Any]) -> Unfinished:
    """Read a run that was made with `settings`.

    Raises:
        ConflictError: there is none, or it was made with other settings, which are named.
        FileFormatError: it is no such file.
    """
    if not path.exists():
        raise ConflictError(
            f"there is no unfinished run to resume ({path} does not exist); leave --resume out"
        )
    content = _load(path)
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"it has format {content['format']!r}")
        record = Record(**content["record"])
        record.held_out = [(step, loss) for step, loss in record.held_out]
        run = Unfinished(
            content["settings"], content["found"], record, content["learner"], content["best"]
        )
    except (ValueError, TypeError, KeyError) as exc:
        raise FileFormatError(
            f"{path} is no unfinished run of this version ({exc}); start anew with --force"
        ) from exc
    changed = [
        f"{key} was {run.settings.get(key)!r} and is {settings.get(key)!r}"
        for key in sorted({*run.settings, *settings})
        if run.settings.get(key) != settings.get(key)
    ]
    if changed:
        raise ConflictError(
            f"{path} goes on only as it began: {'; '.join(changed)}; start anew with --force"
        )
    return run


def _load(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as exc:
        # Damaged bytes raise anything here, and what torch says of them is advice for its callers.
        raise FileFormatError(
            f"{path} is damaged or no unfinished run; start anew with --force"
        ) from exc
