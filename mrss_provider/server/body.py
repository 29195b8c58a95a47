"""Request bodies: bounded before they are read, strict JSON."""

from __future__ import annotations

import asyncio
import json
from typing import NoReturn

from starlette.requests import Request

from mrss_provider.config import ServerConfig
from mrss_provider.errors import InvalidRequestError, PayloadTooLargeError, RequestTimeoutError


async def read_request(request: Request, config: ServerConfig) -> object:
    """Read the body as JSON, within the server's limits.

    Raises:
        RequestTimeoutError: it does not come within `stall_s`.
        MRSSError: as `read_json`.
    """
    try:
        async with asyncio.timeout(config.stall_s):
            return await read_json(request, config.max_body_bytes)
    except TimeoutError as exc:
        raise RequestTimeoutError(f"the body was not complete within {config.stall_s:g} s") from exc


async def read_json(request: Request, max_bytes: int) -> object:
    """Read the body as JSON.

    Raises:
        InvalidRequestError: not JSON by its content type or by its text.
        PayloadTooLargeError: more than `max_bytes`; the rest is not read.
        ClientDisconnect: the client left first.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise InvalidRequestError(
            f"content-type must be application/json, got {media_type or 'none'!r}",
            param="content-type",
        )
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return parse_json(bytes(body))


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
