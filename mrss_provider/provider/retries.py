"""text_stream_retries: a proxy's callback that asks again for completions that broke off unbegun.

LiteLLM's router retries what was not admitted, and falls back for streamed chats, messages and
responses that end before they begin. For streamed `/v1/completions` it does not: this does.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

NUM_RETRIES = 2
"""Each is a call of the router, which itself retries what is refused."""

_UNAVAILABLE = 503
# What the proxy puts into a request after it was answered, and no request has.
_ADDED = frozenset({"deployment"})


class TextStreamRetries(CustomLogger):  # type: ignore[misc]
    """What `litellm_settings.callbacks: mrss_provider.text_stream_retries` names."""

    def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: AsyncIterator[Any], request_data: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """Return what the proxy reads in the place of `response`; other streams are left alone."""
        call = request_data.get("litellm_logging_obj")
        if getattr(call, "call_type", None) != "atext_completion":
            return response
        return _first_that_begins(response, request_data)


async def _first_that_begins(
    response: AsyncIterator[Any], request_data: Mapping[str, Any]
) -> AsyncIterator[Any]:
    """Yield the chunks of `response`, or of the first after it that does not break off unbegun."""
    for num_left in range(NUM_RETRIES, -1, -1):
        has_begun = False
        try:
            async for chunk in response:
                has_begun = True
                yield chunk
            return
        except Exception as exc:
            is_gone = getattr(exc, "status_code", None) == _UNAVAILABLE
            if has_begun or not is_gone or num_left == 0:
                raise
        finally:
            await _close(response)
        response = await _ask_again(request_data)


async def _ask_again(request_data: Mapping[str, Any]) -> AsyncIterator[Any]:
    # Loaded where there is a proxy, and slow to load.
    from litellm.proxy import proxy_server

    request = {key: value for key, value in request_data.items() if key not in _ADDED}
    answer: AsyncIterator[Any] = await proxy_server.llm_router.atext_completion(**request)
    return answer


async def _close(response: AsyncIterator[Any]) -> None:
    """End an answer that nobody reads on; LiteLLM's wrapper of texts has its stream inside."""
    stream = getattr(response, "completion_stream", response)
    if hasattr(stream, "aclose"):
        with contextlib.suppress(Exception):
            await stream.aclose()


text_stream_retries = TextStreamRetries()
