"""What `mrss tune` learns from: lines checked, parted, put at a distance, and made into batches."""

import json

import pytest
from tiny_model import vocabulary, write_vocabulary

from mrss_provider.backend import Message
from mrss_provider.chat import TEMPLATES
from mrss_provider.errors import FileFormatError, InvalidRequestError
from mrss_provider.tokenizer import Tokenizer
from mrss_provider.tune.chats import MAX_PROBLEMS, read_lines, read_prompts
from mrss_provider.tune.dataset import (
    Batches,
    DataSet,
    examine,
    fixed_batches,
    split_lines,
    usable,
    with_distance,
)

WORLD = TEMPLATES["world"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = write_vocabulary(tmp_path_factory.mktemp("data") / "vocab.txt", vocabulary())
    return Tokenizer.load(path)


@pytest.fixture
def read(tmp_path, tokenizer):
    def read(lines, reader=read_lines):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(json.dumps(line) for line in lines))
        return reader(path, tokenizer, WORLD)

    return read


def pairs(count):
    return [{"prompt": f"the cat {i}?", "response": "red dog " * (1 + i % 7)} for i in range(count)]


def said(example, flags, tokenizer):
    ids = [token for token, flag in zip(example.token_ids, flags, strict=True) if flag]
    return tokenizer.decode_bytes(ids).decode()


def test_every_bad_line_is_named_up_to_a_bound(read):
    bad = [{"prompt": "a"}, {"messages": 3}, *[{"text": ""}] * MAX_PROBLEMS]
    with pytest.raises(FileFormatError) as error:
        read([{"text": "fine"}, *bad])
    message = str(error.value)
    assert f"{len(bad)} lines are wrong" in message
    assert "\n  line 2: 'prompt' and 'response' go together" in message
    assert "\n  line 3: 'messages' must be a list" in message
    assert message.endswith("\n  and 2 more")
    assert message.count("\n  line ") == MAX_PROBLEMS


def test_prompts_are_read_with_their_answers_left_out(read):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompts = read(
        [{"prompt": "a"}, {"prompt": "a", "response": "b"}, {"messages": talk}], read_prompts
    )
    assert prompts == [[Message("user", "a")]] * 3
    with pytest.raises(FileFormatError, match="line 1: a prompt ends with what the user says"):
        read([{"text": "a"}], read_prompts)


def test_what_is_odd_about_the_data_is_counted(read):
    lines = read([*pairs(6), pairs(1)[0], {"text": "red " * 40}])
    kept, dropped = usable(lines, 30, on_all=False)
    assert dropped == 0
    found = examine(DataSet(tuple(kept), 30), DataSet((lines[1],), 30), dropped)
    assert (found.examples, found.held_out, found.duplicates) == (8, 1, 1)
    assert found.leaked == (2,)
    assert found.cut == sum(len(line.example.token_ids) > 31 for line in lines) > 0
    assert sum(found.lengths.values()) == 8


def test_an_example_whose_answer_is_cut_off_is_left_out_and_all_of_them_are_refused(read):
    lines = read([{"prompt": "cat " * 30, "response": "no"}, {"prompt": "a", "response": "b"}])
    kept, dropped = usable(lines, 20, on_all=False)
    assert [line.number for line in kept] == [2]
    assert dropped == 1
    with pytest.raises(InvalidRequestError, match="within max_len 3"):
        usable(lines, 3, on_all=False)


def test_equal_lines_are_never_parted(read):
    lines = read([*pairs(10), *pairs(10)])
    for seed in range(5):
        learnt, judged = split_lines(lines, 0.3, seed)
        assert len(learnt) + len(judged) == 20
        assert len(judged) == 6
        assert not {x.example.token_ids for x in learnt} & {x.example.token_ids for x in judged}
    with pytest.raises(InvalidRequestError, match="cannot be parted"):
        split_lines(lines[:1] * 3, 0.3, 0)


def test_an_epoch_has_every_example_once_and_a_step_always_the_same(read):
    data = DataSet(tuple(read(pairs(23))), 512)
    batches = Batches(data, 4, seed=3)
    assert batches.per_epoch == 6
    epochs = [[e for step in range(6) for e in batches(6 * epoch + step)] for epoch in range(2)]
    for examples in epochs:
        assert sorted(e.token_ids for e in examples) == sorted(
            line.example.token_ids for line in data.lines
        )
    assert epochs[0] != epochs[1]
    again = Batches(data, 4, seed=3)
    assert [again(step) for step in (11, 2, 7)] == [batches(step) for step in (11, 2, 7)]
    assert [Batches(data, 4, seed=4)(step) for step in range(6)] != [batches(s) for s in range(6)]


def test_examples_of_a_batch_are_of_like_length(read):
    data = DataSet(tuple(read(pairs(64))), 512)
    batches = Batches(data, 8, seed=0)
    spreads = [
        max(sizes) - min(sizes)
        for step in range(8)
        if (sizes := [len(example.token_ids) for example in batches(step)])
    ]
    everything = [len(line.example.token_ids) for line in data.lines]
    assert max(everything) - min(everything) >= 12
    assert max(spreads) <= 4


def test_held_out_batches_do_not_change(read):
    data = DataSet(tuple(read(pairs(60))), 512)
    assert fixed_batches(data, 8, 1) == fixed_batches(data, 8, 1)
    assert sum(map(len, fixed_batches(data, 8, 1))) == 48


@pytest.mark.parametrize("counts", [False, True])
def test_other_talk_comes_before_a_chat_and_states_none_of_its_facts(read, tokenizer, counts):
    system = {"role": "system", "content": "Be brief."}
    chat = [
        system,
        {"role": "user", "content": "the cat?"},
        {"role": "assistant", "content": "red"},
    ]
    lines = read([{"messages": chat, "facts": ["red"]}])
    others = read([{"prompt": "the dog?", "response": "not red"}])
    data = with_distance(
        DataSet(tuple(lines), 60), 80, others, counts=counts, tokenizer=tokenizer, template=WORLD
    )
    drawn = {e.token_ids: e for step in range(40) for e in Batches(data, 1, seed=2)(step)}
    assert len(drawn) > 2
    for example in drawn.values():
        text = tokenizer.decode_bytes(list(example.token_ids)).decode()
        before = text.count("not red")
        assert text.startswith("System: Be brief.\n\nUser: the ")
        assert text.endswith("User: the cat?\n\nAssistant: red\n\n")
        assert said(example, example.fact, tokenizer).strip() == "red"
        wanted = " not red\n\n" * (before if counts else 0) + " red\n\n"
        assert said(example, example.answer, tokenizer) == wanted


def test_a_distance_that_no_turn_fits_into_is_refused(read, tokenizer):
    lines = read(pairs(2))
    with pytest.raises(InvalidRequestError, match="distance of 5 tokens"):
        with_distance(
            DataSet(tuple(lines), 60), 5, lines, counts=True, tokenizer=tokenizer, template=WORLD
        )
