"""Measuring: every system on one task, cell by cell, into numbers with intervals.

A cell is one system under one decoding. Finished cells are lines of a file; a run that was cut
short goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mrss_provider.errors import FileFormatError, InvalidRequestError
from mrss_provider.evaluate.asking import DECODINGS, T1, TOP_P, Asker, Decoding
from mrss_provider.evaluate.statistics import Interval, entropy, interval
from mrss_provider.evaluate.systems import CURVES, Pair, System, fixed_weights
from mrss_provider.evaluate.task import History, Judgement, Question, Task

TURNS = (0, 1, 2, 3, 6, 12)
"""Turns of other talk between the state and the question."""

TEMPERATURES = (0.5, 0.7, 1.2)
"""Beside T=1 and greedy."""

_SAMPLES_SHOWN = 12


@dataclass(frozen=True)
class Plan:
    """How much is asked.

    Attributes:
        samples: answers a fact.
        dev_samples: answers a fact where weights are chosen.
        decodings: for the table.
        turns: for the curve over distance.
        temperatures: for the curve over temperature.
        curves: merges and gates for the curves over weights.
        seed: of questions and draws.
    """

    samples: int = 8
    dev_samples: int = 4
    decodings: tuple[Decoding, ...] = DECODINGS
    turns: tuple[int, ...] = TURNS
    temperatures: tuple[float, ...] = TEMPERATURES
    curves: tuple[str, ...] = CURVES
    seed: int = 5


QUICK = Plan(
    samples=2, dev_samples=1, decodings=(T1, TOP_P), turns=(0, 2), temperatures=(), curves=()
)


@dataclass(frozen=True)
class Cell:
    """One system's answers under one decoding.

    Attributes:
        facts: which fact each is about.
        know, tone, well_formed: one a answer; `well_formed` is empty where nobody can tell.
        templates: of the well-formed ones that know.
        texts: some of the answers, with their questions.
    """

    facts: list[int]
    know: list[bool]
    tone: list[bool]
    well_formed: list[bool] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def both(self) -> list[bool]:
        """The fact and the manner in one answer."""
        return [a and b for a, b in zip(self.know, self.tone, strict=True)]


@dataclass(frozen=True)
class Texts:
    """How likely one system finds given texts: nats, whose fact, and which tokens state it."""

    facts: list[int]
    nats: list[float]
    is_fact: list[bool]


class Journal:
    """Finished cells of a run, one JSON line each, in a file that survives a kill.

    Args:
        path: the file; None keeps nothing.
        settings: what the run is of.

    Raises:
        InvalidRequestError: the file is of another run.
        FileFormatError: it is of none.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        if path is None:
            return
        head = json.dumps(settings, sort_keys=True)
        written = path.read_bytes() if path.exists() else b""
        # The last line of a run that was killed may be half a line: the next one begins there.
        whole = written[: written.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            self._found = {line["key"]: line["value"] for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as exc:
            raise FileFormatError(
                f"{path} is not what mrss evaluate writes; remove it, or give --out a new folder"
            ) from exc
        if lines and lines[0] != json.loads(head):
            raise InvalidRequestError(
                f"{path} is of another evaluation (other model, states, questions or version); "
                "give --out a new folder, or remove it"
            )
        if not lines and not head.encode().startswith(written):
            raise FileFormatError(
                f"{path} is not what mrss evaluate writes; remove it, or give --out a new folder"
            )
        if whole != written:
            os.truncate(path, len(whole))
        if not lines:
            path.write_text(head + "\n", encoding="utf-8")

    def get(self, key: str) -> Any:
        """Return what was kept under a key, or None."""
        return self._found.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value; on the disk when this returns."""
        self._found[key] = value
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Measurer:
    """Asks the systems of one pair what a task wants to know.

    Args:
        task: the questions, and the judge.
        asker: where answers come from.
        plan: how much.
        journal: what is done already.
        tell: called with the name of each cell before it begins.
    """

    def __init__(
        self,
        task: Task,
        asker: Asker,
        plan: Plan,
        journal: Journal,
        tell: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._task = task
        self._asker = asker
        self._plan = plan
        self._journal = journal
        self._tell = tell

    async def cell(self, system: System, decoding: Decoding) -> Cell:
        """Ask the test questions under a decoding."""
        samples = self._plan.samples
        asked = self._task.questions("test", samples, seed=self._plan.seed)
        return await self._ask(f"{system.name} | {decoding.name}", system, asked, decoding)

    async def dev_cell(self, system: System, decoding: Decoding) -> Cell:
        """Ask the questions that weights may be chosen on."""
        asked = self._task.questions("dev", self._plan.dev_samples, seed=self._plan.seed)
        return await self._ask(f"dev {system.name} | {decoding.name}", system, asked, decoding)

    async def distant_cell(self, system: System, turns: int, history: History) -> Cell:
        """Ask after turns of other talk, at top-p 0.7."""
        samples = max(1, self._plan.samples // 4)
        asked = self._task.questions(
            "test", samples, seed=self._plan.seed, turns=turns, history=history
        )
        name = f"{system.name} | {turns} {history} turns"
        return await self._ask(name, system, asked, TOP_P)

    async def given(self, system: System, *, toned: bool = True) -> Texts:
        """Score texts that state the test facts, `toned` in the manner."""
        given = self._task.given_answers("test", seed=self._plan.seed, toned=toned)
        key = f"{system.name} | {'toned' if toned else 'plain'} texts"
        if (known := self._journal.get(key)) is not None:
            return Texts(**known)
        self._tell(key)
        scored = await self._asker.said(system, given)
        texts = Texts([], [], [])
        for one, said in zip(given, scored, strict=True):
            texts.facts.extend([one.fact] * len(said.nats))
            texts.nats.extend(round(nat, 5) for nat in said.nats)
            texts.is_fact.extend(said.is_fact)
        self._journal.put(key, asdict(texts))
        return texts

    async def neutral(self, system: System) -> float | None:
        """Return nats a token of neutral texts, or None without any."""
        key = f"{system.name} | neutral texts"
        if (known := self._journal.get(key)) is not None:
            return float(known)
        texts = self._task.neutral_texts(seed=self._plan.seed)
        if not texts:
            return None
        self._tell(key)
        scored = await self._asker.neutral(system, texts)
        nats = [nat for said in scored for nat in said.nats]
        mean = sum(nats) / len(nats)
        self._journal.put(key, mean)
        return mean

    async def _ask(
        self, key: str, system: System, asked: Sequence[Question], decoding: Decoding
    ) -> Cell:
        if (known := self._journal.get(key)) is not None:
            return Cell(**known)
        self._tell(key)
        texts = await self._asker.answers(system, asked, decoding, seed=self._plan.seed)
        judged = [self._task.judge(q, text) for q, text in zip(asked, texts, strict=True)]
        cell = _cell(asked, texts, judged)
        self._journal.put(key, asdict(cell))
        return cell


def _cell(asked: Sequence[Question], texts: Sequence[str], judged: Sequence[Judgement]) -> Cell:
    step = max(1, len(texts) // _SAMPLES_SHOWN)
    shown = list(zip(asked, texts, strict=True))[::step]
    return Cell(
        [question.fact for question in asked],
        [one.know for one in judged],
        [one.tone for one in judged],
        [one.well_formed for one in judged if one.well_formed is not None],
        [one.template for one in judged if one.template is not None and one.know],
        [(question.messages[-1].content, text) for question, text in shown],
    )


def share(cell: Cell, part: str, seed: int = 0) -> Interval:
    """Return the share of answers with `know`, `tone` or `both`, with its interval over facts."""
    values = [float(value) for value in getattr(cell, part)]
    return interval(values, cell.facts, seed=seed)


def gain(one: Cell, other: Cell, seed: int = 0) -> Interval:
    """Return how much more of `both` one cell has than another, both asked the same."""
    assert one.facts == other.facts
    pairs = zip(one.both, other.both, strict=True)
    return interval([float(a) - float(b) for a, b in pairs], one.facts, seed=seed)


def diversity(cell: Cell) -> float:
    """Return the entropy of the forms of the answers that know, in nats."""
    return entropy(cell.templates)


async def best_weights(measurer: Measurer, pair: Pair, method: str) -> System:
    """Return the weights with the most `both` at T=1 on the questions for choosing."""
    found: dict[str, float] = {}
    for title, model in fixed_weights(pair, method):
        system = System(f"{method} {title}", model)
        cell = await measurer.dev_cell(system, T1)
        found[model] = sum(cell.both) / len(cell.both)
    best = max(found, key=lambda model: found[model])
    merge, _, gate = method.partition("~")
    name = f"{merge}, best fixed weights" if gate == "fixed" else f"{merge}, {gate}, best weights"
    return System(name, best)
