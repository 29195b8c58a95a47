"""Client: a `Backend` over our own server, by TCP or Unix socket. Loads neither torch nor a server.

It belongs to no event loop: a stream does, to the one that opened it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from mrss_provider.backend import (
    Embeddings,
    EmbedRequest,
    GenerateRequest,
    ModelCard,
    Tokens,
)
from mrss_provider.client_stream import ClientStream, translate
from mrss_provider.errors import (
    ConfigError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    MRSSError,
    NotFoundError,
    QueueFullError,
    RequestTimeoutError,
    error_from_dict,
)
from mrss_provider.http1 import Connection, LeanTransport
from mrss_provider.openai_schema import (
    StreamOptions,
    detokenize_body,
    embed_request_to_body,
    info_from_headers,
    read_detokenized,
    read_embeddings,
    read_model_list,
    read_tokens,
    request_to_body,
)

EngineStatus = Literal["absent", "busy", "ready"]

DEFAULT_TIMEOUT_S = 600.0
# The server keeps the deadline and says so; this much later we stop believing in the server.
_GRACE_S = 2.0
# For answers that take no computing.
_SHORT_ANSWER_S = 30.0
_MAX_BODY_BYTES = 16 << 20
# 2,048 vectors of 4,096 numbers as base64 take 45 MB.
_MAX_VECTOR_BYTES = 64 << 20
_STREAM = StreamOptions(stream=True, include_usage=True, include_num_tokens=True)
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True)
class EngineVersion:
    """What `GET /version` tells.

    Attributes:
        protocol: the number that client and server must share.
        version: of the package.
        pid: of the process.
        model: name of its file or folder.
        playground: where a browser on that machine finds the page; None where it has no port.
    """

    protocol: int
    version: str
    pid: int
    model: str
    playground: str | None = None


class Client:
    """A `Backend` over HTTP.

    Args:
        address: `http://host:port`, `https://...` or `unix:///path/to/socket`.
        api_key: sent as a bearer token; MRSS_API_KEY, if that is set, when None.
        connect_timeout_s: for the connection.
        idle_timeout_s: longest silence in an answer; None leaves it to the request's timeout.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        connect_timeout_s: float = 5.0,
        idle_timeout_s: float | None = None,
    ) -> None:
        self.address = address
        self._base_url, socket = parse_address(address)
        self._headers = {
            "connection": "close",
            "content-type": "application/json",
            "user-agent": "mrss-provider",
        }
        api_key = api_key or os.environ.get("MRSS_API_KEY")
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._connect_timeout_s = connect_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._streams: set[ClientStream] = set()
        self._is_closed = False
        # Straight to the transport: httpx's client would log each request and follow the
        # environment's proxies, and keeps nothing that we need.
        self._transport = LeanTransport(socket)

    async def open(self, request: GenerateRequest) -> ClientStream:
        """Admit a request.

        Raises:
            EngineUnavailableError: nobody answers at the address.
            MRSSError: whatever the server refused the request with.
        """
        path = "/v1/completions" if request.messages is None else "/v1/chat/completions"
        body = _encode(request_to_body(request, _STREAM))
        loop = asyncio.get_running_loop()
        timeout_s = (request.timeout_s or DEFAULT_TIMEOUT_S) + _GRACE_S
        deadline = loop.time() + timeout_s
        response = await self._send("POST", path, timeout_s, body)
        connection: Connection = response.extensions["connection"]
        try:
            info = info_from_headers(response.headers)
        except EngineUnavailableError as exc:
            await connection.aclose()
            raise EngineUnavailableError(f"{self.address}: {exc.message}") from exc
        connection.watch(self._idle_timeout_s)
        left_s = max(0.0, deadline - loop.time())
        stream = ClientStream(info, connection, left_s, self._streams.discard)
        self._streams.add(stream)
        return stream

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Return a vector of each input.

        Raises:
            EngineUnavailableError: nobody answers at the address.
            MRSSError: whatever the server refused the request with.
        """
        body = embed_request_to_body(request, "base64")
        timeout_s = (request.timeout_s or DEFAULT_TIMEOUT_S) + _GRACE_S
        return read_embeddings(
            await self._post_json("/v1/embeddings", body, timeout_s, _MAX_VECTOR_BYTES)
        )

    async def tokenize(self, request: GenerateRequest) -> Tokens:
        """Return the tokens that an answer's prompt would have; raises as `embed`."""
        body = request_to_body(request)
        return read_tokens(await self._post_json("/v1/tokenize", body, _SHORT_ANSWER_S))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; raises as `embed`."""
        body = detokenize_body(token_ids)
        return read_detokenized(await self._post_json("/v1/detokenize", body, _SHORT_ANSWER_S))

    async def models(self) -> list[ModelCard]:
        """Return the names that are served, `base` first.

        Raises:
            EngineUnavailableError: nobody answers at the address.
        """
        return read_model_list(await self._get_json("/v1/models"))

    async def version(self) -> EngineVersion:
        """Return who answers.

        Raises:
            EngineUnavailableError: nobody answers, or not one of our engines.
        """
        raw = await self._get_json("/version")
        try:
            return EngineVersion(
                raw["protocol"], raw["version"], raw["pid"], raw["model"], raw.get("playground")
            )
        except KeyError as exc:
            raise EngineUnavailableError(
                f"{self.address} is not an mrss engine (its /version has no {exc})"
            ) from exc

    async def probe(self) -> EngineStatus:
        """Tell whether an engine is there and ready; "busy" is starting or shutting down.

        Raises:
            MRSSError: what the engine failed to start with, or this client was closed.
        """
        self._check_open()
        try:
            await self._get_json("/ready")
        except EngineUnavailableError as exc:
            is_absent = isinstance(exc.__cause__, httpx.HTTPError)
            return "absent" if is_absent else "busy"
        return "ready"

    async def lease(self) -> Connection:
        """Hold a lease, until the returned connection is closed or this process ends.

        An engine that was started for its clients stays while somebody holds one. The
        connection's `read` returns b"" or raises once the engine is gone.

        Raises:
            EngineUnavailableError: nobody answers at the address.
        """
        response = await self._send("GET", "/v1/lease", _SHORT_ANSWER_S, b"")
        connection: Connection = response.extensions["connection"]
        connection.watch(None)
        return connection

    async def aclose(self) -> None:
        """End every open stream with `EngineUnavailableError`; idempotent."""
        self._is_closed = True
        for stream in list(self._streams):
            stream.fail(EngineUnavailableError("the client was closed"))

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineUnavailableError("the client is closed; make another one")

    async def _get_json(self, path: str) -> dict[str, Any]:
        response = await self._send("GET", path, _SHORT_ANSWER_S, b"")
        body = await self._read_json(response)
        if not isinstance(body, dict):
            raise EngineUnavailableError(
                f"{self.address} is not an mrss engine ({path} is no JSON)"
            )
        return body

    async def _post_json(
        self, path: str, body: dict[str, Any], timeout_s: float, max_bytes: int = _MAX_BODY_BYTES
    ) -> object:
        response = await self._send("POST", path, timeout_s, _encode(body))
        return await self._read_json(response, max_bytes)

    async def _send(self, method: str, path: str, timeout_s: float, body: bytes) -> httpx.Response:
        """Send a request and return the answer, its body unread, if its status is 200."""
        self._check_open()
        connect_s = min(timeout_s, self._connect_timeout_s)
        request = httpx.Request(
            method,
            self._base_url + path,
            headers=self._headers,
            content=body,
            extensions={"timeout": {"connect": connect_s, "read": timeout_s}},
        )
        try:
            response = await self._transport.handle_async_request(request)
        except httpx.HTTPError as exc:
            raise self._translate(exc) from exc
        if response.status_code == 200:
            return response
        answer = await self._read_json(response)
        raise _with_retry_after(refusal(response, answer, self.address, path), response)

    async def _read_json(
        self, response: httpx.Response, max_bytes: int = _MAX_BODY_BYTES
    ) -> object:
        connection: Connection = response.extensions["connection"]
        body = bytearray()
        try:
            while data := await connection.read():
                body += data
                if len(body) > max_bytes:
                    raise EngineError(f"the answer is longer than {max_bytes} bytes")
        except httpx.HTTPError as exc:
            raise self._translate(exc) from exc
        finally:
            await connection.aclose()
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            # An answer of something else (a proxy's error page): the status alone must do.
            return None

    def _translate(self, exc: httpx.HTTPError) -> MRSSError:
        return translate(exc, self.address)


def _encode(body: Mapping[str, Any]) -> bytes:
    try:
        return _ENCODE(body).encode()
    except UnicodeEncodeError as exc:
        raise InvalidRequestError(
            f"the text must be whole Unicode characters, got half of a surrogate pair "
            f"({exc.object[exc.start]!r})"
        ) from exc
    except (TypeError, ValueError) as exc:
        key = next(key for key, value in body.items() if not _has_json(value))
        raise InvalidRequestError(
            f"{key} cannot be sent: it holds what JSON has no form for ({exc})", param=key
        ) from exc


def _has_json(value: object) -> bool:
    try:
        _ENCODE(value)
    except (TypeError, ValueError):
        return False
    return True


def parse_address(address: str) -> tuple[str, Path | None]:
    """Return the base URL, and the path of the Unix socket if it is one.

    Raises:
        ConfigError: neither form.
    """
    if address.startswith("unix://"):
        path = address.removeprefix("unix://")
        if path.startswith("/"):
            return "http://engine", Path(path)
    elif address.startswith(("http://", "https://")):
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL as exc:
            raise _bad_address(address) from exc
        if url.userinfo:
            raise ConfigError(
                "an engine's address has no user and password before its host, which would not be "
                "sent; a key goes into `api_key`, or MRSS_API_KEY",
                param="api_base",
            )
        is_whole = url.host and (url.port or 0) < 1 << 16 and not re.search(r"\s", address)
        if is_whole and not url.query and not url.fragment:
            # Users of the OpenAI client are used to write the /v1.
            return address.rstrip("/").removesuffix("/v1"), None
    raise _bad_address(address)


def _bad_address(address: str) -> ConfigError:
    return ConfigError(
        f"an engine's address is http://host:port or unix:///path/to/socket, got {address!r}",
        param="api_base",
    )


def refusal(response: httpx.Response, answer: object, address: str, path: str) -> MRSSError:
    """Return what an answer that is no success means, of an engine or of what stands before it.

    Args:
        response: its status and headers.
        answer: its body as JSON; None where it is none.
        address: who was asked.
        path: for what.
    """
    if response.status_code == 404 and not _is_not_found(answer):
        return EngineUnavailableError(f"{address} is not an mrss engine (no {path} there)")
    if not isinstance(answer, dict) or not isinstance(answer.get("error"), dict):
        return _error_of_another(response, address)
    return error_from_dict(response.status_code, answer)


def _is_not_found(answer: object) -> bool:
    """Tell whether a 404 is an engine's: somebody else's says nothing of what was asked for."""
    error = answer.get("error") if isinstance(answer, dict) else None
    return isinstance(error, dict) and error.get("code") == NotFoundError.code


def _error_of_another(response: httpx.Response, address: str) -> MRSSError:
    """Return what an answer without words of ours means: something before the engine gave it."""
    status = response.status_code
    if 300 <= status < 400:
        location = response.headers.get("location", "nowhere")
        return EngineUnavailableError(
            f"{address} is not where the engine is: it redirects to {location:.200}; name that"
        )
    if status == 504:
        return RequestTimeoutError(
            f"what stands before the engine at {address} waited no longer for it (status 504); "
            "let it wait longer, or ask for fewer tokens"
        )
    if status > 500:
        return EngineUnavailableError(
            f"no engine answers behind {address}: what stands before it said status {status}"
        )
    told = f"what stands before the engine at {address} answered with status {status}"
    return error_from_dict(status, {"error": {"message": told}})


def _with_retry_after(error: MRSSError, response: httpx.Response) -> MRSSError:
    if isinstance(error, QueueFullError):
        try:
            error.retry_after_s = float(response.headers.get("retry-after", ""))
        except ValueError:
            # A proxy's date form, or none: the default hint stays.
            return error
    return error
