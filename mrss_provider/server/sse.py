"""Server-sent events: how deltas become bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mrss_provider.backend import Delta, TextPiece
from mrss_provider.openai_schema import ChunkWriter

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # nginx would hold an answer back until it is whole.
    "x-accel-buffering": "no",
}

DONE = b"data: [DONE]\n\n"

_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_ENCODE_TEXT = json.encoder.encode_basestring

# Stands where a text will be: no field of a chunk but the text has this character.
_HOLE = "\0"


def event(data: Mapping[str, Any]) -> bytes:
    """Return `data` as one event. JSON escapes newlines, so one line is enough."""
    return b"data: " + _ENCODE(data).encode() + b"\n\n"


class EventWriter:
    """Writes the events of one answer, the chunks of `writer`.

    All but the first event of a choice, those with more than text and the last ones differ in their
    text only; what is around it is encoded once.
    """

    def __init__(self, writer: ChunkWriter) -> None:
        self._writer = writer
        self._begun: set[int] = set()
        # By choice and number of tokens: what stands before and after the text.
        self._frames: dict[tuple[int, int], tuple[bytes, bytes]] = {}

    def write(self, delta: Delta) -> bytes:
        """Return the events for `delta`, joined; b"" if there is nothing to say."""
        if not _is_plain(delta) or delta.index not in self._begun:
            chunks = self._writer.chunks(delta)
            # What says nothing of the choice, such as the usage alone, does not begin it.
            if any(chunk["choices"] for chunk in chunks):
                self._begun.add(delta.index)
            return b"".join(map(event, chunks))
        return self._framed(delta.index, delta.text, delta.num_tokens)

    def write_text(self, piece: TextPiece) -> bytes:
        """Return the event for a delta that is this text only."""
        index, text, num_tokens = piece
        frame = self._frames.get((index, num_tokens))
        if frame is None:
            return self.write(Delta(index, text, num_tokens))
        return frame[0] + _ENCODE_TEXT(text).encode() + frame[1]

    def _framed(self, index: int, text: str, num_tokens: int) -> bytes:
        frame = self._frames.get((index, num_tokens))
        if frame is None:
            (chunk,) = self._writer.chunks(Delta(index, _HOLE, num_tokens))
            before, after = event(chunk).split(_ENCODE(_HOLE).encode())
            frame = self._frames[index, num_tokens] = before, after
        return frame[0] + _ENCODE_TEXT(text).encode() + frame[1]


def _is_plain(delta: Delta) -> bool:
    """Tell whether a delta is tokens and their text, and nothing else."""
    return bool(
        delta.num_tokens
        and delta.finish_reason is None
        and delta.usage is None
        and not delta.logprobs
        and not delta.trace
        and not delta.reasoning
        and not delta.tool_calls
    )
