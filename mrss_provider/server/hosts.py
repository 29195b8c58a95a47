"""HostGuard: web pages get nowhere near a local server, which asks for no key.

Neither one that rebinds its own name to this machine, nor one that sends a form to ours.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import replace

from starlette.types import ASGIApp, Receive, Scope, Send

from mrss_provider.config import ServerConfig
from mrss_provider.errors import PermissionDeniedError
from mrss_provider.server.refusals import error_response

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})
# What they answer is not shown to a page of another origin.
_HARMLESS = frozenset({"GET", "HEAD", "OPTIONS"})


def is_local(config: ServerConfig) -> bool:
    """Tell whether only this machine can reach a server: on loopback, or on a Unix socket."""
    if config.socket is not None or config.host in _LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        # A name, which may mean any address.
        return False


def address_of(config: ServerConfig) -> str:
    """Return the address as a client takes it."""
    if config.socket is not None:
        return f"unix://{config.socket}"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{config.port}"


def playground_url(config: ServerConfig) -> str | None:
    """Return where a browser on this machine finds the playground; None on a Unix socket alone."""
    if config.socket is not None:
        return f"http://127.0.0.1:{config.loopback_port}/" if config.loopback_port else None
    # What stands for all addresses is none that a browser takes.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"{address_of(replace(config, host=host))}/"


class HostGuard:
    """Guards a server that listens on loopback only: others need a key, which no page has (ASGI).

    Refused are requests whose Host header is no name of this machine, and changes that a page of
    another origin wants to make. A Unix socket cannot be reached by a browser.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        is_on_tcp = config.socket is None or config.loopback_port > 0
        self._checks = is_on_tcp and is_local(config)
        self._is_on_socket = config.socket is not None
        self._names = _LOOPBACK | {config.host.lower()}
        self._origins = frozenset(split_origins(config.cors_origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        if self._checks and scope["type"] == "http" and not self._came_by_socket(scope):
            why = self._why_not(scope["method"], dict(scope["headers"]))
            if why:
                await error_response(PermissionDeniedError(why))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _came_by_socket(self, scope: Scope) -> bool:
        # ASGI gives a Unix socket's path without a port. Who does not tell is guarded.
        _, port = scope.get("server") or ("", 0)
        return self._is_on_socket and port is None

    def _why_not(self, method: str, headers: Mapping[bytes, bytes]) -> str:
        """Return why a request is refused; "" if it is not."""
        name = _without_port(headers.get(b"host", b"").decode("latin-1").lower())
        if name not in self._names:
            return (
                f"this server answers to localhost only, got the host {name!r}; start it with "
                "--host to be reached by other names, or let a proxy before it send Host: localhost"
            )
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if not origin or method in _HARMLESS or self._origins & {origin, "*"}:
            return ""
        if _without_port(origin.partition("://")[2]) in self._names:
            return ""
        return f"pages of {origin!r} may not ask this server; --cors-origins lets them"


def split_origins(origins: str | None) -> list[str]:
    """Return the origins of a setting, which has commas between them."""
    return [origin.strip().lower() for origin in (origins or "").split(",") if origin.strip()]


def _without_port(host: str) -> str:
    has_port = ":" in host and not host.endswith("]") and host.rpartition(":")[2].isdigit()
    return host.rpartition(":")[0] if has_port else host
