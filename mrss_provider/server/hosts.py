"""HostGuard: a web page that rebinds its name to this machine does not get to a local server."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from mrss_provider.config import ServerConfig
from mrss_provider.errors import PermissionDeniedError
from mrss_provider.server.generation import error_response

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})


class HostGuard:
    """Refuses requests whose Host header is no name of a server that listens on loopback only.

    A Unix socket cannot be reached by a browser, and the names of an address that others reach
    are not known here: neither is checked.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._checks = config.socket is None and config.host in _LOOPBACK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403 (ASGI)."""
        if self._checks and scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            name = host.rpartition(":")[0] if _has_port(host) else host
            if name not in _LOOPBACK:
                error = PermissionDeniedError(
                    f"this server answers to localhost only, got the host {name!r}; start it "
                    "with --host to be reached by other names"
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _has_port(host: str) -> bool:
    return ":" in host and not host.endswith("]") and host.rpartition(":")[2].isdigit()
