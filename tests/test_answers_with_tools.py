"""Thoughts and calls of an `AsyncEngine`: what is told to the model, and what comes of it."""

import asyncio
import json
from dataclasses import replace

import pytest
from script_engine import IDS, TOKENS, Library, ScriptEngine, answers, collect

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.async_engine.card import Card, read_card
from mrss_provider.async_engine.cards import model_cards
from mrss_provider.async_engine.choice import Choice
from mrss_provider.async_engine.loading import Loaded
from mrss_provider.async_engine.prompting import prepared, reader_of
from mrss_provider.async_engine.templates import choose_template
from mrss_provider.backend import (
    GenerateRequest,
    Grammar,
    Message,
    ModelCard,
    Tool,
    ToolCall,
    ToolChoice,
)
from mrss_provider.chat import TEMPLATES, ChatTemplate, render_prompt
from mrss_provider.config import EngineConfig
from mrss_provider.engine.request import EngineRequest, TokenOutput
from mrss_provider.errors import ConfigError, InvalidRequestError
from mrss_provider.openai_schema import Answer, request_to_body
from mrss_provider.openai_schema.requests import parse_chat_request
from mrss_provider.sampling_params import SamplingParams

G1 = TEMPLATES["g1"]
USER = Message("user", "hi")
CLOCK = Tool("clock", "Tells the time", {"type": "object", "properties": {"zone": {}}})
CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "é"}}\n</tool_call>'
PLACE = {"enum": ["Paris", "Oslo"]}
WEATHER = Tool(
    "get_weather",
    "The weather of a day",
    {
        "type": "object",
        "properties": {"city": PLACE, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    strict=True,
)


def ask(messages=(USER,), *, thinking=None, n=1, tools=(), choice=None, **sampling):
    return GenerateRequest(
        "tone",
        SamplingParams(**sampling),
        messages=messages,
        n=n,
        thinking=thinking,
        tools=tools,
        tool_choice=choice or ToolChoice(),
        timeout_s=30.0,
    )


def bytes_of(text):
    return [byte + 1 for byte in text.encode()]


def whole(deltas, index=0):
    answer = Answer()
    for delta in deltas:
        answer.add(delta)
    return answer.choices[index], answer.usage


def called(choice):
    return [(call.name, call.arguments) for call in choice.tool_calls]


def one_by_one(token_ids, request, template):
    """Return the deltas of one answer, read whenever a token came."""
    mixture = Library().resolve("tone", None)
    asked = EngineRequest(id="r0", prompt=(1,), mixture=mixture, sampling=SamplingParams())
    choice = Choice(asked, 0, TOKENS, (), "", reader=reader_of(request, template))
    deltas = []
    for token_id in token_ids:
        choice.add(TokenOutput("r0", 0, token_id))
        if choice.read():
            deltas.append(choice.take())
    return deltas


def refusal(request, **kwargs):
    with pytest.raises(InvalidRequestError) as caught:
        answers([], request, **kwargs)
    return caught.value.param, str(caught.value)


@pytest.mark.parametrize(
    ("thinking", "written"),
    [
        (None, " <think>\nHm é.\n</think>\nYes."),
        (True, ">\nHm é.\n</think>\nYes."),
        (False, "\n<think>\nHm é.\n</think>\nYes."),
    ],
)
def test_a_thought_is_told_apart_from_the_answer_and_counted(thinking, written):
    deltas = answers(bytes_of(written), ask(thinking=thinking, n=2), template=G1)
    for index in (0, 1):
        choice, usage = whole(deltas, index)
        assert (choice.reasoning, choice.text) == ("Hm é.", "Yes.")
        assert choice.finish_reason == "stop"
    begins, ends = written.index(">") + 1, written.index("</think>") + len("</think>")
    thought = len(written[:ends].encode()) - (written.startswith((" ", "\n")))
    assert begins < ends
    assert abs(usage.reasoning_tokens - 2 * thought) <= 2
    assert usage.completion_tokens == 2 * (len(written.encode()) + 1)


def test_no_delta_has_half_a_mark_or_half_a_character():
    deltas = one_by_one(bytes_of(">\nHm é.\n</think>\nYes é."), ask(thinking=True), G1)
    assert "".join(delta.text for delta in deltas) == "Yes é."
    for delta in deltas:
        assert not set("<>�") & set(delta.text + delta.reasoning)
    assert len([delta for delta in deltas if delta.reasoning]) > 2


def test_an_answer_that_is_cut_while_it_thinks_has_no_content():
    script = [*bytes_of(">\nHm"), TokenOutput("", 0, bytes_of(".")[0], finish_reason="length")]
    choice, usage = whole(answers(script, ask(thinking=True), template=G1))
    assert (choice.text, choice.reasoning, choice.finish_reason) == ("", "Hm.", "length")
    assert usage.reasoning_tokens == usage.completion_tokens == 5


def test_the_answer_goes_on_in_a_thought_that_the_last_message_is_in():
    messages = (USER, Message("assistant", "<think>\nI w"))
    choice, _ = whole(answers(bytes_of("onder.</think>\nYes."), ask(messages), template=G1))
    assert (choice.reasoning, choice.text) == ("onder.", "Yes.")


def test_the_prompt_is_what_the_template_says():
    engine = ScriptEngine(IDS("Hello"))
    calls = (ToolCall("c1", "clock", "{}"),)
    messages = (USER, Message("assistant", "", calls), Message("tool", "12:00", (), "c1"))
    answers(engine, ask(messages, tools=(CLOCK,), thinking=False), template=G1)
    expected = render_prompt(messages, G1, (CLOCK,), False)
    assert b"".join(map(TOKENS.token_bytes, engine.added[0].prompt)).decode() == expected
    # With `none` the model is not told of tools.
    answers(engine, ask(tools=(CLOCK,), choice=ToolChoice("none")), template=G1)
    expected = render_prompt((USER,), G1)
    assert b"".join(map(TOKENS.token_bytes, engine.added[1].prompt)).decode() == expected


def test_calls_come_out_of_the_text():
    deltas = answers(bytes_of(f" Yes.\n{CALL}\n{CALL}"), ask(tools=(CLOCK,)))
    choice, _ = whole(deltas)
    assert choice.text == "Yes."
    assert called(choice) == [("clock", '{"zone": "é"}')] * 2
    assert len({call.id for call in choice.tool_calls}) == 2
    assert choice.finish_reason == "tool_calls"
    assert all("<" not in delta.text for delta in deltas)
    assert sum(delta.num_tokens for delta in deltas) == len(f" Yes.\n{CALL}\n{CALL}".encode()) + 1


@pytest.mark.parametrize("thinking", [None, True])
def test_a_call_in_an_answer_that_follows_a_schema_is_text(thinking):
    asked = replace(
        ask(tools=(CLOCK,), thinking=thinking),
        grammar=Grammar("json_schema", '{"type": "object"}', "response_format"),
    )
    reader = reader_of(prepared(asked, G1), G1)
    text = json.dumps({"a": CALL})
    said = f">\nHm.\n</think>\n{text}" if thinking else text
    news = reader.read(said, is_last=True)
    assert (news.text, news.calls) == (text, ())


def test_what_ends_a_turn_ends_an_answer_with_calls():
    script = ScriptEngine(bytes_of(f" {CALL}\n\nUser: and"))
    choice, _ = whole(answers(script, ask(tools=(CLOCK,))))
    assert (choice.text, choice.finish_reason) == ("", "tool_calls")
    assert ("r0", 0) in script.aborted


def test_without_parallel_calls_the_first_one_ends_the_answer():
    script = ScriptEngine(bytes_of(f" {CALL}\n{CALL} and more"))
    request = ask(tools=(CLOCK,), choice=ToolChoice(parallel=False))
    choice, usage = whole(answers(script, request))
    assert called(choice) == [("clock", '{"zone": "é"}')]
    assert choice.finish_reason == "tool_calls"
    assert usage.completion_tokens == len(f" {CALL}".encode())
    assert ("r0", 0) in script.aborted


def test_where_no_tool_may_be_called_marks_are_text():
    for request in (ask(), ask(tools=(CLOCK,), choice=ToolChoice("none"))):
        choice, _ = whole(answers(bytes_of(f" {CALL}"), request))
        assert (choice.text, choice.tool_calls, choice.finish_reason) == (CALL, (), "stop")


@pytest.mark.parametrize(
    ("request_", "template", "param", "words"),
    [
        (ask(thinking=True), "world", "reasoning_effort", "'world' has no thoughts"),
        (
            ask((USER, Message("assistant", "I")), thinking=True),
            "g1",
            "reasoning_effort",
            "for a new answer",
        ),
        (
            replace(ask(tools=(CLOCK,), choice=ToolChoice("required")), given="x"),
            "world",
            "mrss.given",
            "left out",
        ),
        (replace(ask(tools=(CLOCK,)), session="ses_1"), "world", "tools", "takes no tools"),
    ],
)
def test_what_cannot_be_is_refused_by_name(request_, template, param, words):
    found, message = refusal(request_, template=TEMPLATES[template])
    assert found == param
    assert words in message


def test_a_template_without_tools_takes_none_but_those_that_are_not_called():
    template = ChatTemplate("mine", "{{ messages[0].content }}")
    assert refusal(ask(tools=(CLOCK,)), template=template)[0] == "tools"
    request = ask(tools=(CLOCK,), choice=ToolChoice("none"))
    assert whole(answers(IDS("Hello"), request, template=template))[0].text == "Hello"


class Speaking(Library):
    """States that want a template of their own."""

    def resolve(self, text, options=None):
        return replace(super().resolve(text, options), template=text if text != "tone" else None)

    def cards(self):
        return [ModelCard("tone", "state"), ModelCard("g1", "state")]


def test_a_mixture_is_told_in_the_template_that_it_asks_for():
    async def main():
        engine = ScriptEngine(bytes_of("<think>a</think>b"))
        loaded = Loaded(engine, Speaking(), TOKENS, TEMPLATES["world"], Card())
        async with AsyncEngine(EngineConfig(), loader=lambda _: loaded) as front:
            found = []
            for name in ("tone", "g1", "g1", "world"):
                deltas = await collect(front, replace(ask(), model=name))
                found.append(whole(deltas)[0].reasoning)
            return found, loaded

    found, loaded = asyncio.run(main())
    assert found == ["", "a", "a", ""]
    assert loaded.speaking("g1") is loaded.speaking("g1")
    assert loaded.speaking("g1").plain is loaded
    cards = {card.id: card.supports for card in model_cards(loaded)}
    assert cards == {"tone": ("tools",), "g1": ("tools", "thinking")}


@pytest.fixture(scope="module")
def demo():
    """The bundled model, told in the G1 template."""
    with asyncio.Runner() as runner:
        engine = AsyncEngine(EngineConfig(template="g1", threads=1))
        yield lambda request: runner.run(collect(engine, request))
        runner.run(engine.aclose())


def is_weather(arguments):
    value = json.loads(arguments)
    return (
        set(value) == {"city", "days"}
        and value["city"] in PLACE["enum"]
        and type(value["days"]) is int
        and 1 <= value["days"] <= 9
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("get_weather", "stop"),
        pytest.param(None, "tool_calls", marks=pytest.mark.slow),
    ],
)
def test_a_forced_call_is_valid_at_a_high_temperature(demo, name, reason):
    choice = ToolChoice("required", name, parallel=False)
    request = ask(tools=(WEATHER,), choice=choice, temperature=5.0, seed=1, max_tokens=400)
    # As it comes over the wire.
    again = parse_chat_request(json.loads(json.dumps(request_to_body(request)))).request
    assert again == request
    found, _ = whole(demo(again))
    ((name, arguments),) = called(found)
    assert (found.text, name, found.finish_reason) == ("", "get_weather", reason)
    assert is_weather(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [None, False])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.0, 10.0])
