"""Whole answers: deltas collected, response objects, what the headers and `mrss` fields say."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mrss_provider.backend import (
    Delta,
    FinishReason,
    StreamInfo,
    TokenLogprob,
    TokenTrace,
    ToolCall,
    TraceSummary,
    Usage,
)
from mrss_provider.errors import EngineUnavailableError
from mrss_provider.openai_schema.spelling import num_chars, token_text
from mrss_provider.openai_schema.tools import call_object, with_deltas
from mrss_provider.openai_schema.traces import trace_fields

Kind = Literal["chat", "text"]

# JSON has no infinity; this is what OpenAI writes for a token that cannot come.
MIN_LOGPROB = -9999.0

PROTOCOL = 1
"""Raised when a client no longer understands an older engine's answers, or the reverse."""

_PROTOCOL_HEADER = "x-mrss-protocol"
_HEADERS = {
    "mixture": "x-mrss-mixture",
    "rows": "x-mrss-rows",
    "fingerprint": "x-mrss-fingerprint",
    "prompt_tokens": "x-mrss-prompt-tokens",
}


@dataclass(frozen=True)
class AnswerHead:
    """What every chunk of an answer repeats. `created` is Unix time in seconds."""

    kind: Kind
    id: str
    created: int
    model: str
    fingerprint: str
    rows: int


