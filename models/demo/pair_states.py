"""Tuning the states of an evaluation: all rates side by side, the best by held-out text."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.demo.pair_data import KINDS, Data, Kind, Source, data_of, held_out
from models.demo.vocab import PieceEncoder, read_vocab
from mrss_provider.cli.states import read_config
from mrss_provider.model import load_tuned_state
from mrss_provider.tune import Example, TuneConfig, TuneResult, read_weights, save_result
from mrss_provider.tune.learner import Learner
from mrss_provider.tune.run_file import Record, Unfinished, load_run, run_path, save_run

RATES = (0.15, 0.5, 1.5)
"""Peak learning rates that every state is tuned with, in full."""

VOICE_SHARE = 0.4
"""Of the steps: a voice is learnt sooner than facts."""

MOST_NATS = 99.0

_BY_NAME = {kind.name: kind for kind in KINDS}
_SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class Work:
    """One state, for some seeds.

    Attributes:
        model: folder of the base model.
        out: folder that all states go to.
        kind: name of the state.
        seeds: of data and draws, learnt side by side.
        steps: batches; of a voice alone `VOICE_SHARE` of them.
        batch_size: chats a batch and rate.
        num_held_out: chats to judge by, of each source.
        device, dtype: to compute on and in.
    """

    model: Path
    out: Path
    kind: str
    seeds: tuple[int, ...]
    steps: int
    batch_size: int
    num_held_out: int
    device: str
    dtype: str

    def path(self, seed: int, kind: str | None = None) -> Path:
        """Return a state's file."""
        one = _BY_NAME[kind or self.kind]
        folder = f"baselines-{seed}" if one.is_baseline else f"pair-{seed}"
        return self.out / folder / f"{one.name}.safetensors"

    def losses_path(self, seed: int) -> Path:
        """Return the file of a state's line in the table."""
        return self.out / "losses" / f"{self.kind}-{seed}.json"

    @property
    def seeds_left(self) -> tuple[int, ...]:
        """The seeds whose files are not all there."""
        paths = {seed: (self.path(seed), self.losses_path(seed)) for seed in self.seeds}
        return tuple(seed for seed, own in paths.items() if not all(path.exists() for path in own))


def do(work: Work) -> list[Path]:
    """Tune, choose, write; return the files with the losses. Goes on where it was left.

    Raises:
        MRSSError: the model cannot be read, a state that it begins at is not there, or the
            unfinished run is of other settings.
    """
    kind = _BY_NAME[work.kind]
    weights, encoder = _opened(work.model, work.device, work.dtype)
    config = _config(kind, work)
    jobs = [(seed, rate) for seed in work.seeds for rate in RATES]
    starts = {seed: _start(work, kind, seed) for seed in work.seeds}
    if kind.is_held:
        weights = {**weights, **_as_base(starts[work.seeds[0]])}
    learner = Learner(
        weights,
        [replace(config, seed=seed, learning_rate=rate) for seed, rate in jobs],
        [starts[seed] for seed, _ in jobs],
        allow_idle=True,
    )
    data = {seed: data_of(kind, seed, config.batch_size, encoder) for seed in work.seeds}
    record, losses = _learn(learner, [data[seed] for seed, _ in jobs], config.steps, work)
    own = learner.evaluate(_batches(_own_held_out(kind, work, encoder), config.batch_size))
    nats = {
        name: _nats(weights, learner, _batches(examples, config.batch_size))
        for name, examples in _judged(work.num_held_out, encoder).items()
    }
    for number, seed in enumerate(work.seeds):
        rows = range(number * len(RATES), (number + 1) * len(RATES))
        trials = [
            {"rate": RATES[at - rows.start], "own": _number(own[at])}
            | {name: _number(values[at]) for name, values in nats.items()}
            for at in rows
        ]
        best = min(range(len(RATES)), key=lambda at: _score(kind, trials[at]))
        chosen = rows.start + best
        result = TuneResult(
            learner.wkv(chosen), tuple(one[chosen] for one in losses), record.seconds
        )
        _write(work, kind, seed, result, learner.configs[chosen], trials)
        state = {"state": kind.name, "seed": seed, **trials[best], "trials": trials}
        found = {"seconds": round(record.seconds, 1), "tokens": record.tokens, "states": [state]}
        _write_losses(work.losses_path(seed), found)
    run_path(work.path(work.seeds[0])).unlink(missing_ok=True)
    return [work.losses_path(seed) for seed in work.seeds]


