"""`mrss tune`: from lines of text, or the answers of a mixture, to a state file."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import FrameType
from typing import Any

import torch

from mrss_provider.cli.output import answer_json, note
from mrss_provider.cli.tune_data import Text, data_sets, read_parts
from mrss_provider.cli.tune_finish import finish
from mrss_provider.cli.tune_job import Bench, Job, settings_of
from mrss_provider.cli.tune_mixture import beside_loss, imitation_of
from mrss_provider.cli.tune_start import read_start
from mrss_provider.cli.tune_view import counting, show_findings, show_rates, watching
from mrss_provider.config import EngineConfig
from mrss_provider.errors import ConflictError, InvalidRequestError
from mrss_provider.mixture import check_name
from mrss_provider.model.config import DTYPES
from mrss_provider.model.cpu import configure_cpu, physical_cores
from mrss_provider.model.model import find_device
from mrss_provider.tune.config import TuneConfig
from mrss_provider.tune.dataset import Batches, DataSet, fixed_batches
from mrss_provider.tune.files import read_weights
from mrss_provider.tune.learner import Learner
from mrss_provider.tune.network import Weights
from mrss_provider.tune.rates import RATES, best_rate, sweep
from mrss_provider.tune.run_file import Record, Unfinished, load_run, run_path, save_run
from mrss_provider.tune.surprise import mark_surprising
from mrss_provider.tune.token_loss import TokenLoss, nll
from mrss_provider.tune.training import Plan, Training

_LOOKS = 10
"""Looks at the held-out text in a run, besides the one at the start."""

_MIN_SWEEP_STEPS = 12
_SWEEP_SHARE = 0.25
_WARMUP_SHARE = 0.05


def tune(engine: EngineConfig, job: Job) -> bool:
    """Tune a state and write it; return False if it was left off, to be gone on with.

    Raises:
        MRSSError: bad data (with the lines), a file that is in the way, options that do not fit.
    """
    _check_files(job)
    text = Text.of(engine)
    start = None
    if job.start is not None:
        start = read_start(engine, job.start, text.template, offsets=job.config.offsets)
    parts = read_parts(engine, job.source, text)
    # An engine that sampled answers has set what suits sampling.
    configure_cpu(engine.threads or physical_cores())
    train, judged, findings = data_sets(
        job.source,
        parts,
        text,
        on_all=job.config.loss_on == "all",
        locality=job.config.locality,
    )
    show_findings(findings)
    weights = _weights(engine)
    if job.config.locality:
        train = _with_facts(weights, train, job.surprise)
        judged = judged and _with_facts(weights, judged, job.surprise)
    steps = _steps(job, train)
    config = replace(
        job.config, steps=steps, max_len=train.longest, warmup_steps=_warmup(job, steps)
    )
    batch_size = config.batch_size
    bench = Bench(
        weights,
        _token_loss(engine, job, weights),
        train,
        fixed_batches(judged, batch_size, config.seed) if judged else [],
        start,
        text.told,
        parts,
    )
    settings = settings_of(engine, job, config, start)
    training, config, found = _begin(job, bench, config, settings)
    if not _learn(job, training, settings, found):
        _tell_left_off(job, training.record.step, config.steps)
        return False
    training.finish()
    finish(engine, job, bench, training, config, settings, found, asdict(findings))
    return True


def _check_files(job: Job) -> None:
    check_name(job.out.stem, "state")
    if job.out.suffix not in (".safetensors", ".pth"):
        raise InvalidRequestError(
            f"a state is written as .safetensors or .pth, got --out {job.out.name}", param="out"
        )
    if not job.out.parent.is_dir():
        raise InvalidRequestError(f"the folder {job.out.parent} does not exist", param="out")
    if job.out.is_dir():
        raise ConflictError(f"{job.out} is a folder; choose another --out")
    if job.out.exists() and not job.force:
        raise ConflictError(f"{job.out} exists; choose another --out, or give --force")
    if run_path(job.out).exists() and not (job.resume or job.force):
        raise ConflictError(
            f"{run_path(job.out)} is an unfinished run; go on with --resume, or begin anew with "
            "--force"
        )


def _weights(engine: EngineConfig) -> dict[str, torch.Tensor]:
    """Return the weights where and as they are computed with: fp32 on a CPU, bf16 on CUDA.

    Raises:
        ConfigError: there is no such device.
        ModelFileError: no checkpoint.
    """
    device = find_device(engine.device)
    dtype = DTYPES.get(engine.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return {
        name: tensor.to(device, torch.float32 if name.endswith("time_state") else dtype)
        for name, tensor in read_weights(engine.model).items()
    }


def _with_facts(weights: Weights, data: DataSet, share: float) -> DataSet:
    marked = mark_surprising(weights, data.lines, share, data.max_len)
    if not any(any(line.example.fact) for line in marked):
        raise InvalidRequestError(
            "with --locality only facts are learnt, and no line has any; name them as 'facts', or "
            "leave 'facts' out of the lines that have some",
            param="locality",
        )
    return replace(data, lines=tuple(marked))


def _steps(job: Job, train: DataSet) -> int:
    if job.steps is not None:
        return job.steps
    per_epoch = -(-len(train.lines) // job.config.batch_size)
    return max(1, math.ceil(job.epochs * per_epoch))


def _warmup(job: Job, steps: int) -> int:
    if job.warmup_steps is not None:
        return job.warmup_steps
    return max(1, round(_WARMUP_SHARE * steps))


def _token_loss(engine: EngineConfig, job: Job, weights: Weights) -> TokenLoss:
    if job.source.distill is not None:
        return imitation_of(engine, job.source.distill, weights)
    if job.beside:
        return beside_loss(engine, job.beside, job.merge, job.gate, weights)
    return nll


def _begin(
    job: Job, bench: Bench, config: TuneConfig, settings: Mapping[str, Any]
) -> tuple[Training, TuneConfig, dict[str, Any]]:
    """Return a run at its start, or where it was left; with its rate, and what was found out."""
    path = run_path(job.out)
    left = load_run(path, settings) if job.resume else None
    found = dict(left.found) if left else _found(job, bench, config)
    config = replace(config, learning_rate=found["learning_rate"])
    learner = _learner(bench, config)
    plan = Plan(config.steps, max(1, math.ceil(config.steps / _LOOKS)), job.patience)
    training = Training(
        learner,
        Batches(bench.train, config.batch_size, config.seed),
        bench.held_out,
        plan,
        left.record if left else Record(),
        left.best if left else {},
    )
    if left:
        learner.restore(left.learner)
        note(f"goes on after step {left.record.step}")
    return training, config, found


def _learner(bench: Bench, config: TuneConfig) -> Learner:
    return Learner(
        bench.weights,
        [config],
        [bench.initial],
        token_loss=bench.token_loss,
        allow_idle=True,
        initial_offsets=[bench.initial_offset],
    )


def _found(job: Job, bench: Bench, config: TuneConfig) -> dict[str, Any]:
    """Return the learning rate, and how it was found."""
    if job.rate is not None:
        return {"learning_rate": job.rate}
    if not bench.held_out:
        raise InvalidRequestError(
            "--lr auto chooses by held-out loss; give --held-out, a --held-out-share above 0, or "
            "--lr FLOAT",
            param="lr",
        )
    steps = min(config.steps, max(_MIN_SWEEP_STEPS, round(_SWEEP_SHARE * config.steps)))
    size = max(1, config.batch_size // 2)
    short = replace(config, steps=steps, batch_size=size, warmup_steps=max(1, steps // 6))
    with counting("learning rates") as advance:
        trials = sweep(
            bench.weights,
            short,
            Batches(bench.train, size, config.seed),
            bench.held_out,
            token_loss=bench.token_loss,
            rates=RATES,
            initial=bench.initial,
            initial_offset=bench.initial_offset,
            on_step=advance,
        )
    before = _learner(bench, short).evaluate(bench.held_out)[0]
    show_rates(trials, bench.start.name if bench.start else "the base", before, steps)
    return {"learning_rate": best_rate(trials), "rates": [trial.to_json() for trial in trials]}


def _learn(
    job: Job, training: Training, settings: Mapping[str, Any], found: Mapping[str, Any]
) -> bool:
    """Run until it is done or somebody asks to leave off; return whether it is done."""

    def save() -> None:
        snapshot = training.learner.snapshot()
        save_run(
            run_path(job.out),
            Unfinished(settings, found, training.record, snapshot, training.best),
        )

    steps, done = training.plan.steps, training.record.step
    with _until_asked() as stop, watching(steps, done) as show:
        training.run(on_step=show, stop=stop, save=save, save_every_s=job.save_every_s)
    return training.is_done


def _tell_left_off(job: Job, step: int, steps: int) -> None:
    note(f"left off after {step} of {steps} steps; go on with the same command and --resume")
    if job.as_json:
        answer_json({"unfinished": str(run_path(job.out)), "step": step, "steps": steps})


@contextmanager
def _until_asked() -> Iterator[Callable[[], bool]]:
    """Yield what tells whether Ctrl-C (or SIGTERM) came; a second one ends at once."""
    asked: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        note("leaving off after this step; once more leaves at once")

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(one, hear) for one in signals]
    try:
        yield lambda: bool(asked)
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)
