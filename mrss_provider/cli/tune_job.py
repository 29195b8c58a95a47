"""What `mrss tune` is told, and what it computes with."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mrss_provider.cli.states import read_config
from mrss_provider.cli.tune_data import Source
from mrss_provider.config import EngineConfig
from mrss_provider.errors import InvalidRequestError
from mrss_provider.model import TunedState
from mrss_provider.tune.chats import Line
from mrss_provider.tune.config import TuneConfig
from mrss_provider.tune.dataset import DataSet
from mrss_provider.tune.examples import Example
from mrss_provider.tune.network import Weights
from mrss_provider.tune.token_loss import TokenLoss

_MAX_EPOCHS = 1e6


@dataclass(frozen=True)
class Job:
    """What to tune.

    Attributes:
        out: the state's file.
        source: of the examples.
        config: how to learn, but for its steps, warm-up and rate.
        steps: batches; None takes `epochs`.
        warmup_steps: None takes a twentieth of the steps.
        rate: the peak learning rate; None finds one.
        epochs: passes over the data.
        surprise: share of the answers' tokens that are facts, where no line says which.
        start: the state that it goes on from, a file or a name; None begins at the base.
        beside: states that are mixed in while it learns.
        merge: how, by name.
        gate: by what weights.
        patience: looks at the held-out text without a better loss before it ends.
        save_every_s: seconds between two checkpoints.
        group: of the state.
        title: of the state, for people.
        licence: of the state.
        curve: whether the losses are drawn.
        resume: go on with an unfinished run.
        force: write over a state, and begin anew.
        as_json: print the summary as JSON.
    """

    out: Path
    source: Source
    config: TuneConfig
    steps: int | None = None
    warmup_steps: int | None = None
    rate: float | None = None
    epochs: float = 3.0
    surprise: float = 0.2
    start: str | None = None
    beside: tuple[str, ...] = ()
    merge: str = "delta"
    gate: str = "fixed"
    patience: int = 5
    save_every_s: float = 30.0
    group: str | None = None
    title: str | None = None
    licence: str | None = None
    curve: bool = True
    resume: bool = False
    force: bool = False
    as_json: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            InvalidRequestError: names the option.
        """
        for name, low_open, high in (
            ("epochs", True, _MAX_EPOCHS),
            ("surprise", True, 1.0),
            ("patience", False, math.inf),
            ("save_every_s", False, math.inf),
        ):
            value = getattr(self, name)
            if not (value > 0 if low_open else value >= 0) or not value <= high:
                option = "--checkpoint-every" if name == "save_every_s" else f"--{name}"
                least = "above 0" if low_open else "0 or more"
                most = f" and at most {high:g}" if high < math.inf else ""
                raise InvalidRequestError(
                    f"{option} must be {least}{most}, got {value:g}", param=name
                )


@dataclass
class Bench:
    """All that a run computes with.

    Attributes:
        weights: of the model, where and as they are computed with.
        token_loss: what a token costs.
        train: what is learnt from.
        held_out: batches to judge by; empty for none.
        start: the state that it goes on from; None is the base.
        template: of the chats, by name, where it is not the model's own.
        parts: the lines to learn from and those to judge by, as they came.
    """

    weights: Weights
    token_loss: TokenLoss
    train: DataSet
    held_out: list[list[Example]]
    start: TunedState | None = None
    template: str | None = None
    parts: tuple[list[Line], list[Line]] = field(default_factory=lambda: ([], []))

    @property
    def initial(self) -> Tensor | None:
        """Where a learner's state starts, as `Learner` has it."""
        return None if self.start is None else self.start.wkv

    @property
    def initial_offset(self) -> Tensor | None:
        """Where its offsets start."""
        return None if self.start is None else self.start.time_offset


def settings_of(
    engine: EngineConfig, job: Job, config: TuneConfig, start: TunedState | None
) -> dict[str, Any]:
    """Return all that decides what a run learns, as JSON has it."""
    source = {
        key: value
        for key, value in asdict(job.source).items()
        if key not in job.source.files and value is not None
    }
    mixed = {"beside": list(job.beside), "merge": job.merge, "gate": job.gate} if job.beside else {}
    begun = {"from": {"name": start.name, "sha256": start.sha256}} if start else {}
    return {
        **asdict(config),
        **source,
        **mixed,
        **begun,
        "template": engine.template and Path(engine.template).name,
        "learning_rate": job.rate,
        "surprise": job.surprise if config.locality else None,
        "patience": job.patience,
        "sha256": job.source.hashes(),
        "model": read_config(engine.model).fingerprint,
    }