@dataclass
class Choice:
    """One of the answers, as far as it has come."""

    index: int
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    trace: tuple[TokenTrace, ...] = ()
    trace_summary: TraceSummary | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """What the assistant said, thought and called; content is null beside calls alone."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["content"] = self.text or None
            message["tool_calls"] = [call_object(call) for call in self.tool_calls]
        return message


@dataclass
class Answer:
    """Deltas of one request (or of several prompts' requests) put together.

    Attributes:
        choices: by index, in order of appearance.
        usage: summed over the streams that were added.
    """

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: Usage | None = None

    def add(self, delta: Delta, offset: int = 0) -> None:
        """Add a delta of the stream whose choices begin at `offset`."""
        if delta.usage is not None:
            self.usage = delta.usage if self.usage is None else self.usage + delta.usage
        if is_empty(delta):
            return
        index = delta.index + offset
        choice = self.choices.setdefault(index, Choice(index))
        choice.text += delta.text
        choice.reasoning += delta.reasoning
        choice.tool_calls = with_deltas(choice.tool_calls, delta.tool_calls)
        choice.logprobs += delta.logprobs
        choice.trace += delta.trace
        choice.finish_reason = delta.finish_reason or choice.finish_reason
        choice.trace_summary = delta.trace_summary or choice.trace_summary

    def ordered(self) -> list[Choice]:
        """Return the choices by index."""
        return [self.choices[index] for index in sorted(self.choices)]


def new_head(kind: Kind, info: StreamInfo) -> AnswerHead:
    """Name a new answer: a fresh id, the time, the canonical mixture as its model."""
    prefix = "chatcmpl" if kind == "chat" else "cmpl"
    return AnswerHead(
        kind=kind,
        id=f"{prefix}-{os.urandom(16).hex()}",
        created=int(time.time()),
        model=info.mixture,
        fingerprint=info.fingerprint,
        rows=info.rows,
    )


def mrss_fields(mixture: str, rows: int) -> dict[str, Any]:
    """Return the `mrss` object of an answer."""
    return {"mixture": mixture, "rows": rows}


def chat_response(head: AnswerHead, answer: Answer) -> dict[str, Any]:
    """Write a `chat.completion` object; each message's `mrss` has the trace of its answer."""
    mrss = mrss_fields(head.model, head.rows)
    choices = [
        {
            "index": choice.index,
            "message": {
                **choice.message,
                "provider_specific_fields": {
                    "mrss": {**mrss, **trace_fields(choice.trace, choice.trace_summary)}
                },
            },
            "logprobs": chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }
        for choice in answer.ordered()
    ]
    return _response(head, "chat.completion", choices, answer.usage)


def completion_response(head: AnswerHead, answer: Answer) -> dict[str, Any]:
    """Write a `text_completion` object; a choice that was traced has an `mrss` of its own."""
    choices = [
        {
            "index": choice.index,
            "text": choice.text,
            "logprobs": text_logprobs(choice.logprobs, 0),
            "finish_reason": choice.finish_reason,
            **_choice_mrss(choice),
        }
        for choice in answer.ordered()
    ]
    return _response(head, "text_completion", choices, answer.usage)


def usage_to_dict(usage: Usage) -> dict[str, Any]:
    """Write the `usage` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        **_reasoning_details(usage),
    }


def usage_from_dict(raw: Mapping[str, Any]) -> Usage:
    """Read what `usage_to_dict` wrote."""
    details = raw.get("prompt_tokens_details") or {}
    completion = raw.get("completion_tokens_details") or {}
    return Usage(
        raw["prompt_tokens"],
        raw["completion_tokens"],
        details.get("cached_tokens") or 0,
        completion.get("reasoning_tokens") or 0,
    )


def _reasoning_details(usage: Usage) -> dict[str, Any]:
    if not usage.reasoning_tokens:
        return {}
    return {"completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens}}


def is_empty(delta: Delta) -> bool:
    """Tell whether a delta says nothing of a choice."""
    return not (
        delta.text
        or delta.finish_reason
        or delta.num_tokens
        or delta.logprobs
        or delta.reasoning
        or delta.tool_calls
    )


def info_to_headers(info: StreamInfo) -> dict[str, str]:
    """Write what is known on admission as response headers."""
    fields = {header: str(getattr(info, name)) for name, header in _HEADERS.items()}
    return {_PROTOCOL_HEADER: str(PROTOCOL), **fields}


def info_from_headers(headers: Mapping[str, str]) -> StreamInfo:
    """Read what `info_to_headers` wrote.

    Raises:
        EngineUnavailableError: the headers are not there (the address is not one of our
            engines), or of another protocol.
    """
    protocol = headers.get(_PROTOCOL_HEADER)
    if protocol is not None:
        check_protocol(protocol)
    try:
        return StreamInfo(
            mixture=headers[_HEADERS["mixture"]],
            rows=int(headers[_HEADERS["rows"]]),
            fingerprint=headers[_HEADERS["fingerprint"]],
            prompt_tokens=int(headers[_HEADERS["prompt_tokens"]]),
        )
    except (KeyError, ValueError) as exc:
        raise EngineUnavailableError(
            "the answer does not come from an mrss engine (no x-mrss headers); check the address"
        ) from exc


def check_protocol(protocol: object) -> None:
    """Refuse an engine of another protocol.

    Raises:
        EngineUnavailableError: as said.
    """
    if str(protocol) != str(PROTOCOL):
        raise EngineUnavailableError(
            f"the engine speaks protocol {protocol}, this client {PROTOCOL}; restart the engine "
            "with the version of mrss-provider that is installed here"
        )


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """Write log-probabilities as chats have them, `token_id` beside each token.

    The token that ends the text is left out, as OpenAI does: it has no part in the content.
    """
    tokens = [token for token in tokens if token.token]
    if not tokens:
        return None
    return {
        "content": [
            {
                **_chat_token(token.token_id, token.token, token.logprob),
                "top_logprobs": [_chat_token(t.token_id, t.token, t.logprob) for t in token.top],
            }
            for token in tokens
        ]
    }


def text_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
    r"""Write log-probabilities as completions have them; `offset` is the first token's, in text.

    Bytes that are no text by themselves are spelled `bytes:\xe4\xbd`. The ids go beside them. Each
    token's best ones have the token itself behind them if it is none of them.
    """
    if not tokens:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += num_chars(token.token)
    return {
        "tokens": [token_text(token.token) for token in tokens],
        "token_logprobs": [_number(token.logprob) for token in tokens],
        "top_logprobs": [_best_and_own(token) for token in tokens],
        "text_offset": offsets,
        "token_ids": [token.token_id for token in tokens],
        "top_token_ids": [[t.token_id for t in token.top] for token in tokens],
    }


def _best_and_own(token: TokenLogprob) -> dict[str, float] | None:
    own = _number(token.logprob)
    if own is None:
        return None
    found = {token_text(t.token): max(t.logprob, MIN_LOGPROB) for t in token.top}
    return found | {key: own for key in [token_text(token.token)] if key not in found}


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, MIN_LOGPROB)


def _choice_mrss(choice: Choice) -> dict[str, Any]:
    traced = trace_fields(choice.trace, choice.trace_summary)
    return {"mrss": traced} if traced else {}


def _chat_token(token_id: int, token: bytes, logprob: float | None) -> dict[str, Any]:
    return {
        "token": token.decode(errors="replace"),
        "token_id": token_id,
        "logprob": _number(logprob),
        "bytes": list(token),
    }


def _response(
    head: AnswerHead, kind: str, choices: list[dict[str, Any]], usage: Usage | None
) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
        "choices": choices,
        "usage": None if usage is None else usage_to_dict(usage),
        "mrss": mrss_fields(head.model, head.rows),
    }
