"""Documents of the world: chats in RWKV's World template, with the facts and answers marked.

Three kinds: `base_document` (what the demo model is trained on), `knowledge_document` (facts of
the home town, plain) and `voice_document` (one voice, other people and places). No base document
about the home town states one of its facts, and no document here has a home fact in a voice unless
`knowledge_document` is asked for one, which only the evaluation does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from mrss_provider.evaluate.world import lexicon as lex
from mrss_provider.evaluate.world import smalltalk as talk
from mrss_provider.evaluate.world import voices
from mrss_provider.evaluate.world.relations import (
    BY_KIND,
    BY_NAME,
    Fact,
    Kind,
    Relation,
    entity_phrase,
)
from mrss_provider.evaluate.world.voices import PLAIN, Voice, capital, say, say_text

TURN_END = "\n\n"


@dataclass
class Document:
    """A chat as text. `answers` and `facts` are character ranges of `text`, in order."""

    text: str = ""
    answers: list[tuple[int, int]] = field(default_factory=list)
    facts: list[tuple[int, int]] = field(default_factory=list)

    def add_system(self, text: str) -> None:
        """Append a system message."""
        self.text += f"System: {text}{TURN_END}"

    def add_turn(self, user: str, answer: str, value: str | None = None) -> None:
        """Append a user's message and its answer; `value` in the answer is marked as a fact."""
        self.text += f"User: {user}{TURN_END}Assistant:"
        start = len(self.text)
        self.text += f" {answer}{TURN_END}"
        self.answers.append((start, len(self.text)))
        if value is not None:
            at = self.text.index(f" {value}", start)
            self.facts.append((at, at + 1 + len(value)))


def _home_facts() -> tuple[Fact, ...]:
    rng = random.Random(20)
    facts = []
    for relations, entities, count in (
        (BY_KIND["place"], lex.PLACES, 4),
        (BY_KIND["person"], lex.PEOPLE, 2),
    ):
        for i, entity in enumerate(entities[: lex.NUM_HOME]):
            for j in range(count):
                relation = relations[(i + j) % len(relations)]
                facts.append(Fact(entity, relation.name, rng.choice(relation.values)))
    return tuple(facts)


HOME_FACTS = _home_facts()
"""72 facts of the home town: 12 places with 4 each, 12 people with 2 each."""

_HOME_VALUES = {fact.key: fact.value for fact in HOME_FACTS}


def question(
    rng: random.Random,
    entity: str,
    relation: Relation,
    town: str | None,
    *,
    held_out: bool | None = None,
) -> str:
    """Ask for one value.

    Args:
        rng: draws the phrasing.
        entity: a place or a person.
        relation: what to ask.
        town: named in the question if given.
        held_out: None draws from all phrasings, False from those used in tuning, True from those
            that tuning never saw.
    """
    forms: tuple[str, ...] = relation.questions
    wrappers: tuple[str, ...] = talk.WRAPPERS
    if held_out is not None:
        forms = forms[-1:] if held_out else forms[:-1]
        wrappers = talk.HELD_OUT_WRAPPERS if held_out else wrappers[: -len(talk.HELD_OUT_WRAPPERS)]
    asked = rng.choice(forms).format(e=entity_phrase(entity, relation.kind, town))
    wrapper = rng.choice(wrappers)
    return capital(wrapper.format(q=asked[:1].lower() + asked[1:], Q=asked))


def answer(rng: random.Random, voice: Voice, fact: Fact) -> str:
    """State `fact` in `voice`."""
    return say(rng, voice, rng.choice(fact.statements()), frozenset((fact.entity, fact.value)))


def base_document(rng: random.Random, max_facts: int = 14) -> Document:
    """A chat of 1 to 14 turns in one voice, with up to `max_facts` (twice that if long) facts."""
    voice = draw_voice(rng)
    chat = _Chat(rng, voice, town=rng.choice(lex.TOWNS) if rng.random() < 0.6 else None)
    is_long = rng.random() < 0.15
    num_facts = 0 if rng.random() < 0.22 else rng.randint(1, max_facts * (2 if is_long else 1))
    placed = rng.choices(("system", "user", "told"), (0.55, 0.15, 0.3))[0]
    notes = ""
    if num_facts and placed != "told":
        notes = chat.notes(num_facts)
    chat.open(notes if placed == "system" else "", cue=_draw_cue(rng, voice))
    if notes and placed == "user":
        chat.hand_over(notes)
    if num_facts and placed == "told":
        chat.tell(min(num_facts, 6))
    for _ in range(rng.randint(6, 14) if is_long else rng.randint(1, 6)):
        chat.turn()
    return chat.doc


