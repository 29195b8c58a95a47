"""Tasks: what is judged by is never chosen on; own files are read, or refused by line."""

import json

import pytest

from mrss_provider.errors import InvalidRequestError
from mrss_provider.evaluate.own_task import OwnTask
from mrss_provider.evaluate.task import WorldTask
from mrss_provider.evaluate.tone import ToneClassifier

PLACES = ["mill", "bakery", "inn", "pier", "school"]
STREETS = ["Canal", "Mill", "North", "South", "Hill"]
PLAIN = [f"The {place} is on {street} Street." for place in PLACES for street in STREETS]
TONED = [f"Arr, {text[:-1].lower()}, matey!" for text in PLAIN]


@pytest.fixture
def own(tmp_path):
    """Return a function that writes both files and reads them."""

    def write(knowledge, tone):
        for name, lines in (("knowledge", knowledge), ("tone", tone)):
            texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(texts))
        return OwnTask.read(tmp_path / "knowledge.jsonl", tmp_path / "tone.jsonl")

    return write


FACTS = [
    {"question": f"Who keeps number {i}?", "answers": [f"Ann{i}"], "wrong": ["Bob"]}
    for i in range(12)
]
TEXTS = [{"text": text} for text in TONED] + [{"text": text, "tone": False} for text in PLAIN]


def test_no_fact_is_both_chosen_on_and_judged_by():
    task = WorldTask()
    dev, test = ({q.fact for q in task.questions(part, 1, seed=0)} for part in ("dev", "test"))
    assert not dev & test
    assert (len(dev), len(test)) == (task.num_facts("dev"), task.num_facts("test"))


def test_a_text_that_states_a_fact_in_the_voice_is_judged_as_both_and_a_plain_one_is_not():
    task = WorldTask()
    asked = {q.fact: q for q in task.questions("test", 1, seed=0)}
    for given in task.given_answers("test", seed=0, toned=True):
        judged = task.judge(asked[given.fact], given.text)
        assert judged.both, given.text
        (span,) = given.facts
        value = given.text[span.start : span.stop].strip()
        assert value
        assert not task.judge(asked[given.fact], given.text.replace(value, "nothing")).know
    for given in task.given_answers("test", seed=0, toned=False):
        judged = task.judge(asked[given.fact], given.text)
        assert (judged.know, judged.tone) == (True, False)


def test_other_talk_comes_before_the_question_and_changes_nothing_else():
    task = WorldTask(facts=2)
    near = task.questions("test", 1, seed=0)
    far = task.questions("test", 1, seed=0, turns=3, history="toned")
    assert [len(q.messages) for q in near] == [1, 1]
    assert [len(q.messages) for q in far] == [7, 7]
    assert [q.fact for q in near] == [q.fact for q in far]


def test_own_answers_are_right_by_whole_words_and_without_wrong_ones(own):
    task = own(FACTS, TEXTS)
    asked = task.questions("test", 1, seed=0)[0]
    assert asked.fact == 1
    assert task.judge(asked, "Arr, ann1 keeps it, matey!").both
    assert not task.judge(asked, "Arr, ann12 keeps it, matey!").know
    assert not task.judge(asked, "Arr, ann1 or Bob, matey!").know
    assert not task.judge(asked, "Ann1 keeps the mill.").tone
    assert task.tone.held_out_accuracy >= 0.9


def test_markers_are_enough_for_a_manner(own):
    task = own(FACTS, [{"markers": [r"\barr\b", "matey"]}])
    asked = task.questions("test", 1, seed=0)[0]
    assert task.judge(asked, "Arr, it is Ann1.").both
    assert not task.judge(asked, "It is Ann1.").tone


def test_without_texts_there_is_no_talk_and_a_task_says_so(own):
    by_markers = own(FACTS, [{"markers": ["matey"]}])
    assert not by_markers.has_talk("toned")
    assert not by_markers.has_talk("plain")
    by_texts = own(FACTS, TEXTS)
    assert by_texts.has_talk("toned")
    assert len(by_texts.questions("test", 1, seed=0, turns=2, history="toned")[0].messages) == 5


def test_another_answer_in_the_files_is_another_task(own):
    first = own(FACTS, TEXTS)
    second = own([{**FACTS[0], "answers": ["Zoe"]}, *FACTS[1:]], TEXTS)
    assert first.title == second.title
    assert first.identity != second.identity
    assert own(FACTS, TEXTS).identity == first.identity


def test_a_character_that_unicode_ends_lines_with_does_not_end_one_of_json(own, tmp_path):
    task = own(
        [json.dumps({**FACTS[0], "question": "Who\u2028is it?"}, ensure_ascii=False), *FACTS[1:]],
        TEXTS,
    )
    assert task.num_facts("dev") == 6


def test_a_voice_that_is_not_there_is_refused_by_name():
    with pytest.raises(InvalidRequestError, match=r"--voice must be one of .*pirate.*'plain'"):
        WorldTask("plain")


@pytest.mark.parametrize(
    ("knowledge", "tone", "told"),
    [
        (FACTS[:11], TEXTS, "12 questions or more"),
        ([*FACTS, "nonsense"], TEXTS, "line 13: not JSON"),
        ([*FACTS, "[" * 100_000], TEXTS, "line 13: not JSON"),
        ([*FACTS, "[]"], TEXTS, "line 13: must be an object"),
        ([*FACTS, {"question": "Who?"}], TEXTS, "line 13: answers must be a list"),
        ([*FACTS, {"question": "Who?", "answers": []}], TEXTS, "line 13: answers must have one"),
        ([*FACTS, {"question": " ", "answers": ["x"]}], TEXTS, "line 13: question must be a text"),
        ([*FACTS, {**FACTS[0], "wrongs": []}], TEXTS, "line 13: 'wrongs' is none of question"),
        (FACTS, [{"text": "Arr", "tone": "no"}], "line 1: tone must be true or false, got 'no'"),
        (FACTS, TEXTS[:30], 'with "tone": false'),
        ([*FACTS, {"question": "\ud83d?", "answers": ["x"]}], TEXTS, "question has half of a"),
        (FACTS, [{"markers": ["("]}], "line 1: '(' is no regular expression"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_by_line(own, knowledge, tone, told):
    with pytest.raises(InvalidRequestError) as caught:
        own(knowledge, tone)
    assert told in str(caught.value)


def test_a_classifier_of_noise_is_no_better_than_a_coin():
    words = ["red", "green", "blue", "tall", "small", "old", "new", "fast", "slow", "warm"]
    texts = [" ".join(words[(i * k) % 10] for k in range(1, 6)) for i in range(80)]
    same = ToneClassifier.train(texts[:40], texts[:40])
    assert same.held_out_accuracy <= 0.6
