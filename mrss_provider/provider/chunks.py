"""Deltas to LiteLLM's stream chunks, in the one order in which LiteLLM loses nothing.

LiteLLM's stream wrapper drops what comes after a finish reason, and takes the finish reason from
the first choice of a chunk only. So: content; the finish of every choice but the first, each behind
an empty first choice; the usage on a chunk without content; last, the first choice's finish.

A chunk says one kind of thing: LiteLLM's bridges to other wires look at the first kind that they
find in a chunk, and at its first tool call.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from litellm.types.utils import (
    ChatCompletionDeltaToolCall,
    ChoiceLogprobs,
    Delta,
    Function,
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

    Args:
        call: what is answered.
        on_thought: called for each piece of a thought.
    """

    def __init__(self, call: Call, on_thought: Callable[[], object] = lambda: None) -> None:
        self._on_thought = on_thought
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
        """Return the chunks for deltas that came together: one for what each choice says in a row.

        A choice that finishes here gets one more.
        """
        if len(deltas) == 1 and self._is_plain(deltas[0]):
            return [self._plain(deltas[0].text)]
        chunks = [self._content(piece, info) for piece in _pieces(deltas) if _says_something(piece)]
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
            and not delta.reasoning
            and not delta.tool_calls
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
        if delta.reasoning:
            self._on_thought()
        content = _delta(delta, role)
        if traced := trace_fields(delta.trace, delta.trace_summary):
            content.provider_specific_fields = {"mrss": traced}
        choice = StreamingChoices(index=delta.index, delta=content)
        if logprobs := chat_logprobs(delta.logprobs):
            choice.logprobs = ChoiceLogprobs(**logprobs)
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


def _delta(piece: backend.Delta, role: str | None) -> Delta:
    if piece.reasoning:
        return Delta(role=role, reasoning_content=piece.reasoning)
    if piece.tool_calls:
        return Delta(role=role, tool_calls=[_tool_call(call) for call in piece.tool_calls])
    return Delta(role=role, content=piece.text)


def _tool_call(call: backend.ToolCallDelta) -> ChatCompletionDeltaToolCall:
    return ChatCompletionDeltaToolCall(
        index=call.position,
        id=call.id,
        type="function",
        function=Function(name=call.name, arguments=call.arguments),
    )


@dataclass
class _Run:
    """Deltas of one choice in a row that say one kind of thing; None is nothing yet."""

    kind: str | int | None = None
    deltas: list[backend.Delta] = field(default_factory=list)


def _pieces(deltas: Sequence[backend.Delta]) -> Iterator[backend.Delta]:
    """Yield what each choice says, joined, one kind a piece; choices as they first appear."""
    runs: dict[int, list[_Run]] = {}
    for delta in deltas:
        own = runs.setdefault(delta.index, [_Run()])
        for part in _parts(delta):
            kind = _kind(part)
            if own[-1].kind is None:
                own[-1].kind = kind
            elif kind is not None and kind != own[-1].kind:
                own.append(_Run(kind))
            own[-1].deltas.append(part)
    for index, own in runs.items():
        for run in own:
            yield _joined(index, run.deltas)


def _parts(delta: backend.Delta) -> Iterator[backend.Delta]:
    """Split a delta into kinds. What belongs to its tokens goes with the first part."""
    if not delta.reasoning and not delta.tool_calls:
        yield delta
        return
    pieces: list[dict[str, Any]] = []
    if delta.reasoning:
        pieces.append({"reasoning": delta.reasoning})
    if delta.text:
        pieces.append({"text": delta.text})
    pieces += [{"tool_calls": (call,)} for call in delta.tool_calls]
    yield replace(delta, **{"text": "", "reasoning": "", "tool_calls": (), **pieces[0]})
    for piece in pieces[1:]:
        yield backend.Delta(delta.index, **piece)


def _kind(part: backend.Delta) -> str | int | None:
    if part.tool_calls:
        return part.tool_calls[0].position
    if part.reasoning:
        return "reasoning"
    return "text" if part.text else None


def _joined(index: int, parts: Sequence[backend.Delta]) -> backend.Delta:
    calls = [call for part in parts for call in part.tool_calls]
    arguments = "".join(call.arguments for call in calls)
    return backend.Delta(
        index,
        "".join(part.text for part in parts),
        logprobs=tuple(token for part in parts for token in part.logprobs),
        trace=tuple(token for part in parts for token in part.trace),
        trace_summary=next((part.trace_summary for part in parts if part.trace_summary), None),
        reasoning="".join(part.reasoning for part in parts),
        tool_calls=(replace(calls[0], arguments=arguments),) if calls else (),
    )


def _says_something(piece: backend.Delta) -> bool:
    return bool(
        piece.text
        or piece.reasoning
        or piece.tool_calls
        or piece.logprobs
        or piece.trace
        or piece.trace_summary
    )
