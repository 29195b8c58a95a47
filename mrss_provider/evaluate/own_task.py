"""OwnTask: a task from the user's own files, for any model and any states.

`knowledge.jsonl` has `{"question": ..., "answers": [...]}` lines, `answers` being the accepted
strings; optional `wrong` has strings that a right answer must not have. `tone.jsonl` has texts in
the wanted manner, `{"text": ...}`, and texts that are not, with `"tone": false`; or `{"markers":
[...]}` lines of regular expressions of which an answer must have one.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrss_provider.backend import Message
from mrss_provider.errors import InvalidRequestError
from mrss_provider.evaluate.task import GivenAnswer, History, Judgement, Part, Question
from mrss_provider.evaluate.tone import ToneClassifier

MIN_FACTS = 12
"""Every other one is judged by, and six are the least that an interval can be of."""

MIN_TEXTS = 20
"""Of either kind, for a classifier of manners."""


@dataclass(frozen=True)
class _Asked:
    """One line of `knowledge.jsonl`."""

    question: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]


class OwnTask:
    """Questions and a manner of the user's own.

    Attributes:
        title: for reports.
        identity: the title, and what was in the files.
        chance: 0: nobody guesses free text.
        tone: the classifier, where there is one.
        tone_accuracy: its, on texts held out.
    """

    chance = 0.0

    def __init__(
        self,
        facts: Sequence[_Asked],
        *,
        markers: Sequence[re.Pattern[str]],
        tone: ToneClassifier | None,
        toned: Sequence[str],
        plain: Sequence[str],
        title: str,
        identity: str,
    ) -> None:
        self.title = title
        self.identity = identity
        self.tone = tone
        self.tone_accuracy = None if tone is None else tone.held_out_accuracy
        self._facts = facts
        self._markers = markers
        self._toned = toned
        self._plain = plain

    @classmethod
    def read(cls, knowledge: Path, tone: Path) -> OwnTask:
        """Read both files.

        Raises:
            InvalidRequestError: naming the file, the line, and what is wrong with it.
        """
        files = {path: _data(path) for path in (knowledge, tone)}
        facts = [_fact(line, where) for line, where in _lines(knowledge, files[knowledge])]
        if len(facts) < MIN_FACTS:
            raise InvalidRequestError(
                f"{knowledge} must have {MIN_FACTS} questions or more, got {len(facts)}"
            )
        markers: list[re.Pattern[str]] = []
        texts: dict[bool, list[str]] = {True: [], False: []}
        for line, where in _lines(tone, files[tone]):
            if "markers" in line:
                _check_keys(line, ("markers",), where)
                markers += [_pattern(text, where) for text in _strings(line, "markers", where)]
            else:
                _check_keys(line, ("text", "tone"), where)
                texts[_bool(line, "tone", where)].append(_string(line, "text", where))
        if not markers and min(len(own) for own in texts.values()) < MIN_TEXTS:
            raise InvalidRequestError(
                f'{tone} must have {{"markers": [...]}} or {MIN_TEXTS} texts in the manner and '
                f'{MIN_TEXTS} with "tone": false, got {len(texts[True])} and {len(texts[False])}'
            )
        classifier = None
        if min(len(own) for own in texts.values()) >= MIN_TEXTS:
            classifier = ToneClassifier.train(texts[True], texts[False])
        digest = hashlib.sha256(b"\0".join(files.values())).hexdigest()
        title = f"{knowledge.name} in the manner of {tone.name}"
        return cls(
            facts,
            markers=markers,
            tone=classifier,
            toned=texts[True],
            plain=texts[False],
            title=title,
            identity=f"{title} {digest}",
        )

    def has_talk(self, history: History) -> bool:
        """Tell whether there are texts of that kind."""
        return history == "none" or bool(self._talk(history))

    def num_facts(self, part: Part) -> int:
        """Return how many questions a half has."""
        return len(self._places(part))

    def questions(
        self, part: Part, samples: int, *, seed: int, turns: int = 0, history: History = "none"
    ) -> list[Question]:
        """Ask each question; other talk is earlier texts of either kind, which somebody said."""
        rng = random.Random(f"{part} {seed}")
        talk = self._talk(history)
        asked = []
        for place in self._places(part):
            fact = self._facts[place]
            for _ in range(samples):
                before: list[Message] = []
                for _ in range(turns if talk else 0):
                    before += [Message("user", "Go on."), Message("assistant", rng.choice(talk))]
                messages = (*before, Message("user", fact.question))
                asked.append(Question(place, messages, self._hint(rng, fact)))
        return asked

    def judge(self, asked: Question, text: str) -> Judgement:
        """Judge by the accepted strings, the markers and the classifier (all that there are)."""
        fact, lower = self._facts[asked.fact], text.lower()
        know = any(_has(lower, answer) for answer in fact.answers)
        know = know and not any(_has(lower, wrong) for wrong in fact.wrong)
        toned = not self._markers or any(marker.search(text) for marker in self._markers)
        if toned and self.tone is not None:
            toned = self.tone.is_toned(text)
        return Judgement(know, toned)

    def given_answers(self, part: Part, *, seed: int, toned: bool) -> list[GivenAnswer]:
        """Return nothing: there are no texts with both."""
        return []

    def neutral_texts(self, *, seed: int) -> list[str]:
        """Return the texts that are not in the manner."""
        return list(self._plain[:60])

    def _talk(self, history: History) -> Sequence[str]:
        return {"none": (), "plain": self._plain, "toned": self._toned}[history]

    def _places(self, part: Part) -> range:
        return range(part == "test", len(self._facts), 2)

    def _hint(self, rng: random.Random, fact: _Asked) -> str:
        told = f"{fact.question} {fact.answers[0]}"
        shown = f" Write in this manner: {rng.choice(self._toned)}" if self._toned else ""
        return f"{told}{shown}"


def _data(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise InvalidRequestError(f"cannot read {path} ({exc.strerror})") from exc


def _lines(path: Path, data: bytes) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise InvalidRequestError(f"{where}: not JSON ({exc})") from exc
        if not isinstance(value, dict):
            raise InvalidRequestError(f"{where}: must be an object, got {value!r:.40}")
        yield value, where


def _check_keys(line: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in line:
        if key not in known:
            raise InvalidRequestError(f"{where}: {key!r:.40} is none of {', '.join(known)}")


def _bool(line: dict[str, Any], key: str, where: str) -> bool:
    value = line.get(key, True)
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{where}: {key} must be true or false, got {value!r:.40}")
    return value


def _fact(line: dict[str, Any], where: str) -> _Asked:
    _check_keys(line, ("question", "answers", "wrong"), where)
    answers = _strings(line, "answers", where)
    if not answers:
        raise InvalidRequestError(f"{where}: answers must have one or more strings, got []")
    wrong = _strings(line, "wrong", where) if "wrong" in line else []
    return _Asked(_string(line, "question", where), tuple(answers), tuple(wrong))


def _string(line: dict[str, Any], key: str, where: str) -> str:
    value = line.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequestError(f"{where}: {key} must be a text, got {value!r:.40}")
    return _whole(value, key, where)


def _strings(line: dict[str, Any], key: str, where: str) -> list[str]:
    value = line.get(key)
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise InvalidRequestError(f"{where}: {key} must be a list of texts, got {value!r:.40}")
    return [_whole(text, key, where) for text in value]


def _whole(text: str, key: str, where: str) -> str:
    """Refuse what JSON can spell and no file can hold."""
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        raise InvalidRequestError(f"{where}: {key} has half of a surrogate pair")
    return text


def _pattern(text: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as exc:
        raise InvalidRequestError(f"{where}: {text!r} is no regular expression ({exc})") from exc


def _has(lower: str, wanted: str) -> bool:
    """Tell whether `lower` has `wanted` as whole words."""
    return re.search(rf"(?<!\w){re.escape(wanted.lower())}(?!\w)", lower) is not None
