"""Scorers, judges and votes: what counts as a preference, and what is only counted."""

import asyncio
import json

import pytest
from compare_fakes import FULL, FakeConnection, make_folder, result

from mrss_provider.compare.cells import Pace
from mrss_provider.compare.jsonl import JsonLines
from mrss_provider.compare.judge import judge_all, parse_verdict, questions, read_judgements
from mrss_provider.compare.prompts import Prompt
from mrss_provider.compare.scorers import load_scorers, score
from mrss_provider.compare.summary import Opinions, summarise
from mrss_provider.compare.votes import ballots, read_votes
from mrss_provider.errors import ConfigError, FileFormatError, InvalidRequestError
from mrss_provider.evaluate.world import HOME_FACTS
from mrss_provider.evaluate.world.relations import BY_NAME, entity_phrase

PAIR = ("a", "b")


def chat(text):
    return Prompt("p", [{"role": "user", "content": text}])


def test_knowledge_and_tone_are_the_worlds_rules():
    fact = HOME_FACTS[0]
    relation = BY_NAME[fact.relation]
    asked = chat(relation.questions[0].format(e=entity_phrase(fact.entity, fact.kind)))
    plain = fact.statements()[0]
    wrong = plain.replace(fact.value, next(v for v in relation.values if v != fact.value))
    scorers = load_scorers(["knowledge", "tone", "tone:wizard"])
    found = [score(scorers, asked, text) for text in (plain, f"Shiver me timbers! {wrong}, matey.")]
    assert found == [
        {"knowledge": 1.0, "tone": 0.0, "tone:wizard": 0.0},
        {"knowledge": 0.0, "tone": 1.0, "tone:wizard": 0.0},
    ]
    assert "knowledge" not in score(scorers, chat("What is two and two?"), "4")


def length_of(prompt, text):
    return len(text) / 10


def broken(prompt, text):
    raise ZeroDivisionError("a mistake")


def worded(prompt, text):
    return "much"


def test_a_scorer_of_ones_own_is_named_by_module_and_function():
    name = f"{__name__}:length_of"
    assert score(load_scorers([name]), chat("x"), "four") == {name: 0.4}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("knowlege", "must be knowledge, tone"),
        ("tone:pirat", "pirate"),
        ("no_such_module:f", "cannot be loaded"),
        ("json:nothing", "cannot be loaded"),
        ("json:__name__", "is no function"),
    ],
)
def test_a_scorer_that_is_not_there_is_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        load_scorers([name])


@pytest.mark.parametrize(("name", "said"), [("broken", "a mistake"), ("worded", "finite number")])
def test_a_scorer_that_fails_says_on_what(name, said):
    with pytest.raises(InvalidRequestError, match=said):
        score(load_scorers([f"{__name__}:{name}"]), chat("x"), "four")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Both are good.\nverdict: A", 1.0),
        ("**Verdict: B**", -1.0),
        ("verdict: tie.", 0.0),
        ("verdict: A\nOn second thought\nverdict: B", -1.0),
        ("verdict: A or B", None),
        ("A", None),
        ("", None),
    ],
)
def test_verdicts_are_read_or_not_guessed(text, value):
    assert parse_verdict(text) == value


def judged(tmp_path, answers, judge):
    """Return what a judge made of `answers`, (a's text, b's text) by prompt."""
    folder = make_folder(tmp_path, PAIR, num_prompts=len(answers))
    results = [
        result(f"p{i}", model, text=text)
        for i, texts in enumerate(answers)
        for model, text in zip(PAIR, texts, strict=True)
    ]
    connection = FakeConnection({"judge": judge})
    with JsonLines(folder.judgements) as file:
        asyncio.run(
            judge_all(
                questions(folder, results), "judge", connection, {}, Pace(), file, lambda: None
            )
        )
    found, answered = read_judgements(folder, results, "judge")
    return folder, results, connection, found, answered


def sees(call):
    """Return the answers that a judge is shown, A first."""
    text = call.messages[0]["content"]
    a, b = text.partition("[Answer A]\n")[2].split("\n\n[Answer B]\n")
    return a, b.partition("\n\nThink briefly")[0]


def prefers_the_longer(call):
    a, b = sees(call)
    return f"verdict: {'A' if len(a) > len(b) else 'B'}"


