"""ServerCalls: what a command asks of a running server, one request after the other."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx

from mrss_provider.autostart import engine_address
from mrss_provider.client import parse_address, refusal
from mrss_provider.config import ServerConfig
from mrss_provider.errors import EngineUnavailableError

_TIMEOUT_S = 600.0
_OCTETS = {"content-type": "application/octet-stream"}


class ServerCalls:
    """Requests to one server.

    Args:
        server: `http://host:port` or `unix:///path`; MRSS_SOCKET when None, else where `mrss serve`
            listens.
        api_key: MRSS_API_KEY when None.
    """

    def __init__(self, server: str | None, api_key: str | None = None) -> None:
        config = ServerConfig()
        self.address = engine_address(server) or f"http://{config.host}:{config.port}"
        base_url, self._path = parse_address(self.address)
        key = api_key or os.environ.get("MRSS_API_KEY")
        self._http = httpx.Client(
            base_url=base_url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            transport=httpx.HTTPTransport(uds=None if self._path is None else str(self._path)),
            timeout=_TIMEOUT_S,
        )

    @classmethod
    @contextmanager
    def to(cls, server: str | None, api_key: str | None = None) -> Iterator[Self]:
        """Yield the calls, and close the connection."""
        calls = cls(server, api_key)
        with calls._http:
            yield calls

    def json(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Send `body` as JSON and return what comes back.

        Raises:
            EngineUnavailableError: nobody answers, or something that is no engine of ours.
            MRSSError: what the server refused it with.
        """
        response = self._send(method, path, {} if body is None else {"json": body})
        return self._object(response)

    def upload(self, path: str, data: bytes) -> dict[str, Any]:
        """Send bytes and return what comes back.

        Raises:
            MRSSError: as `json`.
        """
        return self._object(self._send("POST", path, {"content": data, "headers": _OCTETS}))

    def download(self, path: str) -> bytes:
        """Return the bytes at `path`.

        Raises:
            MRSSError: as `json`.
        """
        response = self._send("GET", path, {})
        if response.headers.get("content-type") != _OCTETS["content-type"]:
            raise self._no_engine(path)
        return response.content

    def _send(self, method: str, path: str, content: dict[str, Any]) -> httpx.Response:
        try:
            if self._path is not None:
                _knock(self._path)
            response = self._http.request(method, path, **content)
        except (httpx.HTTPError, OSError) as exc:
            raise EngineUnavailableError(
                f"nobody answers at {self.address} ({exc}); start one with `mrss serve`, or name "
                "it with --server"
            ) from exc
        if response.is_success:
            return response
        raise refusal(response, _body(response), self.address, path)

    def _object(self, response: httpx.Response) -> dict[str, Any]:
        body = _body(response)
        if not isinstance(body, dict):
            raise self._no_engine(response.url.path)
        return body

    def _no_engine(self, path: str) -> EngineUnavailableError:
        return EngineUnavailableError(f"{self.address} is not an mrss engine (no {path} there)")


def _knock(path: Path) -> None:
    """Connect and leave: httpx does not close a Unix socket that it could not connect.

    Raises:
        OSError: nobody listens.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
        knock.connect(str(path))


def _body(response: httpx.Response) -> object:
    try:
        return response.json()
    except ValueError:
        # Of something else, such as a proxy's error page: the status alone must do.
        return None
