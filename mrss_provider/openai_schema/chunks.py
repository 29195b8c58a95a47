"""Streams: a `Delta` to chunk objects and back, and errors met after the first byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrss_provider.backend import Delta, TokenLogprob, TopLogprob, Usage
from mrss_provider.errors import EngineError, MRSSError, error_from_dict
from mrss_provider.openai_schema.answers import (
    AnswerHead,
    chat_logprobs,
    is_empty,
    mrss_fields,
    text_logprobs,
    usage_from_dict,
    usage_to_dict,
)
from mrss_provider.openai_schema.spelling import num_chars, token_bytes
from mrss_provider.openai_schema.tools import delta_object, read_deltas
from mrss_provider.openai_schema.traces import read_trace, trace_fields
from mrss_provider.openai_schema.values import StreamOptions

_OBJECTS = {"chat": "chat.completion.chunk", "text": "text_completion"}


class ChunkWriter:
    """Writes the chunks of one answer.

    The first chunk of all carries `mrss` (in a chat also in the delta's
    `provider_specific_fields`), the first one of each chat choice carries the role. A trace is in
    the `mrss` of the delta's `provider_specific_fields`, or of a text completion's choice.
    """

    def __init__(self, head: AnswerHead, options: StreamOptions) -> None:
        self._is_chat = head.kind == "chat"
        self._options = options
        self._base: dict[str, Any] = {
            "id": head.id,
            "object": _OBJECTS[head.kind],
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }
        self._mrss: dict[str, Any] | None = mrss_fields(head.model, head.rows)
        self._seen: set[int] = set()
        # Characters written for each choice of a text completion.
        self._offsets: dict[int, int] = {}

    def chunks(self, delta: Delta, offset: int = 0) -> list[dict[str, Any]]:
        """Return the chunk objects for `delta`, whose stream's choices begin at `offset`.

        None when there is nothing to say, two when it has both content and usage. With several
        streams in one answer, add the usages up and write the sum with `usage_chunk`.
        """
        chunks = []
        if not is_empty(delta):
            chunks.append(self._content_chunk(delta, delta.index + offset))
        if delta.usage is not None and self._options.include_usage:
            chunks.append(self.usage_chunk(delta.usage))
        return chunks

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk without choices that ends a stream with `include_usage`."""
        return {**self._base, "choices": [], "usage": usage_to_dict(usage)}

    def _content_chunk(self, delta: Delta, index: int) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        mrss, self._mrss = self._mrss, None
        traced = trace_fields(delta.trace, delta.trace_summary)
        if self._is_chat:
            content: dict[str, Any] = _said(delta)
            if index not in self._seen:
                self._seen.add(index)
                content["role"] = "assistant"
            if mrss is not None or traced:
                content["provider_specific_fields"] = {"mrss": {**(mrss or {}), **traced}}
            choice["delta"] = content
        else:
            choice["text"] = delta.text
            if traced:
                choice["mrss"] = traced
        if delta.logprobs and (logprobs := self._logprobs(delta, index)):
            choice["logprobs"] = logprobs
        if self._options.include_num_tokens:
            choice["num_tokens"] = delta.num_tokens
        choice["finish_reason"] = delta.finish_reason
        chunk = {**self._base, "choices": [choice]}
        if mrss is not None:
            chunk["mrss"] = mrss
        return chunk

    def _logprobs(self, delta: Delta, index: int) -> dict[str, Any] | None:
        if self._is_chat:
            return chat_logprobs(delta.logprobs)
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(num_chars(t.token) for t in delta.logprobs)
        return text_logprobs(delta.logprobs, offset)


def _said(delta: Delta) -> dict[str, Any]:
    """Return what a chat's delta says; no content where it thinks or calls only."""
    said: dict[str, Any] = {}
    if delta.reasoning:
        said["reasoning_content"] = delta.reasoning
    if delta.tool_calls:
        said["tool_calls"] = [delta_object(piece) for piece in delta.tool_calls]
    return said if said and not delta.text else {"content": delta.text, **said}


def read_chunk(chunk: Mapping[str, Any]) -> Delta:
    """Read a chunk that `ChunkWriter` wrote with `include_num_tokens`.

    Raises:
        EngineError: it is not such a chunk.
    """
    try:
        choices = chunk["choices"]
        usage = chunk.get("usage")
        if not choices:
            return Delta(usage=None if usage is None else usage_from_dict(usage))
        (choice,) = choices
        content = choice.get("delta")
        text = choice["text"] if content is None else content.get("content") or ""
        raw = choice.get("logprobs")
        logprobs = () if raw is None else _read_logprobs(raw)
        return Delta(
            choice["index"],
            text,
            choice["num_tokens"],
            logprobs,
            choice["finish_reason"],
            None if usage is None else usage_from_dict(usage),
            *read_trace(_mrss_of(choice)),
            reasoning="" if content is None else content.get("reasoning_content") or "",
            tool_calls=() if content is None else read_deltas(content.get("tool_calls")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise EngineError(f"the engine sent a chunk that cannot be read ({exc!r})") from exc


def _mrss_of(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `mrss` object where `_content_chunk` put it, or nothing."""
    content = choice.get("delta")
    holder = choice if content is None else content.get("provider_specific_fields") or {}
    mrss: Mapping[str, Any] = holder.get("mrss") or {}
    return mrss


def error_to_event(error: MRSSError) -> dict[str, Any]:
    """Write an error met after the first byte: `to_dict` and the status it would have had."""
    fields = error.to_dict()["error"]
    assert isinstance(fields, dict)
    return {"error": {**fields, "status": error.status_code}}


def error_from_event(event: Mapping[str, Any]) -> MRSSError | None:
    """Rebuild the error of an event that `error_to_event` wrote; None for any other event."""
    fields = event.get("error")
    if not isinstance(fields, Mapping):
        return None
    status = fields.get("status")
    return error_from_dict(status if isinstance(status, int) else 500, event)


def _read_logprobs(raw: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    if "content" in raw:
        return tuple(
            TokenLogprob(
                entry["token_id"],
                bytes(entry["bytes"]),
                entry["logprob"],
                tuple(
                    TopLogprob(top["token_id"], bytes(top["bytes"]), top["logprob"])
                    for top in entry["top_logprobs"]
                ),
            )
            for entry in raw["content"]
        )
    return tuple(
        TokenLogprob(
            token_id,
            token_bytes(text),
            logprob,
            tuple(
                TopLogprob(top_id, token_bytes(top_text), top_logprob)
                # What was chosen stands behind them if it is none of them.
                for top_id, (top_text, top_logprob) in zip(
                    top_ids, (top or {}).items(), strict=False
                )
            ),
        )
        for token_id, text, logprob, top_ids, top in zip(
            raw["token_ids"],
            raw["tokens"],
            raw["token_logprobs"],
            raw["top_token_ids"],
            raw["top_logprobs"],
            strict=True,
        )
    )