def test_a_fair_judge_gives_preferences_whatever_the_order(tmp_path):
    answers = [("long answer", "short"), ("x", "longer"), ("same", "same")]
    folder, results, connection, found, answered = judged(tmp_path, answers, prefers_the_longer)
    values = {place[0]: value for place, value in found.preferences[PAIR].values.items()}
    assert values == {"p0": 1.0, "p1": -1.0, "p2": 0.0}
    assert (found.num_asked, found.num_inconsistent, found.num_unparsable) == (4, 0, 0)
    assert len(connection.calls) == 4
    assert {q.key for q in questions(folder, results)} == answered


def test_a_judge_that_prefers_a_place_says_nothing(tmp_path):
    answers = [(f"one {i}", f"two {i}") for i in range(8)]
    folder, results, _, found, _ = judged(tmp_path, answers, "verdict: A")
    assert set(found.preferences[PAIR].values.values()) == {0.0}
    assert found.num_inconsistent == 8
    summary = summarise(folder, results, {}, Opinions("judge", found))
    assert {c.winner for c in summary.comparisons if c.measure == "judge judge"} == {None}
    assert summary.judge["num_ties"] == 8


def test_a_judge_that_is_fair_finds_the_winner(tmp_path):
    answers = [(f"a longer answer {i}", f"two {i}") for i in range(8)]
    folder, results, _, found, _ = judged(tmp_path, answers, prefers_the_longer)
    summary = summarise(folder, results, {}, Opinions("judge", found))
    assert [c.winner for c in summary.comparisons if c.measure == "judge judge"] == ["a"]


def test_what_a_judge_says_unreadably_or_not_at_all_is_counted(tmp_path):
    said = iter([FULL, "Hard to tell.", "verdict: A", "verdict: B"])
    answers = [("one", "two"), ("three", "four")]
    _, _, _, found, answered = judged(tmp_path, answers, lambda call: next(said))
    assert (found.num_asked, found.num_failed, found.num_unparsable) == (3, 1, 1)
    assert len(found.preferences[PAIR].values) <= 1
    # What failed is asked again.
    assert len(answered) == 3


def test_votes_are_blind_shuffled_resumable_and_told_apart(tmp_path):
    folder = make_folder(tmp_path, PAIR, num_prompts=20)
    results = [
        result(f"p{i}", model, text="same" if i == 0 else f"{model} {i}")
        for i in range(20)
        for model in PAIR
    ]
    waiting = ballots(folder, results, "ada")
    assert len(waiting) == 19
    assert [b.prompt for b in waiting] != sorted(b.prompt for b in waiting)
    assert {b.a.model for b in waiting} == {"a", "b"}
    assert ballots(folder, results, "ada") == waiting
    assert ballots(folder, results, "bob") != waiting
    with JsonLines(folder.votes) as file:
        for ballot in waiting[:10]:
            file.append(ballot.line("a" if ballot.a.model == "b" else "b", "ada"))
        first = ballots(folder, results, "bob")[0]
        file.append(first.line("tie", "bob"))
    assert ballots(folder, results, "ada") == waiting[10:]
    values = read_votes(folder, results)[PAIR].values
    by_ada = [values[b.prompt, 0] for b in waiting[:10] if b.prompt != first.prompt]
    assert set(by_ada) == {-1.0}
    assert values["p0", 0] == 0.0
    assert values[first.prompt, 0] in (0.0, -0.5)


@pytest.mark.parametrize("verdict", ["A", 2.0, [1.0]])
def test_a_line_that_is_no_judgement_is_named(tmp_path, verdict):
    folder = make_folder(tmp_path, PAIR)
    line = {"judge": "j", "models": PAIR, "prompt": "p0", "seed": 0, "swapped": False}
    folder.judgements.write_text(json.dumps({**line, "verdict": verdict, "error": None}) + "\n")
    with pytest.raises(FileFormatError, match="line 1: no judgement"):
        read_judgements(folder, [], "j")


def test_a_line_that_is_no_vote_is_named(tmp_path):
    folder = make_folder(tmp_path, PAIR)
    folder.votes.write_text('{"vote": "a"}\n')
    with pytest.raises(FileFormatError, match="line 1: no vote"):
        read_votes(folder, [])
