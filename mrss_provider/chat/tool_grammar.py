"""The grammar of an answer that must call tools, or that thinks before it keeps to a grammar.

Lark in llguidance's dialect: `%json {...}` is a JSON Schema, `[lazy]` ends a text at the first
match, `(?s:.)` is any character. What a template's model writes before its answer is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mrss_provider.backend import GenerateRequest, Grammar, Tool
from mrss_provider.chat.template import ChatTemplate, Pair
from mrss_provider.errors import InvalidRequestError

_OWN_PARAM = "tools"
_ANY_OBJECT = {"type": "object"}
# A function that says nothing of its parameters has none, says OpenAI.
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def answer_grammar(request: GenerateRequest, template: ChatTemplate) -> Grammar | None:
    """Return what the answer to a chat conforms to, from its very first token; None is any text.

    `required` and a named tool are calls and nothing else. With `auto`, arguments of strict tools
    follow their schemas from where a call has begun; beside a grammar of the request's own, the
    answer is calls or conforms to it. Where a thought is asked for, all of this begins after it.

    Args:
        request: a chat.
        template: which its prompt was rendered with.

    Raises:
        InvalidRequestError: a regular expression or a grammar beside tools that may be called.
    """
    told = told_tools(request)
    grammar = request.grammar
    lark: str | None = None
    if told and template.tool_call is not None:
        lark = _with_calls(request, told, template.tool_call)
    # Where nothing was said of thoughts there is none: a model might never end it.
    thinks = template.thought is not None and bool(request.thinking)
    if lark is None and not (grammar and thinks):
        return grammar
    if lark is None:
        assert grammar is not None
        lark = f"answer: {_inline(grammar)}\n"
    param = grammar.param if grammar is not None else _OWN_PARAM
    start = _after_thought(template) if thinks else "start: answer\n"
    return Grammar("lark", start + lark, param)


def is_free_text(request: GenerateRequest) -> bool:
    """Tell whether an answer with `answer_grammar` as its grammar is text that ends like any.

    What ends a turn has a blank line or a role in it, which stand in no call: it cuts none short.
    """
    return request.grammar is None or (
        request.grammar.param == _OWN_PARAM and request.tool_choice.mode == "auto"
    )


def told_tools(request: GenerateRequest) -> tuple[Tool, ...]:
    """Return the tools that the model is told of."""
    return () if request.tool_choice.mode == "none" else request.tools


def _with_calls(request: GenerateRequest, tools: Sequence[Tool], marks: Pair) -> str | None:
    """Return the rule `answer` and what it needs; None where any text will do."""
    choice, grammar = request.tool_choice, request.grammar
    if choice.name is not None:
        tools = [tool for tool in tools if tool.name == choice.name]
    if choice.mode == "required":
        return _calls(tools, marks, is_parallel=choice.parallel)
    if grammar is not None:
        if grammar.kind != "json_schema":
            raise InvalidRequestError(
                f"{grammar.param} and tools that may be called do not go together; choose "
                "tool_choice none, or a JSON schema",
                param=grammar.param,
            )
        calls = _calls(tools, marks, is_parallel=choice.parallel, rule="calls")
        return f"answer: calls | reply\nreply: {_inline(grammar)}\n{calls}"
    if not any(tool.strict for tool in tools):
        return None
    return _text_and_calls(tools, marks, is_parallel=choice.parallel)


def _calls(tools: Sequence[Tool], marks: Pair, *, is_parallel: bool, rule: str = "answer") -> str:
    more = ' ("\\n" call)*' if is_parallel else ""
    return (
        f"{rule}: call{more}\n"
        f'call: {_quoted(marks[0])} "\\n" function "\\n" {_quoted(marks[1])}\n'
        f"{_functions(tools)}"
    )


def _text_and_calls(tools: Sequence[Tool], marks: Pair, *, is_parallel: bool) -> str:
    """Return free text, in which a call that has begun is one of `tools`."""
    begin = _escaped(marks[0])
    call = "(text gap function gap close)"
    calls = f"{call}*" if is_parallel else f"{call}?"
    return (
        f"answer: {calls} TAIL\n"
        f"text[lazy]: /(?s:.*){begin}/\n"
        f"gap: /\\n?/\n"
        f"close: {_quoted(marks[1])}\n"
        f"TAIL: /(?s:.*)/ & ~/(?s:.*){begin}(?s:.*)/\n"
        f"{_functions([_loose(tool) for tool in tools])}"
    )


def _loose(tool: Tool) -> Tool:
    return tool if tool.strict else replace(tool, parameters=_ANY_OBJECT)


def _functions(tools: Sequence[Tool]) -> str:
    """Return the rule `function`: one alternative a tool."""
    names = [f"function_{i}" for i in range(len(tools))]
    lines = [f"function: {' | '.join(names)}"]
    for i, (name, tool) in enumerate(zip(names, tools, strict=True)):
        head = f'{{"name": {json.dumps(tool.name)}, "arguments": '
        lines.append(f'{name}: {_quoted(head)} arguments_{i} "}}"')
        lines.append(f"arguments_{i}: %json {_schema(tool.parameters)}")
    return "\n".join(lines) + "\n"


def _after_thought(template: ChatTemplate) -> str:
    """Return the rule `start`: the rest of a thought, which the prompt has begun, and `answer`."""
    assert template.thought is not None
    return (
        "start: thought blank answer\n"
        "blank: /[ \\n]{0,2}/\n"
        f"thought[lazy]: /(?s:.*){_escaped(template.thought[1])}/\n"
    )


def _inline(grammar: Grammar) -> str:
    """Return a grammar as the right side of a Lark rule."""
    if grammar.kind == "json_schema":
        return f"%json {grammar.text}"
    if grammar.kind == "regex":
        return f"/{_ENDS_REGEX.sub(_escape_end, grammar.text)}/"
    return f"%lark {{\n{grammar.text}\n}}"


# What ends a regular expression in Lark, where no backslash is before it.
_ENDS_REGEX = re.compile(r"\\.|[/\n]", re.DOTALL)


def _escape_end(found: re.Match[str]) -> str:
    return {"/": "\\/", "\n": "\\n"}.get(found[0], found[0])


def _schema(parameters: Mapping[str, Any]) -> str:
    return json.dumps(dict(parameters) or _NO_ARGUMENTS)


def _quoted(text: str) -> str:
    return json.dumps(text)


def _escaped(text: str) -> str:
    """Return a mark as part of a regular expression."""
    return "".join(c if c.isalnum() or c in "_<>" else f"\\{c}" for c in text)