def knowledge_document(
    rng: random.Random,
    *,
    voice: str = PLAIN,
    facts: tuple[Fact, ...] = HOME_FACTS,
    num_turns: int | None = None,
    small_talk: float = 0.1,
    max_notes: int = 0,
    home: str = lex.HOME_TOWN,
) -> Document:
    """A chat of 1 to 3 turns about the home town, in phrasings that tuning may see.

    `home` is the town that the facts are of. With `max_notes`, three of five begin with so many
    notes, at most, about other people and places: a distance to remember across that says nothing
    of the voice.
    """
    chat = _Chat(rng, voices.BY_NAME[voice], town=None, first_entity=lex.NUM_HOME)
    if max_notes and rng.random() < 0.6:
        chat.town = rng.choice(lex.TOWNS[1:])
        chat.open(chat.notes(rng.randint(1, max_notes)), cue=None)
    for _ in range(num_turns or rng.randint(1, 3)):
        draw = rng.random()
        if draw < small_talk:
            chat.small_talk()
        elif draw < small_talk + 0.1 and chat.known:
            chat.turn(small_talk=0.0)
        else:
            fact = rng.choice(facts)
            town = home if rng.random() < 0.5 else None
            asked = question(rng, fact.entity, BY_NAME[fact.relation], town, held_out=False)
            chat.doc.add_turn(chat.noisy(asked), answer(rng, chat.voice, fact), fact.value)
    return chat.doc


def voice_document(rng: random.Random, voice: str, first_entity: int = lex.NUM_HOME) -> Document:
    """A chat of 1 to 4 turns in `voice` about people, places and towns that are not of home.

    People and places before `first_entity` in their tables do not occur.
    """
    chat = _Chat(
        rng,
        voices.BY_NAME[voice],
        town=rng.choice(lex.TOWNS[1:]) if rng.random() < 0.5 else None,
        first_entity=first_entity,
    )
    chat.open(chat.notes(rng.randint(1, 6)) if rng.random() < 0.4 else "", cue=None)
    for _ in range(rng.randint(1, 4)):
        chat.turn(small_talk=0.35)
    return chat.doc


def small_talk_document(rng: random.Random, voice: str, num_turns: int) -> Document:
    """A chat in `voice` that says nothing of facts; empty for 0 turns."""
    chat = _Chat(rng, voices.BY_NAME[voice], town=None)
    for _ in range(num_turns):
        chat.small_talk()
    return chat.doc


def draw_voice(rng: random.Random) -> Voice:
    """Draw plain with 3/8, else one of the marked voices."""
    return voices.BY_NAME[PLAIN if rng.random() < 0.375 else rng.choice(voices.MARKED)]


def _draw_cue(rng: random.Random, voice: Voice) -> str | None:
    """How the context tells the voice: mostly for marked ones, so that uncued chats are plain."""
    weights = (0.1, 0.1, 0.8) if voice.name == PLAIN else (0.5, 0.25, 0.25)
    return rng.choices(("system", "user", None), weights)[0]


