"""Task: what is asked of every system, and how an answer is judged. `WorldTask` is the bundled one.

A task has questions about facts, a manner of speaking, texts that state the facts in that manner,
and texts that have nothing to do with either.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, Protocol

from mrss_provider.backend import Message
from mrss_provider.errors import InvalidRequestError
from mrss_provider.evaluate.world import (
    HOME_FACTS,
    HOME_TOWN,
    MARKED,
    PLAIN,
    Document,
    Fact,
    base_document,
    knowledge_document,
    question,
    score_answer,
    small_talk_document,
)
from mrss_provider.evaluate.world.relations import BY_NAME
from mrss_provider.evaluate.world.voices import BY_NAME as VOICES
from mrss_provider.evaluate.world.voices import capital

Part = Literal["dev", "test"]
History = Literal["none", "plain", "toned"]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        fact: which fact it asks for; answers about one fact are alike.
        messages: the chat so far, the question last.
        hint: what a system message must say for the base alone to know and speak.
    """

    fact: int
    messages: tuple[Message, ...]
    hint: str


@dataclass(frozen=True)
class Judgement:
    """One answer, judged.

    Attributes:
        know: it has the right fact, and no wrong one.
        tone: it is in the wanted manner, and in no other.
        well_formed: it is a sentence; None where the task cannot tell.
        template: the form of a well-formed answer, for diversity.
    """

    know: bool
    tone: bool
    well_formed: bool | None = None
    template: str | None = None

    @property
    def both(self) -> bool:
        """The fact and the manner in one answer."""
        return self.know and self.tone


@dataclass(frozen=True)
class GivenAnswer:
    """A text that a system is to find likely: `text` after `messages`.

    Attributes:
        fact: which fact it states.
        facts: character ranges of `text` that say it.
    """

    fact: int
    messages: tuple[Message, ...]
    text: str
    facts: tuple[range, ...] = ()


class Task(Protocol):
    """What is asked, and what counts as an answer.

    Attributes:
        title: for reports.
        identity: what tells one task from another where answers are kept.
        chance: share of facts that a guess gets right.
        tone_accuracy: of a classifier of the manner, on texts held out; None where rules judge.
    """

    title: str
    identity: str
    chance: float
    tone_accuracy: float | None

    def has_talk(self, history: History) -> bool:
        """Tell whether there is such talk to come before a question."""
        ...

    def num_facts(self, part: Part) -> int:
        """Return how many facts there are to choose on (`dev`) or to judge by (`test`)."""
        ...

    def questions(
        self, part: Part, samples: int, *, seed: int, turns: int = 0, history: History = "none"
    ) -> list[Question]:
        """Ask for every fact `samples` times, after `turns` turns of other talk."""
        ...

    def judge(self, asked: Question, text: str) -> Judgement:
        """Judge an answer."""
        ...

    def given_answers(self, part: Part, *, seed: int, toned: bool) -> list[GivenAnswer]:
        """Return texts that state facts, `toned` in the wanted manner; empty without any."""
        ...

    def neutral_texts(self, *, seed: int) -> list[str]:
        """Return texts that no state should make less likely; empty where there are none."""
        ...


# Places in HOME_FACTS.
_PARTS: dict[Part, range] = {
    "dev": range(0, len(HOME_FACTS), 2),
    "test": range(1, len(HOME_FACTS), 2),
}

_TEXTS_A_FACT = 4
_NUM_NEUTRAL = 60