def _config(kind: Kind, work: Work) -> TuneConfig:
    steps = work.steps if kind.sources != ("voice",) else math.ceil(VOICE_SHARE * work.steps)
    return TuneConfig(
        steps=steps,
        batch_size=work.batch_size,
        warmup_steps=max(1, steps // 20),
        locality=kind.locality,
        max_len=256,
    )


def _learn(
    learner: Learner, data: Sequence[Data], steps: int, work: Work
) -> tuple[Record, list[list[float]]]:
    """Take all steps; return how it went, and the losses [steps][jobs]."""
    # A run of several seeds has one file, beside the first seed's state.
    path = run_path(work.path(work.seeds[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) for k, v in asdict(work).items() if k not in ("out", "device", "dtype")}
    settings["rates"] = str(RATES)
    record, losses = Record(), []
    if path.exists():
        left = load_run(path, settings)
        learner.restore(left.learner)
        record, losses = left.record, list(left.found["losses"])
    began, before, saved = time.perf_counter(), record.seconds, time.monotonic()
    for step in range(record.step, steps):
        batches = [one.batch(step) for one in data]
        losses.append(learner.step(step, batches))
        record.step += 1
        record.tokens += sum(len(example.token_ids) - 1 for batch in batches for example in batch)
        record.seconds = before + time.perf_counter() - began
        if time.monotonic() - saved >= _SAVE_EVERY_S:
            found = {"losses": losses}
            save_run(path, Unfinished(settings, found, record, learner.snapshot(), {}))
            saved = time.monotonic()
    return record, losses


def _score(kind: Kind, trial: Mapping[str, float]) -> float:
    """Return what the best rate has least of, on held-out text without a fact in the voice."""
    return trial["facts"] + trial["voice"] if kind.is_for_both else trial["own"]


def _own_held_out(kind: Kind, work: Work, encoder: PieceEncoder) -> list[Example]:
    count = work.num_held_out
    return [example for source in kind.sources for example in held_out(source, count, encoder)]


def _judged(count: int, encoder: PieceEncoder) -> dict[Source, list[Example]]:
    """Return what all states are judged by: plain facts, the voice, and facts in the voice."""
    return {
        "facts": held_out("facts", count, encoder, facts_only=True),
        "voice": held_out("voice", count, encoder),
        "joint": held_out("joint", count, encoder),
    }


def _nats(
    weights: Mapping[str, Tensor], learner: Learner, batches: Sequence[Sequence[Example]]
) -> list[float]:
    """Return the nats a token of every job's state, without locality."""
    configs = [replace(config, locality=0.0) for config in learner.configs]
    states = [learner.wkv(job).to(learner.device) for job in range(len(configs))]
    return Learner(weights, configs, states, allow_idle=True).evaluate(batches)


def _batches(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    return [examples[at : at + size] for at in range(0, len(examples), size)]


def _start(work: Work, kind: Kind, seed: int) -> Tensor | None:
    if kind.after is None:
        return None
    path, config = work.path(seed, kind.after), read_config(work.model)
    return load_tuned_state(path, config, name=kind.after).wkv.to(work.device)


def _as_base(start: Tensor | None) -> dict[str, Tensor]:
    """Return a start as weights that make it the base, which locality keeps to."""
    assert start is not None
    return {f"blocks.{i}.att.time_state": one for i, one in enumerate(start)}


def _write(
    work: Work,
    kind: Kind,
    seed: int,
    result: TuneResult,
    config: TuneConfig,
    trials: Sequence[Mapping[str, float]],
) -> None:
    path = work.path(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_result(
        path,
        result,
        work.model,
        group="baseline" if kind.is_baseline else kind.name.partition("-")[0],
        config=config,
        licence="Apache-2.0",
        notes={"data": list(kind.sources), "after": kind.after, "held_out": list(trials)},
    )


def _write_losses(path: Path, found: Mapping[str, Any]) -> None:
    """Write the line of the table, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _number(value: float) -> float:
    """Return nats for JSON: a rate that blew up has many, not none."""
    return round(value, 5) if math.isfinite(value) else MOST_NATS


@cache
def _opened(model: Path, device: str, dtype: str) -> tuple[Mapping[str, Tensor], PieceEncoder]:
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    weights = {name: tensor.to(device, kind) for name, tensor in read_weights(model).items()}
    return weights, PieceEncoder(read_vocab(model / "vocab.txt"))
