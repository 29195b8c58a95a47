"""Chat templates: messages to the text that a model reads. A leaf, but for jinja2.

Templates are data, each with the stop strings that end a turn in it. What a user wrote cannot
end a turn: inside a part, runs of newlines become one, and turns are told apart by two.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mrss_provider.backend import Message
from mrss_provider.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    import jinja2

TEMPLATE_SUFFIX = ".jinja"


@dataclass(frozen=True)
class ChatTemplate:
    """How a model wants its turns.

    Attributes:
        name: of the template, or its file's path.
        source: jinja2; sees `messages` (role, content), `continues` (whether the last message is
            the assistant's and is to be continued) and the filters `one_line_breaks` (runs of
            newlines become one, outer white space goes), `open_line_breaks` (the same, but the
            end is kept as it is) and `no_turns` (outer white space goes, and blank lines before
            what looks like a turn).
        stop: strings that end an answer, besides the end-of-text token.
        lead: what a model writes between the prompt and its answer; no part of the answer.
    """

    name: str
    source: str
    stop: tuple[str, ...] = ()
    lead: str = ""


# A turn is "Name: text", two newlines apart; after the last "Assistant:" comes no space, because
# the model's first token brings it.
_TURNS = """\
{%- set names = {"system": "System", "user": "User", "assistant": "Assistant"} -%}
{%- for message in messages -%}
{%- if not loop.first %}{{ "\\n\\n" }}{% endif -%}
{{ names[message.role] }}:
{%- if loop.last and continues -%}
{%- set text = message.content | <CONTINUED> -%}
{{ " " ~ text if text else "" }}
{%- else -%}
{%- set text = message.content | <PART> -%}
{{ " " ~ text if text else "" }}
{%- endif -%}
{%- endfor -%}
{%- if not continues %}{{ "\\n\\nAssistant:" }}{% endif -%}
"""

_WORLD = _TURNS.replace("<CONTINUED>", "open_line_breaks").replace("<PART>", "one_line_breaks")
# These models write paragraphs, so what they wrote keeps its blank lines.
_G1 = _TURNS.replace("<CONTINUED>", "no_turns(true)").replace(
    "<PART>", "no_turns if message.role == 'assistant' else message.content | one_line_breaks"
)
_PLAIN = '{{ messages | map(attribute="content") | join("\\n\\n") }}'

TEMPLATES = {
    template.name: template
    for template in (
        ChatTemplate("world", _WORLD, ("\n\n",), lead=" "),
        ChatTemplate("g1", _G1, ("\nUser:",), lead=" "),
        ChatTemplate("plain", _PLAIN),
    )
}


def load_template(name: str, folder: Path | None = None) -> ChatTemplate:
    """Return a template by its name, or read a `.jinja` file (relative to `folder`).

    Raises:
        ConfigError: no such template or file, or a file that is no template.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not name.endswith(TEMPLATE_SUFFIX):
        raise ConfigError(
            f"a chat template is one of {', '.join(TEMPLATES)} or a {TEMPLATE_SUFFIX} file, got "
            f"{name!r}",
            param="template",
        )
    path = (folder or Path()) / name
    try:
        template = ChatTemplate(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"cannot read the chat template {path} ({exc})", param="template"
        ) from exc
    _compiled(template.source, template.name)
    return template


def render_prompt(messages: Sequence[Message], template: ChatTemplate) -> str:
    """Return the text that the model reads; a last message of the assistant is continued.

    Raises:
        InvalidRequestError: the template refuses these messages.
    """
    return _render(messages, [message.content for message in messages], template)


def user_spans(
    messages: Sequence[Message], template: ChatTemplate, prompt: str
) -> tuple[range, ...]:
    """Find what the user wrote in the prompt that `render_prompt` made of these messages.

    The template renders the messages once more, with a mark on either side of what each message of
    the user says. A template that does something else with text that has marks in it (it cuts,
    escapes or counts it) gives no spans: better no evidence than false evidence.

    Returns:
        Spans of characters of `prompt`, in order, none empty.
    """
    marks = _unused_marks(prompt, messages)
    if len(marks) < 2:
        return ()
    begin, end = marks
    marked = [
        _mark(message.content, begin, end) if message.role == "user" else message.content
        for message in messages
    ]
    try:
        text = _render(messages, marked, template)
    except InvalidRequestError:
        return ()
    if text.replace(begin, "").replace(end, "") != prompt:
        return ()
    spans: list[range] = []
    start: int | None = None
    # Every mark before this one is no part of the prompt.
    for number, found in enumerate(re.finditer(f"[{begin}{end}]", text)):
        at = found.start() - number
        if (found[0] == begin) != (start is None):
            return ()
        if start is not None:
            spans.append(range(start, at))
        start = at if start is None else None
    return tuple(spans) if start is None else ()


def _render(messages: Sequence[Message], contents: Sequence[str], template: ChatTemplate) -> str:
    """Render `messages` with other contents.

    Raises:
        InvalidRequestError: the template refuses these messages.
    """
    import jinja2

    compiled = _compiled(template.source, template.name)
    turns = [
        {"role": message.role, "content": content}
        for message, content in zip(messages, contents, strict=True)
    ]
    continues = bool(messages) and messages[-1].role == "assistant"
    try:
        return compiled.render(messages=turns, continues=continues)
    except jinja2.TemplateError as exc:
        raise InvalidRequestError(
            f"the chat template {template.name!r} refuses these messages: {exc}", param="messages"
        ) from exc


def _unused_marks(prompt: str, messages: Sequence[Message]) -> list[str]:
    """Return two characters for private use that stand nowhere in the messages, if there are."""
    used = set(prompt).union(*(message.content for message in messages))
    return list(itertools.islice((c for c in map(chr, _PRIVATE_USE) if c not in used), 2))


def _mark(text: str, begin: str, end: str) -> str:
    """Put marks around `text` but for its outer white space, which templates may take away."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    return f"{text[:start]}{begin}{core}{end}{text[start + len(core) :]}"


@functools.lru_cache(maxsize=16)
def _compiled(source: str, name: str) -> jinja2.Template:
    """Compile a template. It may come with a model from elsewhere, hence the sandbox.

    Raises:
        ConfigError: not jinja2.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(keep_trailing_newline=False)
    environment.filters["one_line_breaks"] = _one_line_breaks
    environment.filters["open_line_breaks"] = _open_line_breaks
    environment.filters["no_turns"] = _no_turns
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as exc:
        raise ConfigError(f"the chat template {name!r} is no jinja2: {exc}") from exc


_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_NEWLINES = re.compile(r"[\r\n]+")
_BLANK_BEFORE_TURN = re.compile(r"[\r\n]+(?=(?:System|User|Assistant):)")


def _one_line_breaks(text: str) -> str:
    return _NEWLINES.sub("\n", text.strip())


def _open_line_breaks(text: str) -> str:
    return _NEWLINES.sub("\n", text.lstrip())


def _no_turns(text: str, is_open: bool = False) -> str:
    return _BLANK_BEFORE_TURN.sub("\n", text.lstrip() if is_open else text.strip())


def _raise_exception(message: Any) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(str(message))
