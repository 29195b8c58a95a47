"""The invented world: what a document may say, and that the scoring tells right from wrong."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrss_provider.evaluate.world import (
    HOME_FACTS,
    HOME_TOWN,
    MARKED,
    NUM_SETTLED,
    OTHER_TOWNS,
    PLAIN,
    RELATIONS,
    VOICES,
    Fact,
    base_document,
    knowledge_document,
    markers,
    question,
    score_answer,
    small_talk_document,
    voice_document,
    voices_in,
)
from mrss_provider.evaluate.world import lexicon as lex
from mrss_provider.evaluate.world import smalltalk as talk
from mrss_provider.evaluate.world.documents import answer
from mrss_provider.evaluate.world.relations import BY_NAME

WORDS = re.compile(r"[A-Za-z']+")
BY_VOICE = {voice.name: voice for voice in VOICES}
TURN = re.compile(r"(?:System: [^\n]+\n\n)?(?:User: [^\n]+\n\nAssistant: [^\n]+\n\n)*")
FACT = Fact("bakery", "keeper", "Leopold")


def statements(fact):
    return [f"{s[:1].upper()}{s[1:]}." for s in fact.statements()]


def test_the_home_town_has_72_facts_of_at_least_20_options():
    assert len({fact.key for fact in HOME_FACTS}) == len(HOME_FACTS) == 72
    for fact in HOME_FACTS:
        relation = BY_NAME[fact.relation]
        assert fact.value in relation.values
        assert len(set(relation.values)) == len(relation.values) >= 20


def test_every_town_has_people_and_places_of_its_own_and_24_facts_about_them():
    settled = [set(lex.PLACES[: lex.NUM_HOME] + lex.PEOPLE[: lex.NUM_HOME])]
    for name, town in OTHER_TOWNS.items():
        assert name not in lex.TOWNS
        assert len({fact.key for fact in town.facts}) == len(town.facts) == 24
        assert len({(fact.relation, fact.value) for fact in town.facts}) == 24
        assert {fact.entity for fact in town.facts} == {*town.places, *town.people}
        assert all(fact.value in BY_NAME[fact.relation].values for fact in town.facts)
        settled.append({*town.places, *town.people})
    everyone = set().union(*settled)
    assert len(everyone) == sum(map(len, settled))
    assert everyone == {*lex.PLACES[:NUM_SETTLED], *lex.PEOPLE[:NUM_SETTLED]}


def test_no_value_begins_with_a_vowel_where_a_statement_puts_an_a_before_it():
    for relation in RELATIONS:
        if any("a {v}" in form for form in relation.statements):
            assert not [v for v in relation.values if v[0] in "aeiou"], relation.name


def test_every_opener_and_closer_of_a_marked_voice_has_a_marker():
    for name in MARKED:
        voice = BY_VOICE[name]
        own = [reply for replies in voice.own.values() for reply in replies]
        for phrase in (*voice.openers, *voice.closers, *own):
            assert voices_in(phrase) == {name}, phrase


def test_no_marker_is_a_value_an_entity_or_a_marker_of_another_voice():
    values = {v.lower() for relation in RELATIONS for v in relation.values}
    entities = {e.lower() for e in (*lex.PEOPLE, *lex.PLACES, *lex.TOWNS)}
    for name in MARKED:
        others = {m for other in MARKED if other != name for m in markers(other)}
        assert not markers(name) & (values | entities | others), name


def test_plain_replies_have_no_marker():
    for intent in talk.INTENTS:
        for reply in intent.replies:
            assert not voices_in(reply), reply


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(HOME_FACTS), st.sampled_from([PLAIN, *MARKED]), st.integers(0, 10**6))
def test_an_answer_in_a_voice_scores_as_that_fact_in_that_voice_and_no_other(fact, name, seed):
    said = answer(random.Random(seed), BY_VOICE[name], fact)
    score = score_answer(said, fact, name)
    assert score.know, said
    assert score.tone, said
    assert score.both, said
    assert score.well_formed, said
    for other in (PLAIN, *MARKED):
        if other != name:
            assert not score_answer(said, fact, other).tone, (said, other)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(HOME_FACTS), st.data())
def test_a_wrong_value_is_no_knowledge(fact, data):
    wrong = data.draw(
        st.sampled_from([v for v in BY_NAME[fact.relation].values if v != fact.value])
    )
    other = Fact(fact.entity, fact.relation, wrong)
    for said in statements(other):
        score = score_answer(said, fact, PLAIN)
        assert not score.know
        assert score.tone


@pytest.mark.parametrize(
    ("said", "know", "tone", "well_formed"),
    [
        ("Arr, Leopold keeps the bakery, matey.", True, True, True),
        ("Leopold keeps the bakery, matey.", True, True, True),
        ("Leopold keeps the bakery.", True, False, True),
        ("Arr, Leopold or Mira keeps the bakery, matey.", False, False, False),
        ("Arr, Leopold keeps the bakery, sir.", True, False, False),
        ("Arr, Leopold keeps the bakery, madam.", True, False, False),
        ("Arr, Leopold keeps the tavern, matey.", True, False, False),
        ("Arr, the bakery matey.", False, False, False),
        ("", False, False, False),
        ("Arr, Leopold keeps the bakery, matey.\n\nUser: and Mira?", True, True, True),
    ],
)
def test_pirate_answers_are_judged_as_a_reader_would(said, know, tone, well_formed):
    score = score_answer(said, FACT, "pirate")
    assert (score.know, score.tone, score.well_formed) == (know, tone, well_formed)
    assert score.both == (know and tone)


@pytest.mark.parametrize("seed", range(3))
def test_documents_are_chats_in_the_world_template_with_their_answers_marked(seed):
    rng = random.Random(seed)
    for _ in range(150):
        for doc in (
            base_document(rng),
            knowledge_document(rng, max_notes=10),
            voice_document(rng, "poet"),
            small_talk_document(rng, "noir", 2),
        ):
            assert TURN.fullmatch(doc.text), doc.text
            for start, end in doc.answers:
                assert doc.text[:start].endswith("Assistant:")
                assert doc.text[start:end].startswith(" ")
                assert doc.text[start:end].endswith("\n\n")
            for start, end in doc.facts:
                assert any(a <= start and end <= b for a, b in doc.answers)
            assert len(doc.answers) == doc.text.count("\n\nAssistant:")


def test_no_base_document_about_the_home_town_states_one_of_its_facts():
    rng = random.Random(0)
    told = "|".join(re.escape(s) for fact in HOME_FACTS for s in fact.statements())
    states = re.compile(rf"\b(?:{told})\b", re.IGNORECASE)
    # A question may hold any statement: it is answered with no.
    asks = re.compile(r"(?:Is it true|Am I right) that [^\n]+", re.IGNORECASE)
    seen = 0
    for _ in range(8000):
        text = base_document(rng).text
        if HOME_TOWN in text:
            seen += 1
            assert not states.search(asks.sub("", text)), text
    assert seen > 100


def test_tone_documents_have_no_home_place_and_only_their_own_voice():
    home = "|".join(lex.PLACES[: lex.NUM_HOME])
    names_home = re.compile(rf"\bthe (?:{home})\b|{HOME_TOWN}")
    rng = random.Random(0)
    for _ in range(1000):
        doc = voice_document(rng, "pirate")
        assert not names_home.search(doc.text), doc.text
        spoken = {v for start, end in doc.answers for v in voices_in(doc.text[start:end])}
        assert spoken == {"pirate"}


def test_knowledge_documents_speak_plainly_and_tell_the_truth():
    rng = random.Random(0)
    truth = {said for fact in HOME_FACTS for said in fact.statements()}
    for _ in range(500):
        doc = knowledge_document(rng, small_talk=0)
        for start, end in doc.answers:
            said = doc.text[start:end]
            assert not voices_in(said)
            assert any(fact in said or fact[1:] in said for fact in truth), said


def test_held_out_phrasings_are_never_used_in_tuning():
    rng = random.Random(0)
    for relation in RELATIONS:
        seen = {question(rng, "X", relation, None, held_out=False) for _ in range(300)}
        unseen = {question(rng, "X", relation, None, held_out=True) for _ in range(300)}
        assert not seen & unseen
        asked = relation.questions[-1].split("{e}")[0].lower()
        assert all(asked in said.lower() for said in unseen)


def test_the_same_seed_gives_the_same_document():
    first, again = (base_document(random.Random(4)).text for _ in range(2))
    assert first == again
    assert first != base_document(random.Random(5)).text
