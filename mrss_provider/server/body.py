"""Request bodies: bounded before they are read, strict JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import NoReturn, TypeVar

from starlette.requests import Request

from mrss_provider.config import ServerConfig
from mrss_provider.errors import InvalidRequestError, PayloadTooLargeError, RequestTimeoutError

Parsed = TypeVar("Parsed")

# A longer body takes milliseconds, which other streams' events are not to wait for.
_MOST_INLINE_BYTES = 1 << 16


async def read_request(request: Request, config: ServerConfig) -> object:
    """Read the body as JSON, within the server's limits; as `read_and_parse`."""
    return await read_and_parse(request, config, lambda body: body)


async def read_and_parse(
    request: Request, config: ServerConfig, parse: Callable[[object], Parsed]
) -> Parsed:
    """Read the body as JSON, within the server's limits, and return what `parse` makes of it.

    Raises:
        RequestTimeoutError: it does not come within `stall_s`.
        MRSSError: as `read_body`, `parse_json` and `parse`.
    """
    try:
        async with asyncio.timeout(config.stall_s):
            body = await read_body(request, config.max_body_bytes)
    except TimeoutError as exc:
        raise RequestTimeoutError(f"the body was not complete within {config.stall_s:g} s") from exc
    if len(body) <= _MOST_INLINE_BYTES:
        return parse(parse_json(body))
    # In two goes: between them the loop and the engine have their turns.
    data = await asyncio.to_thread(parse_json, body)
    return await asyncio.to_thread(parse, data)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the body, which says that it is JSON.

    Raises:
        InvalidRequestError: not JSON by its content type, or compressed.
        PayloadTooLargeError: more than `max_bytes`; the rest is not read.
        ClientDisconnect: the client left first.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise InvalidRequestError(
            f"content-type must be application/json, got {media_type or 'none'!r}",
            param="content-type",
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise InvalidRequestError(
            f"content-encoding must be left out, got {encoding!r:.80}; send the body as it is",
            param="content-encoding",
        )
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def parse_json(body: bytes) -> object:
    """Parse strict JSON: no NaN or Infinity, no nesting beyond Python's stack.

    Raises:
        InvalidRequestError: as said.
    """
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except RecursionError as exc:
        raise InvalidRequestError("the body is nested too deeply") from exc
    except ValueError as exc:
        raise InvalidRequestError(f"the body is no JSON: {exc}") from exc


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"the body is no JSON: it holds {name}, which JSON does not have")


def _too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body may have {max_bytes} bytes; send less")
