"""SdkConnection: names as LiteLLM's SDK reaches them from this process. Knows LiteLLM."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from mrss_provider.compare.calls import Call, CallError, Piece
from mrss_provider.compare.http import read_chunk

_ID_HEADERS = ("x-litellm-model-id", "llm_provider-x-litellm-model-id")
_MAX_ERROR_CHARS = 500
_NO_PROVIDER = "LLM Provider NOT provided"


class SdkConnection:
    """A `Connection` through `litellm.acompletion` and `litellm.atext_completion`.

    Whoever makes one has registered the providers that it shall know.
    """

    async def stream(self, call: Call) -> AsyncIterator[Piece]:
        """Yield the answer.

        Raises:
            CallError: whatever LiteLLM raised.
        """
        import litellm

        asked = {
            **call.params,
            "model": call.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "timeout": call.timeout_s,
            # A second try would be measured as the first one's delay.
            "max_retries": 0,
            **({} if call.seed is None else {"seed": call.seed}),
        }
        try:
            if call.messages is None:
                answer = await litellm.atext_completion(prompt=call.prompt, **asked)
            else:
                answer = await litellm.acompletion(messages=call.messages, **asked)
            yield _from_hidden(getattr(answer, "_hidden_params", None))
            async for chunk in answer:
                yield _priced(call.model, read_chunk(chunk.model_dump()))
        except Exception as exc:
            raise _error(exc, call.model) from exc

    async def aclose(self) -> None:
        """Close the HTTP clients that LiteLLM keeps for this event loop."""
        import litellm

        await litellm.close_litellm_async_clients()


def _priced(model: str, piece: Piece) -> Piece:
    """Add the cost to a piece that tells the usage, where LiteLLM knows the prices."""
    if piece.completion_tokens is None or piece.cost is not None:
        return piece
    from dataclasses import replace

    import litellm

    try:
        prompt, completion = litellm.cost_per_token(
            model=model,
            prompt_tokens=piece.prompt_tokens or 0,
            completion_tokens=piece.completion_tokens,
        )
    except Exception:
        # It has no prices for this model; it says so by one exception or another.
        return piece
    return replace(piece, cost=prompt + completion)


def _from_hidden(hidden: object) -> Piece:
    fields = hidden if isinstance(hidden, Mapping) else {}
    headers: Any = fields.get("additional_headers") or {}
    model_id = fields.get("model_id") or next(
        (headers[name] for name in _ID_HEADERS if name in headers), None
    )
    return Piece(model_id=model_id, call_id=fields.get("litellm_call_id"))


def _error(exc: Exception, model: str) -> CallError:
    status = getattr(exc, "status_code", None)
    message = str(getattr(exc, "message", None) or exc)
    if _NO_PROVIDER in message:
        message = (
            f"{model!r} names no provider that LiteLLM knows; write mrss/{model} for a mixture of "
            "ours, or give --base-url to ask a server by its own names"
        )
    return CallError(
        type(exc).__name__,
        message[:_MAX_ERROR_CHARS],
        status if isinstance(status, int) else None,
    )
