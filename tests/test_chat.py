"""Chat templates: exact texts, and users who cannot write a turn for somebody else."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrss_provider.backend import Message, Tool, ToolCall
from mrss_provider.chat import (
    TEMPLATES,
    ChatTemplate,
    detect_template,
    load_template,
    render_prompt,
    user_spans,
)
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
        ("rwkv-infer", [SYSTEM, USER], "System: Be kind.\n\nUser: Hi\n\nAssistant:"),
        (
            "rwkv-infer",
            [Message("user", " a\n\nb "), ANSWER, Message("user", "")],
            "User:  a\nb \n\nAssistant: Hello.\n\nHow are you?\n\nUser: \n\nAssistant:",
        ),
        ("plain", [SYSTEM, Message("user", "a\n\nb ")], "Be kind.\n\na\n\nb "),
        ("plain", [USER, Message("assistant", "The ")], "Hi\n\nThe "),
    ],
)
def test_the_text_is_exact(template, messages, expected):
    assert render_prompt(messages, TEMPLATES[template]) == expected


@pytest.mark.parametrize(
    ("template", "stop"),
    [("world", ("\n\n",)), ("g1", ("\nUser:",)), ("rwkv-infer", ("\n\n",)), ("plain", ())],
)
def test_each_template_ends_turns_its_way(template, stop):
    assert TEMPLATES[template].stop == stop


hostile = st.lists(
    st.sampled_from(["\n", "\r", "\n\n", " ", "User:", "Assistant:", "System:", "x", "{{ 1 }}"]),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("template", ["world", "g1", "rwkv-infer"])
@settings(max_examples=20)
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
        ("wrld", None, "one of world, g1, rwkv-infer, plain"),
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


TOOL = Tool("clock", "Tells the time", {"type": "object", "properties": {"zone": {}}})
CALLS = Message(
    "assistant",
    "",
    (ToolCall("c1", "clock", '{"zone":\n\n "é"}'), ToolCall("c2", "clock", "{}")),
)
RESULTS = [Message("tool", "12:00", (), "c1"), Message("tool", "11:00\n\nin\n\nall", (), "c2")]
SECTION = (
    "You may call one or more functions to assist with the user query.\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n"
    "<tools>\n"
    '{"type": "function", "function": {"name": "clock", "description": "Tells the time", '
    '"parameters": {"type": "object", "properties": {"zone": {}}}}}\n'
    "</tools>\n"
    "For each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
WRITTEN = (
    '<tool_call>\n{"name": "clock", "arguments": {"zone": "é"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)
TOLD = "<tool_response>\n12:00\n</tool_response>\n<tool_response>\n11:00\nin\nall\n</tool_response>"


@pytest.mark.parametrize("template", ["world", "g1", "rwkv-infer"])
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_the_text_of_a_chat_with_tools_is_exact(template, system):
    messages = [*([system] if system else []), USER, CALLS, *RESULTS]
    opening = "System: Be kind.\n" if system else "System: "
    assert render_prompt(messages, TEMPLATES[template], [TOOL]) == (
        f"{opening}{SECTION}\n\nUser: Hi\n\nAssistant: {WRITTEN}\n\nUser: {TOLD}\n\nAssistant:"
    )


def test_a_model_that_knows_no_turns_has_tools_too():
    prompt = render_prompt([SYSTEM, USER, CALLS, RESULTS[0]], TEMPLATES["plain"], [TOOL])
    said = "<tool_response>\n12:00\n</tool_response>"
    assert prompt == f"{SECTION}\n\nBe kind.\n\nHi\n\n{WRITTEN}\n\n{said}"


@pytest.mark.parametrize(
    ("thinking", "end"),
    [
        (None, "Assistant:"),
        (True, "Assistant: <think"),
        (False, "Assistant: <think>\n</think>"),
    ],
)
def test_a_thought_is_opened_or_closed_in_the_prompt(thinking, end):
    g1, others = TEMPLATES["g1"], [TEMPLATES[name] for name in ("world", "rwkv-infer")]
    assert render_prompt([USER], g1, (), thinking) == f"User: Hi\n\n{end}"
    assert render_prompt([USER, ANSWER], g1, (), thinking).endswith("How are you?")
    for template in others:
        assert template.thought is None
        assert render_prompt([USER], template, (), thinking) == "User: Hi\n\nAssistant:"


def test_a_template_without_a_form_for_tools_refuses_them():
    template = ChatTemplate("mine", "{{ messages[0].content }}")
    for messages, tools, param in (([USER], [TOOL], "tools"), ([CALLS, *RESULTS], [], "messages")):
        with pytest.raises(InvalidRequestError, match="no form for tools") as caught:
            render_prompt(messages, template, tools)
        assert caught.value.param == param


marks = st.lists(
    st.sampled_from(
        [
            *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "<", " "),
            *("</tool_response>", "<tools>", "</tools>", "\n\n", "\n", "User:", "Assistant:", "x"),
            *("<THINK>", "<tool_", "call>", "<thi", "nk>", "System:", '{"name": "clock"}'),
        ]
    ),
    max_size=10,
).map("".join)


@pytest.mark.parametrize("template", list(TEMPLATES))
@settings(max_examples=20)
@given(text=marks, told=marks)
def test_no_user_and_no_tool_forges_a_mark(template, text, told):
    call = Message("assistant", "", (ToolCall("c1", "clock", "{}"),))
    form = TEMPLATES[template]

    def rendered(text, told):
        messages = [Message("user", text), call, Message("tool", told, (), "c1"), USER]
        return messages, render_prompt(messages, form, [TOOL])

    messages, prompt = rendered(text, told)
    _, harmless = rendered("x", "x")
    pairs = [form.tool_call, form.tool_result, ("<tools>", "</tools>")]
    for mark in [mark for pair in pairs for mark in pair]:
        assert prompt.count(mark) == harmless.count(mark)
    if form.thought is not None:
        assert "<think>" not in prompt
        assert "</think>" not in prompt
    if template != "plain":
        turns = r"(?:\A|\n\n)(?:System|User|Assistant):"
        assert len(re.findall(turns, prompt)) == len(re.findall(turns, harmless))
    # What a tool said is not the user's.
    words = [prompt[span.start : span.stop] for span in user_spans(messages, form, prompt, [TOOL])]
    assert words[-1] == "Hi"
    assert len(words) == 1 + bool(text.strip())


def test_marks_stay_as_they_are_where_they_mean_nothing():
    text = "What are <tool_call> and <think>?"
    assert text in render_prompt([Message("user", text)], TEMPLATES["world"])
    assert "<tool_call> and < think>" in render_prompt([Message("user", text)], TEMPLATES["g1"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("rwkv7-g1a-0.4b-20250905-ctx4096.pth", "models"), "g1"),
        (("rwkv7-g0-7.2b.pth",), "g1"),
        (("RWKV-x070-World-0.4B-v2.9.pth", "g1"), "world"),
        (("model.safetensors", "RWKV7-Goose-World2.8"), "world"),
        (("model.safetensors", "rwkv7-g1-2.9b"), "g1"),
        (("model.safetensors", "big1"), "world"),
    ],
)
def test_a_models_name_says_its_template(names, expected):
    name, why = detect_template(*names)
    assert name == expected
    assert why


def test_a_template_files_header_says_how_answers_are_read(tmp_path):
    header = 'stop = ["<end>"]\nlead = "\\n"\ntool_call = ["[", "]"]\ntool_result = ["(", ")"]'
    (tmp_path / "a.jinja").write_text(f"{{#toml\n{header}\n#}}{{{{ messages[0].content }}}}")
    template = load_template("a.jinja", tmp_path)
    assert (template.stop, template.lead) == (("<end>",), "\n")
    assert (template.tool_call, template.tool_result) == (("[", "]"), ("(", ")"))
    assert render_prompt([Message("user", "[hi]")], template) == "[hi]"
    assert render_prompt([Message("user", "[hi]")], template, [TOOL]) == "[ hi] "


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("stop = 5", "stop must be a list of strings"),
        ('stop = [""]', "none empty"),
        ("lead = 5", "lead must be a string"),
        ('tool_call = ["<a>"]', "what begins and what ends it"),
        ('opens_thought = "<t"', "a beginning of the thought's mark"),
        ("stops = []", "has the keys stop, lead"),
        ("=", "is no TOML"),
    ],
)
def test_a_bad_header_is_a_configuration_error(tmp_path, header, words):
    (tmp_path / "a.jinja").write_text(f"{{#toml\n{header}\n#}}")
    with pytest.raises(ConfigError, match=words):
        load_template("a.jinja", tmp_path)


def test_a_template_reads_no_file_but_the_shared_parts(tmp_path):
    (tmp_path / "secret.jinja").write_text("secret")
    for path in ("secret.jinja", str(tmp_path / "secret.jinja"), "../__init__.py", "world.jinja"):
        with pytest.raises(InvalidRequestError):
            render_prompt([USER], ChatTemplate("mine", f"{{% include {path!r} %}}"))
