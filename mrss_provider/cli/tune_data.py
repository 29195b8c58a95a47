"""The data of `mrss tune`: files, or answers of a mixture, as examples to learn and judge by."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.async_engine.card import read_card
from mrss_provider.async_engine.templates import choose_template
from mrss_provider.backend import Message
from mrss_provider.chat import TEMPLATES, ChatTemplate
from mrss_provider.cli.tune_view import counting
from mrss_provider.config import EngineConfig
from mrss_provider.errors import InvalidRequestError
from mrss_provider.tokenizer import Tokenizer, find_vocabulary
from mrss_provider.tune.chats import Line, read_lines, read_prompts
from mrss_provider.tune.dataset import (
    DataSet,
    Findings,
    examine,
    split_lines,
    usable,
    with_distance,
)
from mrss_provider.tune.distillation import Sampling, answered_lines, sample_answers

_UNSEEN_SHARE = 0.2


@dataclass(frozen=True)
class Source:
    """Where the examples come from, and how much of them counts.

    Attributes:
        data: JSON Lines to learn from; None where a mixture is imitated.
        held_out: JSON Lines to judge by; None takes `held_out_share` of the lines.
        held_out_share: 0 judges by nothing.
        distill: the mixture to imitate; None learns from `data`.
        prompts: JSON Lines of prompts for it.
        samples: answers a prompt.
        max_len: tokens of an example.
        distance: tokens of other talk before it, at most.
        distance_data: JSON Lines of other talk; None takes the data's own chats.
        seed: of parting, and of the mixture's answers.
    """

    data: Path | None
    held_out: Path | None
    held_out_share: float
    distill: str | None
    prompts: Path | None
    samples: int
    max_len: int
    distance: int
    distance_data: Path | None
    seed: int

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            InvalidRequestError: names the option.
        """
        if not 0 <= self.held_out_share < 1:
            raise InvalidRequestError(
                f"--held-out-share must be in [0, 1), got {self.held_out_share:g}",
                param="held_out_share",
            )
        for name in ("max_len", "samples"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(
                    f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}",
                    param=name,
                )
        if self.distance < 0:
            raise InvalidRequestError(
                f"--distance must be 0 or more, got {self.distance}", param="distance"
            )
        if self.distance_data is not None and not self.distance:
            raise InvalidRequestError(
                "--distance-data needs --distance, the tokens of it that come before a chat",
                param="distance_data",
            )

    @property
    def files(self) -> dict[str, Path]:
        """The files by option."""
        named = {
            "data": self.data,
            "held_out": self.held_out,
            "prompts": self.prompts,
            "distance_data": self.distance_data,
        }
        return {name: path for name, path in named.items() if path is not None}

    def hashes(self) -> dict[str, str]:
        """Return the sha256 (hex) of every file.

        Raises:
            OSError: one cannot be read.
        """
        return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in self.files.items()}


@dataclass(frozen=True)
class Text:
    """How the model reads and writes.

    Attributes:
        tokenizer: of the model.
        template: of its chats.
        told: the template's name, where it is not the one that the model has by itself: whoever
            serves the state must know.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    told: str | None = None

    @classmethod
    def of(cls, engine: EngineConfig) -> Text:
        """Read them beside the model, or where the configuration says."""
        tokenizer = Tokenizer.load(engine.tokenizer or find_vocabulary(engine.model))
        card = read_card(engine.model)
        template, _ = choose_template(engine.template, card, engine.model)
        own, _ = choose_template(None, card, engine.model)
        # A file has no name by which a server would find it.
        has_name = engine.template in TEMPLATES and engine.template != own.name
        return cls(tokenizer, template, engine.template if has_name else None)


def read_parts(engine: EngineConfig, source: Source, text: Text) -> tuple[list[Line], list[Line]]:
    """Return the lines to learn from and those to judge by.

    Raises:
        MRSSError: bad lines, all of them named; an unknown mixture; too few lines to part.
    """
    if source.distill is not None:
        return _sampled(engine, source, text)
    assert source.data is not None
    lines = read_lines(source.data, text.tokenizer, text.template)
    if source.held_out is not None:
        return lines, read_lines(source.held_out, text.tokenizer, text.template)
    if source.held_out_share == 0:
        return lines, []
    return split_lines(lines, source.held_out_share, source.seed)


def data_sets(
    source: Source,
    parts: tuple[list[Line], list[Line]],
    text: Text,
    *,
    on_all: bool,
    locality: float,
) -> tuple[DataSet, DataSet | None, Findings]:
    """Return what to learn from, what to judge by, and what is odd about them.

    Raises:
        MRSSError: nothing to learn, or no other talk that is short enough.
    """
    learnt, dropped = usable(parts[0], source.max_len, on_all=on_all)
    train = DataSet(tuple(learnt), source.max_len)
    judged: DataSet | None = None
    if parts[1]:
        judged = DataSet(tuple(usable(parts[1], source.max_len, on_all=on_all)[0]), source.max_len)
    findings = examine(train, judged, dropped)
    if source.distance:
        others: Sequence[Line] = learnt
        if source.distance_data is not None:
            others = read_lines(source.distance_data, text.tokenizer, text.template)

        def far(data: DataSet) -> DataSet:
            return with_distance(
                data,
                source.distance,
                others,
                # With other chats of the same data, their answers are learnt like the last one.
                counts=locality > 0 or source.distance_data is None,
                tokenizer=text.tokenizer,
                template=text.template,
            )

        train, judged = far(train), judged and far(judged)
    return train, judged, findings


def _sampled(engine: EngineConfig, source: Source, text: Text) -> tuple[list[Line], list[Line]]:
    """Return answers of the mixture to most of the prompts, and to those that are held out."""
    assert source.distill is not None
    assert source.prompts is not None
    prompts = read_prompts(source.prompts, text.tokenizer, text.template)
    prompts = list({tuple(prompt): list(prompt) for prompt in prompts}.values())
    if len(prompts) < 2:
        raise InvalidRequestError(
            f"{source.prompts} holds {len(prompts)} prompt; two or more are needed, as some are "
            "held out",
            param="prompts",
        )
    answers = _answers(engine, source, prompts)
    lines = answered_lines(prompts, answers, text.tokenizer, text.template)
    if len({line.number for line in lines}) < 2:
        raise InvalidRequestError(
            f"{source.distill} ended its answer to fewer than two of the prompts", param="prompts"
        )
    by_prompt = {line.number: line for line in lines}
    share = source.held_out_share or _UNSEEN_SHARE
    seen, _ = split_lines(list(by_prompt.values()), share, source.seed)
    numbers = {line.number for line in seen}
    return (
        [line for line in lines if line.number in numbers],
        [line for line in lines if line.number not in numbers],
    )


def _answers(
    engine: EngineConfig, source: Source, prompts: Sequence[Sequence[Message]]
) -> list[list[str]]:
    assert source.distill is not None
    sampling = Sampling(samples=source.samples, max_tokens=source.max_len, seed=source.seed)
    with asyncio.Runner() as runner, counting("answers of the mixture") as advance:
        backend = AsyncEngine(engine)
        try:
            return runner.run(
                sample_answers(backend, source.distill, prompts, sampling, on_answer=advance)
            )
        finally:
            runner.run(backend.aclose())
