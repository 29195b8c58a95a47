"""Answers of any client in one form, which the features are checked against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Call:
    """A tool call; `arguments` is the JSON text."""

    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass
class Choice:
    """One answer. `logprobs` are OpenAI's entries, one a token; None where there are none."""

    text: str = ""
    reasoning: str = ""
    calls: dict[int, Call] = field(default_factory=dict)
    finish: str | None = None
    logprobs: list[dict[str, Any]] | None = None


@dataclass
class Reply:
    """A whole answer, or a stream put together; `num_chunks` of the stream have text or calls."""

    choices: list[Choice] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    fingerprint: str | None = None
    num_chunks: int = 0

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def calls(self) -> list[Call]:
        """The first choice's calls, in order."""
        return [call for _, call in sorted(self.choices[0].calls.items())]

    def choice(self, index: int) -> Choice:
        """Return a choice, made where it is new."""
        while len(self.choices) <= index:
            self.choices.append(Choice())
        return self.choices[index]


def read_chat(body: Mapping[str, Any]) -> Reply:
    """Read a `chat.completion`."""
    reply = Reply(usage=body["usage"], fingerprint=body.get("system_fingerprint"))
    for raw in body["choices"]:
        message = raw["message"]
        logprobs = raw.get("logprobs") or {}
        calls = {
            i: Call(call["id"], call["function"]["name"], call["function"]["arguments"])
            for i, call in enumerate(message.get("tool_calls") or ())
        }
        reply.choices.append(
            Choice(
                message.get("content") or "",
                message.get("reasoning_content") or "",
                calls,
                raw["finish_reason"],
                logprobs.get("content"),
            )
        )
    return reply


def read_stream(chunks: Iterable[Mapping[str, Any]]) -> Reply:
    """Put the chunks of a streamed chat together."""
    reply = Reply()
    for chunk in chunks:
        reply.usage = chunk.get("usage") or reply.usage
        reply.fingerprint = chunk.get("system_fingerprint") or reply.fingerprint
        for raw in chunk["choices"]:
            choice, delta = reply.choice(raw["index"]), raw["delta"]
            _add_delta(choice, delta)
            choice.finish = raw.get("finish_reason") or choice.finish
            if raw.get("logprobs"):
                choice.logprobs = [*(choice.logprobs or ()), *raw["logprobs"]["content"]]
            said = ("content", "reasoning_content", "tool_calls")
            reply.num_chunks += any(delta.get(key) for key in said)
    return reply


def _add_delta(choice: Choice, delta: Mapping[str, Any]) -> None:
    choice.text += delta.get("content") or ""
    choice.reasoning += delta.get("reasoning_content") or ""
    for piece in delta.get("tool_calls") or ():
        call = choice.calls.setdefault(piece["index"], Call())
        call.id = piece.get("id") or call.id
        call.name = (piece.get("function") or {}).get("name") or call.name
        call.arguments += (piece.get("function") or {}).get("arguments") or ""


def read_completion(body: Mapping[str, Any]) -> Reply:
    """Read a `text_completion`; `logprobs` become chats' entries, the best in `top_logprobs`."""
    reply = Reply(usage=body.get("usage"), fingerprint=body.get("system_fingerprint"))
    for raw in body["choices"]:
        reply.choices.append(
            Choice(
                raw["text"], finish=raw["finish_reason"], logprobs=text_entries(raw.get("logprobs"))
            )
        )
    return reply


def read_completion_stream(chunks: Iterable[Mapping[str, Any]]) -> Reply:
    """Put the chunks of a streamed completion together."""
    reply = Reply()
    for chunk in chunks:
        reply.usage = chunk.get("usage") or reply.usage
        for raw in chunk["choices"]:
            choice = reply.choice(raw["index"])
            choice.text += raw.get("text") or ""
            choice.finish = raw.get("finish_reason") or choice.finish
            reply.num_chunks += bool(raw.get("text"))
    return reply


def text_entries(logprobs: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
    """Return the log-probabilities of a completion as chats have them."""
    if logprobs is None:
        return None
    rows = zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    )
    return [
        {"token": token, "logprob": logprob, "top_logprobs": top} for token, logprob, top in rows
    ]
