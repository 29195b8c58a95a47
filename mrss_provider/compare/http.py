"""HttpConnection: any OpenAI server, a LiteLLM proxy or `mrss serve`, over httpx."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from mrss_provider.compare.calls import Call, CallError, Piece, check_kinds
from mrss_provider.errors import ConfigError

_MAX_ERROR_CHARS = 500


class HttpConnection:
    """A `Connection` to one base URL.

    Args:
        base_url: such as http://127.0.0.1:4000; a /v1 is added where the URL has no path.
        api_key: sent as a bearer token, if there is one.
        transport: for tests.

    Raises:
        ConfigError: no URL.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._base_url = parse_base_url(base_url)
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(
            headers=headers,
            transport=transport,
            # A pool that is smaller than the concurrency would be measured as the model's delay; a
            # connection that is kept as long as servers keep it (5 s) may close as it is used.
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=256, keepalive_expiry=1.0
            ),
        )

    async def stream(self, call: Call) -> AsyncIterator[Piece]:
        """Yield the answer.

        Raises:
            CallError: nobody answers, or with an error.
        """
        path, body = _request(call)
        try:
            async with self._client.stream(
                "POST", f"{self._base_url}{path}", json=body, timeout=call.timeout_s
            ) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                yield _from_headers(response.headers)
                num_events = 0
                async for line in response.aiter_lines():
                    if line.startswith("data:") and (event := line[5:].strip()) != "[DONE]":
                        num_events += 1
                        yield read_event(event)
                if not num_events:
                    raise CallError("NoEvents", "the server answered with no stream of events")
        except httpx.ConnectError as exc:
            where = httpx.URL(self._base_url)
            address = f"{where.scheme}://{where.netloc.decode()}"
            raise CallError("ConnectError", f"nobody answers at {address} ({exc})") from exc
        except httpx.HTTPError as exc:
            raise CallError(type(exc).__name__, str(exc) or "the connection broke off") from exc

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def parse_base_url(text: str) -> str:
    """Return the URL below which the routes are.

    Raises:
        ConfigError: not http or https, or no host.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ConfigError(f"--base-url must be http://host:port, got {text!r}", param="base_url")
    return text.rstrip("/") + ("/v1" if url.path in ("", "/") else "")


def read_event(event: str) -> Piece:
    """Read one event of a stream.

    Raises:
        CallError: it tells of an error, or is no JSON.
    """
    try:
        chunk = json.loads(event)
    except (ValueError, RecursionError) as exc:
        raise CallError("BadEvent", f"the server sent an event that is no JSON: {exc}") from exc
    if not isinstance(chunk, dict) or chunk.get("error"):
        raise _error(chunk, None)
    try:
        return read_chunk(chunk)
    except (AttributeError, TypeError) as exc:
        raise CallError("BadEvent", f"the server sent an event that is no chunk: {exc}") from exc


def read_chunk(chunk: Mapping[str, Any]) -> Piece:
    """Return what an OpenAI chunk, of a chat or of a text, tells.

    Raises:
        AttributeError, TypeError: it is none.
    """
    choices = chunk.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    delta = choice.get("delta") or {}
    usage = chunk.get("usage") or {}
    told: dict[str, Any] = {
        "text": delta.get("content") or choice.get("text") or "",
        "reasoning": delta.get("reasoning_content") or "",
        "finish_reason": choice.get("finish_reason"),
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "cost": usage.get("cost"),
        "id": chunk.get("id"),
        "fingerprint": chunk.get("system_fingerprint"),
    }
    check_kinds(told)
    return Piece(**told)


def _request(call: Call) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {"model": call.model, **call.params}
    if call.seed is not None:
        body["seed"] = call.seed
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if call.messages is None:
        return "/completions", body | {"prompt": call.prompt}
    return "/chat/completions", body | {"messages": call.messages}


def _from_headers(headers: httpx.Headers) -> Piece:
    return Piece(
        model_id=headers.get("x-litellm-model-id"), call_id=headers.get("x-litellm-call-id")
    )


def _refusal(status: int, body: bytes) -> CallError:
    try:
        return _error(json.loads(body), status)
    except (ValueError, RecursionError):
        text = body.decode("utf-8", "replace")[:_MAX_ERROR_CHARS]
        return CallError(f"HTTP {status}", text or "an empty answer", status)


def _error(body: object, status: int | None) -> CallError:
    """Return the error that OpenAI's form of one tells."""
    error = body.get("error") if isinstance(body, dict) else None
    fields = error if isinstance(error, dict) else {"message": str(error or body)}
    kind = fields.get("type") or fields.get("code") or "error"
    name = f"HTTP {status}" if status else str(kind)
    return CallError(name, str(fields.get("message"))[:_MAX_ERROR_CHARS], status)