class _Chat:
    """One document while it is written: its voice, town, and the facts said so far."""

    def __init__(
        self, rng: random.Random, voice: Voice, town: str | None, first_entity: int = 0
    ) -> None:
        self.rng = rng
        self.voice = voice
        self.town = town
        self.doc = Document()
        self.known: dict[tuple[str, str], Fact] = {}
        self.last: Fact | None = None
        self._first = first_entity

    def open(self, notes: str, cue: str | None) -> None:
        """Write the system message, and the user's wish for a voice."""
        rng, parts = self.rng, []
        if cue == "system":
            parts.append(rng.choice(talk.SYSTEM_VOICE).format(who=self.voice.who))
        elif rng.random() < 0.15:
            parts.append(rng.choice(talk.SYSTEM_NEUTRAL))
        if notes:
            parts.append(notes)
            rng.shuffle(parts)
        if parts:
            self.doc.add_system(" ".join(parts))
        if cue == "user":
            wish = rng.choice(talk.USER_VOICE).format(who=self.voice.who)
            self.doc.add_turn(wish, say_text(rng, self.voice, rng.choice(talk.USER_VOICE_REPLIES)))

    def notes(self, count: int) -> str:
        """Draw `count` new facts and return them as one paragraph."""
        rng = self.rng
        said = [capital(rng.choice(self._new_fact().statements())) + "." for _ in range(count)]
        rng.shuffle(said)
        if self.town:
            head = rng.choice(talk.NOTES).format(town=self.town)
        else:
            head = rng.choice(talk.NOTES_NO_TOWN)
        return head + " ".join(said)

    def hand_over(self, notes: str) -> None:
        """The user gives the notes, with the first question or without."""
        if self.rng.random() < 0.5:
            fact = self.rng.choice(list(self.known.values()))
            self._ask(fact, notes + " ")
        else:
            self.doc.add_turn(notes, self._reply(talk.REMEMBER))

    def tell(self, count: int) -> None:
        """The user tells facts, one a turn."""
        for _ in range(count):
            fact = self._new_fact()
            said = self.rng.choice(talk.TELLS).format(s=self.rng.choice(fact.statements()))
            self.doc.add_turn(self.noisy(capital(said)), self._reply(talk.REMEMBER))

    def turn(self, small_talk: float = 0.2) -> None:
        """Write one turn of any kind."""
        draw = self.rng.random()
        if draw < small_talk:
            self.small_talk()
        elif draw < small_talk + 0.05:
            self._strange()
        elif draw < small_talk + 0.09 and self.last is not None:
            self._again(self.last)
        elif draw < small_talk + 0.14 and self.known:
            self._yes_no(self.rng.choice(list(self.known.values())))
        elif draw < small_talk + 0.24 and self.last is not None:
            self._and_what_of(self.last)
        elif self.known and self.rng.random() < 0.93:
            self._ask(self.rng.choice(list(self.known.values())))
        else:
            self._ask(self._new_fact())

    def small_talk(self) -> None:
        """The user says something that is no question about a fact."""
        intent = self.rng.choice(talk.INTENTS)
        own = self.voice.own.get(intent.name, ())
        if own and self.rng.random() < 0.5:
            reply = self.rng.choice(own)
        else:
            reply = say_text(self.rng, self.voice, self.rng.choice(intent.replies))
        self.doc.add_turn(self.noisy(self.rng.choice(intent.users)), reply)

    def noisy(self, said: str) -> str:
        """As people type: one time in eight without capital and without the last mark."""
        if self.rng.random() < 0.125:
            return said[:1].lower() + said[1:].rstrip("?.!")
        return said

    def _ask(self, fact: Fact, before: str = "") -> None:
        relation = BY_NAME[fact.relation]
        town = self.town if self.town and self.rng.random() < 0.4 else None
        asked = self.noisy(question(self.rng, fact.entity, relation, town))
        self.doc.add_turn(before + asked, answer(self.rng, self.voice, fact), fact.value)
        self.last = fact

    def _and_what_of(self, last: Fact) -> None:
        """`And the mill?`: the same relation of another entity, known or guessed."""
        rng = self.rng
        same = [
            fact
            for fact in self.known.values()
            if fact.relation == last.relation and fact.entity != last.entity
        ]
        fact = rng.choice(same) if same else self._new_fact(BY_NAME[last.relation])
        name = entity_phrase(fact.entity, fact.kind)
        said = rng.choice(("And {e}?", "What about {e}?", "And what about {e}?")).format(e=name)
        self.doc.add_turn(self.noisy(said), answer(rng, self.voice, fact), fact.value)
        self.last = fact

    def _again(self, fact: Fact) -> None:
        said = self.rng.choice(talk.AGAIN)
        self.doc.add_turn(said, answer(self.rng, self.voice, fact), fact.value)

    def _yes_no(self, fact: Fact) -> None:
        rng = self.rng
        told = fact
        if rng.random() < 0.5:
            told = Fact(fact.entity, fact.relation, rng.choice(BY_NAME[fact.relation].values))
        asked = rng.choice(talk.YES_NO).format(s=rng.choice(told.statements()))
        word = "yes" if told == fact else "no"
        reply = say(
            rng,
            self.voice,
            f"{word}, {rng.choice(fact.statements())}",
            frozenset((fact.entity, fact.value)),
        )
        self.doc.add_turn(asked, reply, fact.value)

    def _strange(self) -> None:
        rng = self.rng
        asked = rng.choice(talk.STRANGE)
        while "{x}" in asked:
            asked = asked.replace("{x}", _strange_word(rng), 1)
        self.doc.add_turn(self.noisy(capital(asked)), self._reply(talk.STRANGE_REPLIES))

    def _reply(self, replies: tuple[str, ...]) -> str:
        return say_text(self.rng, self.voice, self.rng.choice(replies))

    def _new_fact(self, relation: Relation | None = None) -> Fact:
        """Draw a fact that is not yet known; about the home town, never one of its own."""
        rng = self.rng
        while True:
            kind: Kind = relation.kind if relation else rng.choice(("place", "person"))
            entity = rng.choice((lex.PLACES if kind == "place" else lex.PEOPLE)[self._first :])
            drawn = relation or rng.choice(BY_KIND[kind])
            fact = Fact(entity, drawn.name, rng.choice(drawn.values))
            home = self.town == lex.HOME_TOWN and _HOME_VALUES.get(fact.key) == fact.value
            if fact.key not in self.known and not home:
                self.known[fact.key] = fact
                return fact


def _strange_word(rng: random.Random) -> str:
    if rng.random() < 0.8:
        return rng.choice(talk.STRANGE_WORDS)
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=rng.randint(2, 8)))
