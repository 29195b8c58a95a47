"""ChatTemplate: a jinja2 text and the header that says how answers are read in it.

The header is TOML in the first comment of the file, `{#toml ... #}`; a file without one has turns
only: no stop strings, thoughts or tools.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrss_provider.chat.sandbox import TEMPLATES_FOLDER, compiled
from mrss_provider.errors import ConfigError

TEMPLATE_SUFFIX = ".jinja"
DEFAULT_TEMPLATE = "world"

Pair = tuple[str, str]


@dataclass(frozen=True)
class ChatTemplate:
    """How a model wants its turns.

    Attributes:
        name: of the template, or its file's path.
        source: jinja2; sees `messages` (role, content, tool_calls with name and arguments, a JSON
            object as text), `continues` (whether the last message is the assistant's and is to be
            continued), `tools` (as OpenAI writes them; none in a request without), `thinking`
            (true, false, or none where the request says nothing) and the filters
            `one_line_breaks` (runs of newlines become one, outer white space goes),
            `open_line_breaks` (the same, but the end is kept as it is), `no_turns` (outer white
            space goes, and blank lines before what looks like a turn) and `json`.
        stop: strings that end an answer, besides the end-of-text token.
        lead: what a model writes between the prompt and its answer; no part of the answer.
        thought: what begins and ends a thought; None for models that do not think.
        opens_thought: how a prompt ends that has begun the thought.
        tool_call: what stands around a call, a JSON object with `name` and `arguments`; None for
            a template without tools.
        tool_result: what stands around what a tool said.
        description: one line for people.
    """

    name: str
    source: str
    stop: tuple[str, ...] = ()
    lead: str = ""
    thought: Pair | None = None
    opens_thought: str = ""
    tool_call: Pair | None = None
    tool_result: Pair | None = None
    description: str = ""


_HEADER = re.compile(r"\s*\{#toml\n(.*?)#\}", re.DOTALL)
_TEXTS = ("lead", "opens_thought", "description")
_PAIRS = ("thought", "tool_call", "tool_result")


def parse_template(name: str, text: str) -> ChatTemplate:
    """Read a template: its header, and jinja2.

    Raises:
        ConfigError: a bad header, or no jinja2.
    """
    header = _HEADER.match(text)
    fields = _header(header[1], name) if header else {}
    compiled(text, name)
    return ChatTemplate(name, text, **fields)


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
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"cannot read the chat template {path} ({exc})", param="template"
        ) from exc
    return parse_template(str(path), text)


# A part of a name: letters and digits with nothing of their kind around.
_G1 = re.compile(r"(?<![a-z0-9])g[0-9]", re.IGNORECASE)
_WORLD = re.compile(r"(?<![a-z])world(?![a-z])", re.IGNORECASE)


def detect_template(*names: str) -> tuple[str, str]:
    """Return the template that a model's names ask for, and why.

    RWKV's checkpoints say in their names what they were trained on: `rwkv7-g1a-0.4b-...` (G0 and
    later: chats with thoughts), `RWKV-x070-World-0.4B-...`.

    Args:
        names: of the file and its folder, the nearest first.
    """
    for name in names:
        for template, pattern in (("g1", _G1), ("world", _WORLD)):
            found = pattern.search(name)
            if found:
                return template, f"the name {name!r} says so"
    return DEFAULT_TEMPLATE, "nothing says otherwise"


def _header(text: str, name: str) -> dict[str, Any]:
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ConfigError(f"the header of the chat template {name!r} is no TOML: {exc}") from exc
    known = ("stop", *_TEXTS, *_PAIRS)
    for key in raw:
        if key not in known:
            raise ConfigError(
                f"the header of the chat template {name!r} has the keys {', '.join(known)}, got "
                f"{key!r}"
            )
    fields: dict[str, Any] = {key: _text(raw, key, name) for key in _TEXTS if key in raw}
    for key in ("stop", *_PAIRS):
        if key in raw:
            fields[key] = _strings(raw[key], key, name)
    for key in _PAIRS:
        if len(fields.get(key, (1, 2))) != 2:
            raise _bad(name, key, "a list of what begins and what ends it", raw[key])
    thought = fields.get("thought", ("", ""))
    if not thought[0].startswith(fields.get("opens_thought", "")):
        raise _bad(name, "opens_thought", "a beginning of the thought's mark", raw["opens_thought"])
    return fields


def _text(raw: Mapping[str, Any], key: str, name: str) -> str:
    if not isinstance(raw[key], str):
        raise _bad(name, key, "a string", raw[key])
    return str(raw[key])


def _strings(value: object, key: str, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise _bad(name, key, "a list of strings, none empty", value)
    return tuple(value)


def _bad(name: str, key: str, allowed: str, value: object) -> ConfigError:
    return ConfigError(
        f"the header of the chat template {name!r}: {key} must be {allowed}, got {value!r:.80}"
    )


def _bundled(name: str) -> ChatTemplate:
    path = TEMPLATES_FOLDER / f"{name}{TEMPLATE_SUFFIX}"
    text = path.read_text(encoding="utf-8")
    header = _HEADER.match(text)
    assert header is not None
    # Compiled when it is first used: whoever imports this may never render anything.
    return ChatTemplate(name, text, **_header(header[1], name))


TEMPLATES = {name: _bundled(name) for name in ("world", "g1", "rwkv-infer", "plain")}