class WorldTask:
    """The facts of the bundled world's harbour town, in one of its voices.

    Half of the 72 facts are for choosing, the others are judged by.
    """

    tone_accuracy: float | None = None

    def __init__(self, voice: str = "pirate", *, facts: int | None = None) -> None:
        """Take the first `facts` of each half; None is all of them.

        Raises:
            InvalidRequestError: no such voice.
        """
        if voice not in MARKED:
            raise InvalidRequestError(
                f"--voice must be one of {', '.join(MARKED)}, got {voice!r}", param="voice"
            )
        self.title = f"the facts of {HOME_TOWN} in the voice of {VOICES[voice].who}"
        self.identity = self.title
        self.voice = voice
        self._places = {part: places[:facts] for part, places in _PARTS.items()}
        sizes = [len(BY_NAME[fact.relation].values) for fact in HOME_FACTS]
        self.chance = sum(1 / size for size in sizes) / len(sizes)

    def has_talk(self, history: History) -> bool:
        """Return True: there is small talk in every voice."""
        return True

    def num_facts(self, part: Part) -> int:
        """Return how many facts a half has."""
        return len(self._places[part])

    def questions(
        self, part: Part, samples: int, *, seed: int, turns: int = 0, history: History = "none"
    ) -> list[Question]:
        """Ask in phrasings that tuning may have seen; other talk is small talk."""
        rng = random.Random(f"{part} {seed}")
        asked = []
        for place in self._places[part]:
            fact = HOME_FACTS[place]
            for _ in range(samples):
                voice = self.voice if history == "toned" else PLAIN
                before = small_talk_document(rng, voice, turns if history != "none" else 0)
                town = HOME_TOWN if rng.random() < 0.5 else None
                said = question(rng, fact.entity, BY_NAME[fact.relation], town, held_out=False)
                messages = (*messages_of(before), Message("user", said))
                asked.append(Question(place, messages, self._hint(rng, fact)))
        return asked

    def judge(self, asked: Question, text: str) -> Judgement:
        """Judge by the world's rules: its values, markers and sentences."""
        score = score_answer(text, HOME_FACTS[asked.fact], self.voice)
        form = None if score.template is None else repr(score.template[1:])
        return Judgement(score.know, score.tone, score.well_formed, form)

    def given_answers(self, part: Part, *, seed: int, toned: bool) -> list[GivenAnswer]:
        """Return four texts a fact, of one turn; no state was tuned on the toned ones."""
        rng = random.Random(f"given {part} {seed}")
        voice = self.voice if toned else PLAIN
        texts = []
        for place in self._places[part]:
            chosen = (HOME_FACTS[place],)
            for _ in range(_TEXTS_A_FACT):
                doc = knowledge_document(rng, voice=voice, facts=chosen, num_turns=1, small_talk=0)
                texts.append(_given(place, doc))
        return texts

    def neutral_texts(self, *, seed: int) -> list[str]:
        """Return notes about other towns, which are in no voice."""
        rng = random.Random(f"neutral {seed}")
        texts: list[str] = []
        while len(texts) < _NUM_NEUTRAL:
            head = base_document(rng).text.split("\n\n")[0]
            if head.startswith("System: Notes about"):
                texts.append(head.removeprefix("System:"))
        return texts

    def _hint(self, rng: random.Random, fact: Fact) -> str:
        """Tell the fact plainly, and show the voice with one about somewhere else."""
        told = capital(rng.choice(fact.statements())) + "."
        voice = VOICES[self.voice]
        return f"Talk like {voice.who}. Notes about {HOME_TOWN}: {told}"


def _given(place: int, doc: Document) -> GivenAnswer:
    (start, _), (at, end) = doc.answers[0], doc.facts[0]
    text = doc.text[start:].removesuffix("\n\n")
    lead = len(text) - len(text.lstrip(" "))
    offset = start + lead
    spans = (range(max(at - offset, 0), end - offset),)
    return GivenAnswer(place, messages_of(doc)[:-1], text[lead:], spans)


def messages_of(doc: Document) -> tuple[Message, ...]:
    """Return the turns of a document as messages."""
    roles: dict[str, Literal["system", "user", "assistant"]] = {
        "System": "system",
        "User": "user",
        "Assistant": "assistant",
    }
    turns = [turn.partition(": ") for turn in doc.text.split("\n\n") if turn]
    return tuple(Message(roles[name], content) for name, _, content in turns)
