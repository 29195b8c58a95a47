"""What tools and thoughts ask of an answer: texts that are one, and texts that are none."""

import pytest
from accepting import accepts, begin, new_grammars

from mrss_provider.backend import GenerateRequest, Grammar, Message, Tool, ToolChoice
from mrss_provider.chat import TEMPLATES, answer_grammar, is_free_text
from mrss_provider.errors import InvalidRequestError
from mrss_provider.sampling_params import SamplingParams

STRICT = Tool(
    "weather",
    parameters={
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "a/b"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    strict=True,
)
LOOSE = Tool("any", parameters={"type": "object", "properties": {"a": {"type": "integer"}}})
NOTHING = Tool("nothing")
YES = Grammar("json_schema", '{"enum": ["yes/no"]}')

PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ROME = PARIS.replace("Paris", "Rome")
ANY = '<tool_call>\n{"name": "any", "arguments": {"a": "x"}}\n</tool_call>'
NONE = '<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>'
MORE = NONE.replace("{}", '{"x": 1}')


def grammar_of(template="world", **asked):
    said = (Message("user", "hi"),)
    request = GenerateRequest("tone", SamplingParams(), messages=said, **asked)
    return answer_grammar(request, TEMPLATES[template])


def check(grammar, good=(), bad=()):
    constraint = begin(new_grammars(), grammar.text, grammar.kind, param=grammar.param)
    for text in good:
        assert accepts(constraint, text), text
    for text in bad:
        assert not accepts(constraint, text), text


def test_a_required_answer_is_calls_and_nothing_else():
    tools, choice = (STRICT, LOOSE, NOTHING), ToolChoice("required")
    grammar = grammar_of(tools=tools, tool_choice=choice)
    integer = ANY.replace('"x"', "1")
    check(
        grammar,
        [PARIS, integer, NONE, f"{PARIS}\n{NONE}\n{PARIS}"],
        [
            "",
            "Hello",
            ROME,
            ANY,
            MORE,
            f"{PARIS}\n",
            f"{PARIS} Hello",
            f"Hello {PARIS}",
            PARIS[:-1],
        ],
    )
    single = grammar_of(tools=tools, tool_choice=ToolChoice("required", parallel=False))
    check(single, [PARIS], [f"{PARIS}\n{NONE}"])
    named = grammar_of(tools=tools, tool_choice=ToolChoice("required", "nothing"))
    check(named, [NONE, f"{NONE}\n{NONE}"], [PARIS])


def test_a_call_of_a_strict_function_that_has_begun_follows_its_schema():
    grammar = grammar_of(tools=(STRICT, LOOSE))
    check(
        grammar,
        ["", "Hello.\n\n<b>", "a <tool_", PARIS, f"Yes. {PARIS}\n{ANY} ok", "<tool_call"],
        [ROME, f"Yes. {ROME}", "<tool_call>", "<tool_call> no", PARIS[:-1]],
    )
    single = grammar_of(tools=(STRICT,), tool_choice=ToolChoice(parallel=False))
    check(single, ["Hello", f"Yes. {PARIS} ok"], [f"{PARIS}{PARIS}"])


def test_an_answer_that_may_call_may_also_follow_a_schema():
    check(
        grammar_of(tools=(STRICT,), grammar=YES), ['"yes/no"', PARIS], ["Hello", ROME, f"{PARIS}x"]
    )
    for kind in ("regex", "lark"):
        with pytest.raises(InvalidRequestError, match="do not go together") as caught:
            grammar_of(tools=(STRICT,), grammar=Grammar(kind, 'start: "a"', "mrss.x"))
        assert caught.value.param == "mrss.x"


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (YES, '"yes/no"', "yes"),
        (Grammar("regex", r"a/b\/|\\c\n"), "a/b/", "ab"),
        (Grammar("lark", 'start: WORD | "no"\nWORD: /[a-z]+\\/!/'), "ab/!", "ab"),
    ],
    ids=["schema", "regex", "lark"],
)
def test_a_grammar_begins_after_a_thought_that_was_asked_for(grammar, good, bad):
    thinking = grammar_of("g1", grammar=grammar, thinking=True)
    check(
        thinking,
        [f'>\nHm "x" <think>\n\n</think>\n{good}', f"></think>{good}"],
        [good, f">\nHm</think>{bad}", f">\nHm</think>\n{good}x"],
    )
    for template, thinks in (("g1", None), ("g1", False), ("world", False)):
        assert grammar_of(template, grammar=grammar, thinking=thinks) is grammar


def test_a_forced_call_comes_after_a_thought_that_was_asked_for():
    asked = {"tools": (STRICT,), "tool_choice": ToolChoice("required")}
    check(grammar_of("g1", thinking=True, **asked), [f">\n{ROME}</think>\n{PARIS}"], [PARIS])
    check(grammar_of("g1", **asked), [PARIS], [f"<think></think>{PARIS}"])


def test_nothing_is_asked_where_anything_may_be_said():
    assert grammar_of(tools=(LOOSE,)) is None
    assert grammar_of(tools=(STRICT,), tool_choice=ToolChoice("none")) is None
    assert grammar_of("g1", thinking=True) is None


def test_what_ends_a_turn_ends_free_text_only():
    def is_free(**asked):
        request = GenerateRequest("t", SamplingParams(), messages=(Message("user", "x"),), **asked)
        return is_free_text(
            GenerateRequest(
                "t",
                SamplingParams(),
                messages=request.messages,
                tools=request.tools,
                tool_choice=request.tool_choice,
                grammar=answer_grammar(request, TEMPLATES["world"]),
            )
        )

    assert is_free()
    assert is_free(tools=(STRICT,))
    assert not is_free(tools=(STRICT,), tool_choice=ToolChoice("required"))
    assert not is_free(grammar=YES)
    assert not is_free(tools=(STRICT,), grammar=YES)
