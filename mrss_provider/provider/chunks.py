"""Deltas to LiteLLM's stream chunks, in the one order in which LiteLLM loses nothing.

LiteLLM's stream wrapper drops what comes after a finish reason, and takes the finish reason from
the first choice of a chunk only. So: content; the finish of every choice but the first, each behind
an empty first choice; the usage on a chunk without content; last, the first choice's finish.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from litellm.types.utils import (
    ChoiceLogprobs,
    Delta,
    ModelResponseStream,
    StreamingChoices,
    Usage,
)

from mrss_provider import backend
from mrss_provider.backend import StreamInfo
from mrss_provider.errors import EngineUnavailableError
from mrss_provider.openai_schema import mrss_fields, usage_to_dict
from mrss_provider.openai_schema.answers import chat_logprobs
from mrss_provider.openai_schema.traces import trace_fields
from mrss_provider.provider.calls import Call


class StreamChunks:
    """Writes the chunks of one answer.

    They carry the deployment's id, which spares the proxy a look-up for each.
    """

    def __init__(self, call: Call) -> None:
        self._model = call.chunk_model
        self._num_choices = call.requests[0].n
        self._model_id = call.model_id
        self._id = f"{'cmpl' if call.is_text else 'chatcmpl'}-{uuid.uuid4().hex}"
        # Set with the first chunk: LiteLLM takes the time of the last one then, not earlier.
        self._created = 0
        self._started: set[int] = set()
        self._finished: dict[int, str] = {}
        self._usage: backend.Usage | None = None
        self._mrss: dict[str, Any] = {}
        self._template: ModelResponseStream | None = None

    def write(self, deltas: Sequence[backend.Delta], info: StreamInfo) -> list[ModelResponseStream]:
        """Return the chunks for deltas that came together: at most two for each choice."""
        if len(deltas) == 1 and self._is_plain(deltas[0]):
            return [self._plain(deltas[0].text)]
        chunks = [
            self._content(delta, info)
            for delta in _merge(deltas)
            if delta.text or delta.logprobs or delta.trace or delta.trace_summary
        ]
        for delta in deltas:
            self._usage = delta.usage or self._usage
            if delta.finish_reason is None:
                continue
            self._finished[delta.index] = delta.finish_reason
            if delta.index not in self._started:
                chunks.append(self._content(backend.Delta(delta.index), info))
            if delta.index > 0:
                chunks.append(self._late_finish(delta.index, delta.finish_reason))
        return chunks

    def end(self) -> list[ModelResponseStream]:
        """Return the last chunks: the usage, then the first choice's finish reason.

        Raises:
            EngineUnavailableError: the answer stopped short. Without a finish reason LiteLLM
                would say "stop", and without usage it would guess one.
        """
        if self._usage is None or len(self._finished) < self._num_choices:
            raise EngineUnavailableError("the engine closed the stream before the answer's end")
        usage = self._chunk([StreamingChoices(delta=Delta())])
        usage.usage = Usage(**usage_to_dict(self._usage))
        # For LiteLLM's log, which keeps this chunk to itself.
        usage._hidden_params["provider_specific_fields"] = self._mrss
        finish = StreamingChoices(delta=Delta(), finish_reason=self._finished[0])
        return [usage, self._chunk([finish])]

    def _is_plain(self, delta: backend.Delta) -> bool:
        """Whether all that this delta brings is more text of the first choice."""
        return (
            delta.text != ""
            and delta.index == 0
            and 0 in self._started
            and not delta.logprobs
            and not delta.trace
            and delta.finish_reason is None
            and delta.usage is None
        )

    def _plain(self, text: str) -> ModelResponseStream:
        """Do as `_content` at half its cost: nearly every chunk of a stream is made here."""
        template = self._template
        if template is None:
            template = self._template = self._chunk([StreamingChoices(delta=Delta(content=text))])
        choice = template.choices[0]
        delta = choice.delta.model_copy(update={"content": text})
        chunk = template.model_copy(
            update={"choices": [choice.model_copy(update={"delta": delta})]}
        )
        chunk._hidden_params = {"model_id": self._model_id}
        return chunk

    def _content(self, delta: backend.Delta, info: StreamInfo) -> ModelResponseStream:
        is_first = not self._started
        role = None if delta.index in self._started else "assistant"
        self._started.add(delta.index)
        content = Delta(content=delta.text, role=role)
        if traced := trace_fields(delta.trace, delta.trace_summary):
            content.provider_specific_fields = {"mrss": traced}
        choice = StreamingChoices(index=delta.index, delta=content)
        if delta.logprobs:
            choice.logprobs = ChoiceLogprobs(**(chat_logprobs(delta.logprobs) or {}))
        chunk = self._chunk([choice])
        if is_first:
            # On the first chunk alone, since these are serialised the slow way; and not in the
            # delta, where they would slow down LiteLLM's assembly of the whole stream.
            chunk.system_fingerprint = info.fingerprint
            chunk.provider_specific_fields = self._mrss = {
                "mrss": mrss_fields(info.mixture, info.rows)
            }
        return chunk

    def _late_finish(self, index: int, reason: str) -> ModelResponseStream:
        return self._chunk(
            [
                StreamingChoices(index=0, delta=Delta()),
                StreamingChoices(index=index, delta=Delta(), finish_reason=reason),
            ]
        )

    def _chunk(self, choices: list[StreamingChoices]) -> ModelResponseStream:
        if not self._created:
            self._created = int(time.time())
        chunk = ModelResponseStream(
            id=self._id, created=self._created, model=self._model, choices=choices
        )
        chunk._hidden_params = {"model_id": self._model_id}
        return chunk


def _merge(deltas: Sequence[backend.Delta]) -> list[backend.Delta]:
    """Join what each choice says, in order of first appearance."""
    merged: dict[int, list[backend.Delta]] = {}
    for delta in deltas:
        merged.setdefault(delta.index, []).append(delta)
    return [
        backend.Delta(
            index,
            "".join(delta.text for delta in own),
            logprobs=tuple(token for delta in own for token in delta.logprobs),
            trace=tuple(token for delta in own for token in delta.trace),
            trace_summary=next((d.trace_summary for d in own if d.trace_summary), None),
        )
        for index, own in merged.items()
    ]
