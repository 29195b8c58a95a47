"""JSON Lines of chats: rendered as the engine reads them, answers and facts marked."""

import json

import pytest
from tiny_model import vocabulary, write_vocabulary

from mrss_provider.backend import Message
from mrss_provider.chat import TEMPLATES, load_template, render_prompt
from mrss_provider.errors import FileFormatError, InvalidRequestError
from mrss_provider.tokenizer import Tokenizer
from mrss_provider.tune import chat_example, read_chats

TALK = [
    Message("system", "Be brief."),
    Message("user", "Who keeps the mill?"),
    Message("assistant", "Mira keeps it."),
    Message("user", "Sure?"),
    Message("assistant", "Yes, Mira."),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = write_vocabulary(tmp_path_factory.mktemp("chats") / "vocab.txt", vocabulary())
    return Tokenizer.load(path)


def marked(example, flags, tokenizer):
    """Return the runs of marked tokens as texts."""
    runs, open_run = [], False
    for token, flag in zip(example.token_ids, flags, strict=True):
        if flag and not open_run:
            runs.append(b"")
        if flag:
            runs[-1] += tokenizer.token_bytes(token)
        open_run = flag
    return [run.decode() for run in runs]


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("world", [" Mira keeps it.\n\n", " Yes, Mira.\n\n"]),
        ("g1", [" Mira keeps it.\n\nUser:", " Yes, Mira.\n\nUser:"]),
    ],
)
def test_an_answer_runs_from_its_prompt_to_the_end_of_its_stop(name, answers, tokenizer):
    template = load_template(name)
    example = chat_example(TALK, ["Mira"], tokenizer, template)
    text = tokenizer.decode_bytes(list(example.token_ids)).decode()
    assert text.startswith(render_prompt(TALK[:4], template))
    assert marked(example, example.answer, tokenizer) == answers
    facts = marked(example, example.fact, tokenizer)
    assert len(facts) == 2
    assert all("Mira" in fact for fact in facts)


def test_a_fact_is_marked_in_the_question_too_but_not_in_other_talk(tokenizer):
    talk = [
        Message("user", "Is the mill old?"),
        Message("assistant", "The mill is old."),
        Message("user", "Who keeps the mill?"),
        Message("assistant", "Mira keeps the mill."),
    ]
    example = chat_example(talk, ["Mira", "mill"], tokenizer, load_template("world"), num_before=2)
    text = tokenizer.decode_bytes(list(example.token_ids)).decode()
    first, last = text.index("Who"), text.index("Mira")
    sizes = [len(tokenizer.token_bytes(token)) for token in example.token_ids]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    marked_at = [at for at, flag in zip(starts, example.fact, strict=True) if flag]
    assert min(marked_at) >= first
    assert any(at < last for at in marked_at)
    with pytest.raises(InvalidRequestError, match="no answer contains the fact 'old'"):
        chat_example(talk, ["old"], tokenizer, load_template("world"), num_before=2)


def test_a_file_of_both_kinds_of_lines_is_read(tmp_path, tokenizer):
    lines = [
        {"question": "Who keeps the mill?", "answer": "Mira keeps it.", "facts": ["Mira"]},
        {"messages": [{"role": m.role, "content": m.content} for m in TALK]},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    short, long = read_chats(path, tokenizer, TEMPLATES["world"])
    assert short == chat_example(TALK[1:3], ["Mira"], tokenizer, TEMPLATES["world"])
    assert long == chat_example(TALK, [], tokenizer, TEMPLATES["world"])


@pytest.mark.parametrize("raw", ["\u2028", "\u2029", "\u0085"])
def test_only_a_newline_ends_a_line(tmp_path, tokenizer, raw):
    lines = [{"question": f"Who{raw}keeps it?", "answer": f"Mira{raw}does."}] * 2
    path = tmp_path / "chats.jsonl"
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_bytes((text + "\n").encode())
    talk = [Message("user", f"Who{raw}keeps it?"), Message("assistant", f"Mira{raw}does.")]
    wanted = chat_example(talk, [], tokenizer, TEMPLATES["world"])
    assert read_chats(path, tokenizer, TEMPLATES["world"]) == [wanted, wanted]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: Expecting"),
        ("[" * 100_000, "line 2: maximum recursion"),
        ("[]", "line 2: a chat is an object with 'messages'"),
        ('{"question": "a", "answer": "b", "tone": "c"}', "line 2: a chat is an object"),
        ('{"question": "a"}', "line 2: 'question' and 'answer' go together.*None as 'answer'"),
        ('{"messages": [{"role": "user"}]}', "line 2: a message has a role .* and a text"),
        ('{"messages": "a"}', "line 2: 'messages' must be a list"),
        ('{"messages": [], "answer": "a"}', "line 2: give 'messages', or 'question'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: .* needs an answer"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "line 2: a message has a role"),
        ('{"question": "a", "answer": "b", "facts": "b"}', "line 2: 'facts' must be a list"),
        ('{"question": "a", "answer": "b", "facts": ["c"]}', "line 2: no answer contains .*'c'"),
        ('{"question": "a", "answer": "b", "facts": [""]}', "line 2: no answer contains"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, tokenizer, line, says):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n' + line)
    with pytest.raises(FileFormatError, match=says):
        read_chats(path, tokenizer, TEMPLATES["world"])


def test_an_empty_or_missing_file_is_refused(tmp_path, tokenizer):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(FileFormatError, match="holds no chat"):
        read_chats(empty, tokenizer, TEMPLATES["world"])
    with pytest.raises(FileFormatError, match="cannot read"):
        read_chats(tmp_path / "none.jsonl", tokenizer, TEMPLATES["world"])
