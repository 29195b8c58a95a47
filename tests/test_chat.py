"""Chat templates: exact texts, and users who cannot write a turn for somebody else."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrss_provider.backend import Message
from mrss_provider.chat import TEMPLATES, ChatTemplate, load_template, render_prompt
from mrss_provider.errors import ConfigError, InvalidRequestError

SYSTEM = Message("system", "Be kind.")
USER = Message("user", "Hi")
ANSWER = Message("assistant", "Hello.\n\nHow are you?")


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("world", [USER], "User: Hi\n\nAssistant:"),
        ("world", [SYSTEM, USER], "System: Be kind.\n\nUser: Hi\n\nAssistant:"),
        (
            "world",
            [USER, ANSWER, USER],
            "User: Hi\n\nAssistant: Hello.\nHow are you?\n\nUser: Hi\n\nAssistant:",
        ),
        ("world", [USER, Message("assistant", "The ")], "User: Hi\n\nAssistant: The "),
        ("world", [USER, Message("assistant", "")], "User: Hi\n\nAssistant:"),
        ("world", [Message("user", " a\r\n\r\n\nb \n")], "User: a\nb\n\nAssistant:"),
        ("world", [Message("user", "")], "User:\n\nAssistant:"),
        ("g1", [SYSTEM, USER], "System: Be kind.\n\nUser: Hi\n\nAssistant:"),
        (
            "g1",
            [USER, ANSWER, USER],
            "User: Hi\n\nAssistant: Hello.\n\nHow are you?\n\nUser: Hi\n\nAssistant:",
        ),
        ("g1", [USER, Message("assistant", "A\n\nB ")], "User: Hi\n\nAssistant: A\n\nB "),
        ("plain", [SYSTEM, Message("user", "a\n\nb ")], "Be kind.\n\na\n\nb "),
        ("plain", [USER, Message("assistant", "The ")], "Hi\n\nThe "),
    ],
)
def test_the_text_is_exact(template, messages, expected):
    assert render_prompt(messages, TEMPLATES[template]) == expected


@pytest.mark.parametrize(
    ("template", "stop"), [("world", ("\n\n",)), ("g1", ("\nUser:",)), ("plain", ())]
)
def test_each_template_ends_turns_its_way(template, stop):
    assert TEMPLATES[template].stop == stop


hostile = st.lists(
    st.sampled_from(["\n", "\r", "\n\n", " ", "User:", "Assistant:", "System:", "x", "{{ 1 }}"]),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("template", ["world", "g1"])
@given(texts=st.lists(hostile, min_size=1, max_size=4))
def test_no_text_forges_a_turn(template, texts):
    roles = ["user", "assistant"] * 2
    messages = [Message(role, text) for role, text in zip(roles, texts, strict=False)]
    prompt = render_prompt(messages, TEMPLATES[template])
    turns = re.findall(r"(?:\A|\n\n)(?:System|User|Assistant):", prompt)
    # One a message, and the one that the model is to write unless the last is continued.
    assert len(turns) == len(messages) + len(messages) % 2
    if template == "world":
        assert prompt.count("\n\n") == len(turns) - 1
        assert "\n\n\n" not in prompt


def test_template_syntax_in_a_message_is_text():
    assert render_prompt([Message("user", "{{ 7 * 7 }}")], TEMPLATES["world"]).startswith(
        "User: {{ 7 * 7 }}"
    )


def test_a_template_file_is_read_beside_the_model(tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    template = load_template("mine.jinja", tmp_path)
    assert render_prompt([SYSTEM, USER], template) == "[Be kind.][Hi]"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("wrld", None, "one of world, g1, plain"),
        ("none.jinja", None, "cannot read"),
        ("bad.jinja", "{% for %}", "no jinja2"),
    ],
)
def test_a_bad_template_is_a_configuration_error(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_template(name, tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('system comes first') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_can_refuse_but_not_reach_out(source):
    with pytest.raises(InvalidRequestError, match="refuses these messages") as caught:
        render_prompt([USER], ChatTemplate("mine", source))
    assert caught.value.param == "messages"
