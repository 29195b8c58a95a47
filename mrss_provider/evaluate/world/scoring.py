"""Judge an answer: does it state the right fact, and does it speak in the wanted voice?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from mrss_provider.evaluate.world import lexicon as lex
from mrss_provider.evaluate.world import relations, smalltalk, voices
from mrss_provider.evaluate.world.relations import Fact, entity_phrase
from mrss_provider.evaluate.world.voices import PLAIN, Voice, capital, translate

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_SLOT = "VALUE"


@dataclass(frozen=True)
class Score:
    """One answer to one question.

    Attributes:
        know: the right value is there, and no other value of the same relation.
        marked: at least one marker of the wanted voice and none of another.
        tone: `marked`, and the whole answer is a sentence of that voice.
        well_formed: the whole answer is a sentence of some voice.
        both: `know` and `tone`.
        template: which opener, statement and closer, for diversity; None if not well formed.
    """

    know: bool
    marked: bool
    tone: bool
    well_formed: bool
    template: tuple[str, int, str, str] | None

    @property
    def both(self) -> bool:
        """The fact and the voice in one answer."""
        return self.know and self.tone


def score_answer(text: str, fact: Fact, voice: str) -> Score:
    """Judge `text`, an answer to a question about `fact`, against `voice`.

    A plain answer is `marked` if it has no marker of any voice.
    """
    text = text.split("\n\n")[0].strip()
    found = voices_in(text)
    marked = not found if voice == PLAIN else found == {voice}
    matches = {name: _parse(text, fact, name) for name in voices.BY_NAME}
    template = matches[voice] or next((m for m in matches.values() if m), None)
    return Score(
        know=_knows(text, fact),
        marked=marked,
        tone=marked and matches[voice] is not None,
        well_formed=template is not None,
        template=template,
    )


def voices_in(text: str) -> set[str]:
    """Return the marked voices of which `text` has at least one marker."""
    words = {word.lower() for word in _WORD.findall(text)}
    return {name for name in voices.MARKED if words & markers(name)}


@cache
def markers(voice: str) -> frozenset[str]:
    """Return the words (lower case) that only `voice` uses."""
    own = _voice_words(voices.BY_NAME[voice])
    others = [_voice_words(v) for v in voices.VOICES if v.name != voice]
    return frozenset(own.difference(*others, _common_words()))


def _voice_words(voice: Voice) -> set[str]:
    phrases = [*voice.openers, *voice.closers, *voice.words.values()]
    phrases += [reply for replies in voice.own.values() for reply in replies]
    return _words(phrases)


@cache
def _common_words() -> frozenset[str]:
    phrases = [form for r in relations.RELATIONS for form in (*r.questions, *r.statements)]
    phrases += [said for i in smalltalk.INTENTS for said in (*i.users, *i.replies)]
    phrases += [*smalltalk.STRANGE_REPLIES, *smalltalk.REMEMBER, *smalltalk.USER_VOICE_REPLIES]
    phrases += [*lex.PLACES, *lex.TOWNS, "yes no"]
    phrases += [value for r in relations.RELATIONS for value in r.values]
    return frozenset(_words(phrases))


def _words(phrases: list[str]) -> set[str]:
    return {word.lower() for phrase in phrases for word in _WORD.findall(phrase)}


def _knows(text: str, fact: Fact) -> bool:
    values = set(relations.BY_NAME[fact.relation].values)
    said = {word for word in _WORD.findall(text) if word in values and word != fact.entity}
    return said == {fact.value}


def _parse(text: str, fact: Fact, voice: str) -> tuple[str, int, str, str] | None:
    """Return (voice, statement, opener, closer) if `text` is a sentence about the fact's key."""
    for number, pattern in enumerate(_patterns(fact.entity, fact.relation, voice)):
        match = pattern.fullmatch(text)
        if match:
            return voice, number, match["opener"] or match["opener_anew"] or "", match["closer"]
    return None


@cache
def _patterns(entity: str, relation: str, voice: str) -> tuple[re.Pattern[str], ...]:
    """One pattern a statement: opener, the statement with any value, closer."""
    spoken = voices.BY_NAME[voice]
    values = "|".join(map(re.escape, relations.BY_NAME[relation].values))
    goes_on = [o for o in spoken.openers if o[-1] not in ".!"]
    anew = [o for o in spoken.openers if o[-1] in ".!"]
    inline = _any([c for c in spoken.closers if c.startswith(",")])
    after = _any([" " + c for c in spoken.closers if not c.startswith(",")])
    patterns = []
    name = entity_phrase(entity, relations.BY_NAME[relation].kind)
    for form in relations.BY_NAME[relation].statements:
        said = translate(spoken, form.format(e=name, v=_SLOT), frozenset((entity, _SLOT)))
        lower, upper = (re.escape(s).replace(_SLOT, f"(?:{values})") for s in (said, capital(said)))
        start = f"(?P<opener>{_any([o + ' ' for o in goes_on])})(?:{lower})"
        start_anew = f"(?P<opener_anew>{_any([o + ' ' for o in anew])}|)(?:{upper})"
        body = f"(?:{start}|{start_anew})(?P<closer>{inline}|\\.(?:{after})|\\.)"
        patterns.append(re.compile(body))
    return tuple(patterns)


def _any(choices: list[str]) -> str:
    return "|".join(map(re.escape, choices)) if choices else "(?!)"
