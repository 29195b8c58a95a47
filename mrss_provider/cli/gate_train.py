"""`mrss gate train`: a gate for a mixture, from text that needs all of its states."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from mrss_provider.async_engine.card import read_card
from mrss_provider.async_engine.templates import choose_template
from mrss_provider.backend import MixtureOptions
from mrss_provider.cli.output import CommandError, answer, note
from mrss_provider.cli.states import open_model, read_config
from mrss_provider.cli.tune_view import counting
from mrss_provider.config import EngineConfig
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.errors import ConflictError, InvalidRequestError
from mrss_provider.mixture import check_name
from mrss_provider.tokenizer import Tokenizer, find_vocabulary
from mrss_provider.tune.chats import read_chats
from mrss_provider.tune.examples import Example
from mrss_provider.tune.gate_data import GateData, check_rows, collect
from mrss_provider.tune.gate_files import gate_path, save_gate
from mrss_provider.tune.gate_report import GateReport, Interval, report_gate
from mrss_provider.tune.gate_training import MIN_DOCUMENTS, GateConfig, split, train_gate

_HELD_OUT_SHARE = 0.2

_TITLES = {
    "learned": "learned",
    "novelty": "novelty",
    "fixed": "best fixed weights",
    "named": "named weights",
}


@dataclass(frozen=True)
class Job:
    """What to train.

    Attributes:
        mixture: states and weights, as in a name.
        data: JSON Lines to learn from.
        out: what requests will call the gate.
        held_out: JSON Lines to judge by; None takes a fifth of the texts of `data`.
        config: how to train.
        licence: of the gate.
        force: write a gate that gains nothing, and over one of that name.
    """

    mixture: str
    data: Path
    out: str
    held_out: Path | None = None
    config: GateConfig = field(default_factory=GateConfig)
    licence: str | None = None
    force: bool = False


def train(engine: EngineConfig, job: Job) -> None:
    """Train, report and write a gate.

    Raises:
        MRSSError: bad data (with the line), an unknown state, a name that is taken.
        CommandError: the gate is no better than the best fixed weights, without `force`.
    """
    path = gate_path(engine.states, check_name(job.out, "gate"))
    if path.exists() and not job.force:
        raise ConflictError(f"there is a gate {job.out!r}; choose another --out, or give --force")
    tokenizer = Tokenizer.load(engine.tokenizer or find_vocabulary(engine.model))
    texts = _read(engine, job.data, tokenizer, MIN_DOCUMENTS + (job.held_out is None))
    judged = _read(engine, job.held_out, tokenizer, 1) if job.held_out else []
    # Now, as the files may change while it is trained.
    data_sha256 = _hash(job.data, job.held_out)
    mixture = _resolve(engine, job.mixture)

    model = open_model(engine)
    allowed = set(tokenizer.allowed_ids(model.config.vocab_size))
    banned = [token for token in range(model.config.vocab_size) if token not in allowed]
    with counting("reading") as advance:
        data = collect(model, mixture, [*texts, *judged], banned_ids=banned, on_documents=advance)
    learnt_from, held_out = _parts(data, len(texts), len(judged), job.config.seed)
    with counting("training") as advance:
        result = train_gate(
            learnt_from, job.config, on_epoch=lambda n, _: advance(n, job.config.epochs)
        )
    report = report_gate(result.tensors, learnt_from, held_out, seed=job.config.seed)
    _print(mixture, report)
    if report.nll["learned"] >= report.nll["fixed"] and not job.force:
        raise CommandError(
            "the gate is no better on held-out text than the best fixed weights, so it was not "
            "written; train it on more text that needs all of the states at once, or give --force"
        )
    save_gate(
        path,
        result,
        report,
        learnt_from,
        model=model.config,
        mixture=mixture,
        config=job.config,
        data_sha256=data_sha256,
        licence=job.licence,
    )
    note(f"wrote {path}")
    answer(f"use it: mrss chat {job.mixture}~linear~learned:{job.out}")


def _read(engine: EngineConfig, path: Path, tokenizer: Tokenizer, least: int) -> list[Example]:
    template, _ = choose_template(engine.template, read_card(engine.model), engine.model)
    examples = read_chats(path, tokenizer, template)
    if len(examples) < least:
        raise InvalidRequestError(f"{path} holds {len(examples)} texts, {least} are needed")
    return examples


def _resolve(engine: EngineConfig, name: str) -> ResolvedMixture:
    """Return the mixture with weights that sum to 1 and the base as row 0."""
    if "~" in name:
        raise InvalidRequestError(
            f"give states and weights only, such as knowledge+tone:0.5, got {name!r}: a gate is "
            "trained under the linear merge"
        )
    library = StateLibrary(engine.states, read_config(engine.model), strict=engine.strict)
    mixture = library.resolve(
        name, MixtureOptions(merge="linear", gate="novelty", reinject="never")
    )
    check_rows(mixture)
    return mixture


def _parts(data: GateData, num_texts: int, num_judged: int, seed: int) -> tuple[GateData, GateData]:
    """Return what to learn from and what to judge by.

    Raises:
        InvalidRequestError: the texts to judge by have no token that counts.
    """
    if num_judged:
        learnt, held_out = list(range(num_texts)), list(range(num_texts, num_texts + num_judged))
    else:
        learnt, held_out = split(num_texts, _HELD_OUT_SHARE, seed)
    judged_by = data.part(held_out)
    if judged_by.num_documents == 0:
        raise InvalidRequestError("the held-out texts have no token to judge by; give longer ones")
    return data.part(learnt), judged_by


def _print(mixture: ResolvedMixture, report: GateReport) -> None:
    names = [name for name, w in zip(mixture.names, mixture.weights, strict=True) if w > 0]
    shares = zip(names, report.fixed_weights, strict=True)
    fixed = ", ".join(f"{name} {share:.2f}" for name, share in shares)
    answer(f"held-out text: {report.documents} texts, {report.tokens} tokens; nats a token, linear")
    gains = {"novelty": _gain(report.over_novelty), "fixed": f"{_gain(report.over_fixed)}: {fixed}"}
    for name, nll in report.nll.items():
        answer(f"  {_TITLES[name]:<18}  {nll:.4f}  {gains.get(name, '')}".rstrip())


def _gain(gain: Interval) -> str:
    return f"learned gains {gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def _hash(*paths: Path | None) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path is not None:
            digest.update(path.read_bytes())
    return digest.hexdigest()