def test_forced_calls_are_valid_at_any_temperature(demo, temperature, thinking):
    nothing = Tool("nothing")
    request = ask(
        tools=(WEATHER, nothing),
        choice=ToolChoice("required"),
        thinking=thinking,
        temperature=temperature,
        seed=7,
        n=4,
        max_tokens=800,
    )
    deltas = demo(request)
    ended = 0
    for index in range(4):
        choice, _ = whole(deltas, index)
        assert choice.text == ""
        ended += choice.finish_reason == "tool_calls"
        for name, arguments in called(choice) if choice.finish_reason == "tool_calls" else ():
            assert is_weather(arguments) if name == "get_weather" else json.loads(arguments) == {}
    assert ended


@pytest.mark.slow
def test_a_call_that_has_begun_keeps_to_a_strict_schema(demo):
    # The model does not call by itself: it is made to begin.
    begun = Message("assistant", '<tool_call>\n{"name": ')
    request = ask((USER, begun), tools=(WEATHER,), temperature=2.0, seed=3, max_tokens=300)
    text = "".join(delta.text for delta in demo(request))
    call = text.removeprefix('"get_weather", "arguments": ').partition("\n</tool_call>")[0]
    assert is_weather(call.removesuffix("}"))


def test_the_template_of_a_model_is_its_cards_or_its_names(tmp_path):
    folder = tmp_path / "rwkv7-g1a-0.4b"
    folder.mkdir()
    model = folder / "model.safetensors"

    def chosen(asked=None):
        template, why = choose_template(asked, read_card(model), model)
        return template.name, template.stop, why

    assert chosen() == ("g1", ("\nUser:",), "the name 'rwkv7-g1a-0.4b' says so")
    (folder / "card.toml").write_text('stop = ["x"]')
    assert chosen()[:2] == ("g1", ("x",))
    (folder / "card.toml").write_text('template = "plain"\nstop = ["x"]')
    assert chosen() == ("plain", ("x",), "card.toml says so")
    assert chosen("world") == ("world", ("\n\n",), "it was asked for")
    with pytest.raises(ConfigError, match="one of world"):
        chosen("word")
