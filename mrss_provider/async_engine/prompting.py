"""What the model is told: a request's prompt as text and tokens, and how its answer begins."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from mrss_provider.async_engine.answer_reader import AnswerReader
from mrss_provider.async_engine.evidence import find_evidence, reads_prompt
from mrss_provider.async_engine.loading import Loaded
from mrss_provider.async_engine.output_parser import OutputParser, State
from mrss_provider.backend import GenerateRequest
from mrss_provider.chat import (
    ChatTemplate,
    PromptText,
    answer_grammar,
    is_free_text,
    render_chat,
    render_prompt,
    told_tools,
)
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.errors import InvalidRequestError

MAX_INLINE_CHARS = 20_000
"""Of a text that is worked on where the event loop is: above it that takes milliseconds."""


def prepared(request: GenerateRequest, template: ChatTemplate) -> GenerateRequest:
    """Return a request with the grammar that its tools and thoughts ask for.

    Raises:
        InvalidRequestError: it asks for what the template has no form for.
    """
    if request.messages is None:
        return request
    _check_thinking(request, template)
    _check_tools(request, template)
    grammar = answer_grammar(request, template)
    return request if grammar is request.grammar else replace(request, grammar=grammar)


def check_opening(request: GenerateRequest) -> None:
    """Return if a request may make a session: it asks for no answer.

    Raises:
        InvalidRequestError: it has what only an answer could honour.
    """
    check_session(request)
    if request.session is not None:
        raise InvalidRequestError(
            "a session is made of a prompt, not of another one; POST /v1/sessions/{id}/fork keeps "
            "one once more",
            param="mrss.session",
        )
    of_answers = {
        "n": request.n > 1,
        "best_of": request.best_of is not None,
        "echo": request.echo,
        "reasoning_effort": request.thinking,
    }
    for param, is_asked_for in of_answers.items():
        if is_asked_for:
            raise InvalidRequestError(
                f"a session is made of a prompt, and has no answer yet; leave {param} out",
                param=param,
            )


def check_session(request: GenerateRequest) -> None:
    """Return if a session can go on with a request.

    Raises:
        InvalidRequestError: it has tools, or an answer of one.
    """
    has_calls = any(m.tool_calls or m.role == "tool" for m in request.messages or ())
    if told_tools(request) or has_calls:
        raise InvalidRequestError(
            "a session takes no tools; send the whole chat without mrss.session",
            param="tools" if request.tools else "messages",
        )


def reader_of(request: GenerateRequest, template: ChatTemplate) -> AnswerReader | None:
    """Return what reads one answer to a prepared request; None where its text is its content."""
    if not request.messages or request.given is not None:
        return None
    tools = told_tools(request)
    state = _first_state(request, template)
    if state == "content" and not tools:
        return None
    choice = request.tool_choice
    is_constrained = request.grammar is not None and bool(tools)
    must_call = is_constrained and choice.mode == "required"
    parser = OutputParser(
        state,
        thought=template.thought,
        opens_thought=template.opens_thought,
        tool_call=template.tool_call if tools else None,
        names=frozenset(tool.name for tool in tools),
        is_single=not choice.parallel,
        is_constrained=is_constrained,
        must_call=must_call,
        calls_first=is_constrained and not must_call and not is_free_text(request),
    )
    return AnswerReader(parser, is_named=choice.name is not None)


def _first_state(request: GenerateRequest, template: ChatTemplate) -> State:
    """Return where an answer begins: in a thought, perhaps with one, or in its content."""
    assert request.messages
    if template.thought is None:
        return "content"
    begin, end = template.thought
    last = request.messages[-1]
    if last.role != "assistant":
        return "opened" if request.thinking and template.opens_thought else "start"
    is_thinking = last.content.lstrip().startswith(begin) and end not in last.content
    return "thought" if is_thinking else "content"


def stops_of(request: GenerateRequest, template: ChatTemplate) -> tuple[str, ...]:
    """Return the strings that end an answer to a prepared request, beside its own."""
    is_chat = request.messages is not None and request.given is None
    return template.stop if is_chat and is_free_text(request) else ()


def lead_of(request: GenerateRequest, template: ChatTemplate) -> str:
    """Return what the model writes before its answer, which is no part of it."""
    # An answer that is continued has its first token behind it.
    messages = request.messages
    if not messages or messages[-1].role == "assistant":
        return ""
    if template.thought is None or request.thinking is None:
        return template.lead
    # After a thought that is there already comes a line of its own.
    return "" if request.thinking else "\n"


def opening_of(request: GenerateRequest, template: ChatTemplate) -> str:
    """Return what of the answer's text is in the prompt already: how its thought begins."""
    messages = request.messages
    if not messages or messages[-1].role == "assistant" or request.thinking is None:
        return ""
    whole = render_prompt(messages, template, told_tools(request), request.thinking)
    bare = render_prompt(messages, template, told_tools(request))
    return whole.removeprefix(bare).lstrip()


async def prompt_of(
    request: GenerateRequest, loaded: Loaded
) -> tuple[PromptText | None, tuple[int, ...]]:
    """Return what a request's prompt is as text, unless it came as token ids, and as those.

    Raises:
        InvalidRequestError: the template refuses these messages.
    """
    prompt = request.prompt
    if request.messages is not None:
        tools = told_tools(request)
        text = render_chat(request.messages, loaded.template, tools, request.thinking)
    elif isinstance(prompt, str):
        text = PromptText(prompt)
    else:
        assert prompt is not None
        return None, prompt
    return text, await encode(text.text, loaded)


async def encode(text: str, loaded: Loaded) -> tuple[int, ...]:
    """Return the tokens of a text, whatever its length without holding up the event loop."""
    to_ids = loaded.tokenizer.encode
    is_short = len(text) <= MAX_INLINE_CHARS
    return tuple(to_ids(text) if is_short else await asyncio.to_thread(to_ids, text))


async def evidence_of(
    request: GenerateRequest,
    text: PromptText | None,
    prompt: tuple[int, ...],
    mixture: ResolvedMixture,
    loaded: Loaded,
) -> tuple[range, ...]:
    """Return the positions of what the user wrote, if the mixture's gate reads it."""
    if not reads_prompt(mixture):
        return ()
    arguments = (request, text, prompt, loaded.template, loaded.tokenizer)
    if text is None or len(text.text) <= MAX_INLINE_CHARS:
        return find_evidence(*arguments)
    return await asyncio.to_thread(find_evidence, *arguments)


def _check_thinking(request: GenerateRequest, template: ChatTemplate) -> None:
    if not request.thinking:
        return
    if template.thought is None:
        raise InvalidRequestError(
            f"reasoning_effort and thinking are refused: the chat template {template.name!r} has "
            "no thoughts; leave them out, or say none",
            param="reasoning_effort",
        )
    if request.messages and request.messages[-1].role == "assistant":
        raise InvalidRequestError(
            "reasoning_effort and thinking are for a new answer, and the last message is one that "
            "goes on; leave them out",
            param="reasoning_effort",
        )


def _check_tools(request: GenerateRequest, template: ChatTemplate) -> None:
    if not told_tools(request):
        return
    if template.tool_call is None:
        raise InvalidRequestError(
            f"tools are refused: the chat template {template.name!r} has no form for them; choose "
            "another template, or tool_choice none",
            param="tools",
        )
    if request.given is not None and request.tool_choice.mode == "required":
        raise InvalidRequestError(
            "mrss.given must be left out where tools are to be called; got tool_choice as well",
            param="mrss.given",
        )
