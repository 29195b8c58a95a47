"""The prompt file of a comparison: JSON Lines, all of it checked before anything is asked.

A line is {"id", "messages" or "prompt", "params"?, "checks"?, "group"?}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mrss_provider.compare.checks import Check, parse_check
from mrss_provider.errors import FileFormatError

_KEYS = ("id", "messages", "prompt", "params", "checks", "group")
# These a comparison sets itself, so that all models are asked the same.
OURS = ("model", "messages", "prompt", "stream", "stream_options", "seed", "n")
_MAX_ID_CHARS = 128


@dataclass(frozen=True)
class Prompt:
    """What each model is asked.

    Attributes:
        id: what results call it.
        messages: a chat, or None.
        prompt: a text to continue, or None.
        params: sent with it, over those of the comparison.
        checks: of the answers.
        group: what kind of prompt it is, for tables; "" without one.
    """

    id: str
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    group: str = ""

    @property
    def question(self) -> str:
        """The text to continue, or what the user said last."""
        if self.messages is None:
            return self.prompt or ""
        said = [m["content"] for m in self.messages if m["role"] == "user"] or [""]
        return text_of(said[-1])


@dataclass(frozen=True)
class PromptFile:
    """Attributes: `prompts`, in order, and `sha256` of the file that they were read from."""

    prompts: tuple[Prompt, ...]
    sha256: str


def read_prompts(path: Path) -> PromptFile:
    """Read and check a prompt file.

    Raises:
        FileFormatError: not such a file; the message names the line.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        # Not `splitlines`: a JSON string may hold what Unicode calls the end of a line.
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as exc:
        raise FileFormatError(f"{path} is not UTF-8 text (byte {exc.start}); convert it") from exc
    prompts: dict[str, Prompt] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = _parse(line, str(number))
        except FileFormatError as exc:
            raise FileFormatError(f"{path}, line {number}: {exc}") from exc
        if prompt.id in prompts:
            raise FileFormatError(
                f"{path}, line {number}: the id {prompt.id!r} is that of line {line_of[prompt.id]}"
            )
        prompts[prompt.id], line_of[prompt.id] = prompt, number
    if not prompts:
        raise FileFormatError(f"{path} holds no prompts; write one JSON object a line")
    return PromptFile(tuple(prompts.values()), hashlib.sha256(data).hexdigest())


def check_params(params: object) -> dict[str, Any]:
    """Return parameters of a request, if a comparison leaves them to its user.

    Raises:
        FileFormatError: no object, or one that the comparison sets itself.
    """
    if not isinstance(params, dict):
        raise FileFormatError(f"params must be a JSON object, got {params!r:.40}")
    for key in OURS:
        if key in params:
            raise FileFormatError(f"params may not hold {key!r}: a comparison sets it itself")
    try:
        json.dumps(params, allow_nan=False)
    except ValueError as exc:
        raise FileFormatError(
            "params may not hold NaN or infinity, which JSON does not have"
        ) from exc
    return params


def text_of(content: object) -> str:
    """Return the text of a message's content, which may be in parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)


def _parse(line: str, default_id: str) -> Prompt:
    try:
        raw = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise FileFormatError(f"no JSON: {exc}") from exc
    if not isinstance(raw, dict):
        raise FileFormatError(f"a line must be a JSON object, got {line!r:.40}")
    for key in raw:
        if key not in _KEYS:
            raise FileFormatError(f"{key!r:.40} is no key here; known are {', '.join(_KEYS)}")
    if ("messages" in raw) == ("prompt" in raw):
        raise FileFormatError('give one of "messages" (a chat) and "prompt" (a text to continue)')
    checks = raw.get("checks", [])
    if not isinstance(checks, list):
        raise FileFormatError(f"checks must be a list, got {checks!r:.40}")
    return Prompt(
        id=_text(raw, "id", default_id, _MAX_ID_CHARS),
        messages=_messages(raw["messages"]) if "messages" in raw else None,
        prompt=_text(raw, "prompt", "") if "prompt" in raw else None,
        params=check_params(raw.get("params", {})),
        checks=tuple(parse_check(check) for check in checks),
        group=_text(raw, "group", "") if "group" in raw else "",
    )


def _no_constant(text: str) -> None:
    raise ValueError(f"it holds {text}, which JSON does not have")


def _messages(raw: object) -> list[dict[str, Any]]:
    if not isinstance(raw, list) or not raw:
        raise FileFormatError('messages must be a list such as [{"role": "user", "content": "Hi"}]')
    for number, message in enumerate(raw):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise FileFormatError(f"messages[{number}] must be an object with a role")
        if not isinstance(message.get("content"), str | list):
            raise FileFormatError(f"messages[{number}] must have a content, a text or its parts")
    return raw


def _text(raw: Mapping[str, Any], key: str, default: str, max_chars: int = 1 << 20) -> str:
    value = raw.get(key, default)
    if not isinstance(value, str) or not 0 < len(value) <= max_chars:
        raise FileFormatError(
            f"{key} must be a text of 1 to {max_chars} characters, got {value!r:.40}"
        )
    return value
