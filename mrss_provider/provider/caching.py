"""Streams that LiteLLM's cache must not keep, since it would give back less than there was.

It keeps a stream as one whole chat and makes chunks of its text again: several answers come back
as one, log-probabilities, traces and thoughts not at all, and a text completion as a chat.
"""

from __future__ import annotations

from typing import Any

from mrss_provider.provider.calls import Call


def loses_by_caching(call: Call) -> bool:
    """Tell whether the cache would give back less of a stream; of a thought nobody knows yet."""
    request = call.requests[0]
    return call.is_text or request.n > 1 or request.sampling.logprobs or request.mixture.trace


def keep_out_of_cache(logging_obj: Any) -> None:
    """Ask LiteLLM's cache not to store this stream; it looks when the stream has ended."""
    # The private name is that of older LiteLLM versions.
    for name in ("llm_caching_handler", "_llm_caching_handler"):
        handler = getattr(logging_obj, name, None)
        if handler is None:
            continue
        control = handler.request_kwargs.get("cache") or {}
        handler.request_kwargs["cache"] = {**control, "no-store": True}
