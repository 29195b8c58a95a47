"""Server-sent events: how chunk objects become bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # nginx would hold an answer back until it is whole.
    "x-accel-buffering": "no",
}

DONE = b"data: [DONE]\n\n"

_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def event(data: Mapping[str, Any]) -> bytes:
    """Return `data` as one event. JSON escapes newlines, so one line is enough."""
    return b"data: " + _ENCODE(data).encode() + b"\n\n"
