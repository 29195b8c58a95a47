"""Who asks: API keys at the door, and what the routes may know of the caller.

A server that only this machine reaches (loopback, or a Unix socket of mode 0600) may do without
keys; then whoever asks may do everything. Any other must have some, or be told `--no-auth`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from mrss_provider.config import ServerConfig
from mrss_provider.errors import AuthenticationError, ConfigError, PermissionDeniedError
from mrss_provider.server.hosts import is_local
from mrss_provider.server.keys import Key, Limits, find, keys_of_environment, read_keys
from mrss_provider.server.playground import is_asset
from mrss_provider.server.refusals import error_response

logger = logging.getLogger(__name__)

# Who watches over a server asks these, without a key; they tell nothing else.
OPEN_PATHS = frozenset({"/health", "/ready", "/healthcheck"})
# How long a revoked key may still work.
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        id: of the key; "" without one.
        is_admin: whether it may change what is served.
        limits: of the key.
    """

    id: str = ""
    is_admin: bool = False
    limits: Limits = field(default_factory=Limits)


class KeyRing:
    """The keys that a server takes, read again when their file changes.

    Args:
        path: a file of keys, or None.
        fixed: keys that stay as they are.
        clock: monotonic seconds.

    Raises:
        ConfigError: the file cannot be read.
    """

    def __init__(
        self,
        path: Path | None = None,
        fixed: Sequence[Key] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._fixed = tuple(fixed)
        self._clock = clock
        self._looked = clock()
        self._seen = _identity(path)
        self._keys = self._fixed + (read_keys(path) if path is not None else ())
        if path is not None and not self._keys:
            logger.warning(
                "%s holds no key, so every request is refused; `mrss keys create` makes one", path
            )

    @classmethod
    def of(cls, config: ServerConfig, env: Mapping[str, str] | None = None) -> KeyRing:
        """Return the keys of a configuration and of the environment.

        Raises:
            ConfigError: they cannot be read, or a key of the environment could be guessed.
        """
        return cls(config.keys_file, keys_of_environment(os.environ if env is None else env))

    @property
    def is_on(self) -> bool:
        """Whether keys are asked for; a file without any lets nobody in."""
        return self._path is not None or bool(self._fixed)

    def caller(self, authorization: str) -> Caller:
        """Return who sends this header.

        Raises:
            AuthenticationError: no key, or none that is known.
        """
        self._look_again()
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            raise AuthenticationError(
                "this server wants an API key: send the header `Authorization: Bearer KEY`"
            )
        key = find(self._keys, text.strip())
        if key is None:
            raise AuthenticationError("the API key that was sent is not known here")
        return Caller(key.id, key.kind == "admin", key.limits)

    def reload(self) -> None:
        """Read the file; one that cannot be read changes nothing."""
        if self._path is None:
            return
        self._seen = _identity(self._path)
        try:
            self._keys = self._fixed + read_keys(self._path)
        except ConfigError as exc:
            logger.error("the API keys stay as they were: %s", exc)
        else:
            logger.info("read %d API keys from %s", len(self._keys), self._path)

    def _look_again(self) -> None:
        now = self._clock()
        if self._path is not None and now - self._looked >= _LOOK_AGAIN_S:
            self._looked = now
            if _identity(self._path) != self._seen:
                self.reload()


class Access:
    """Lets requests with a key in, and tells the routes who asks (ASGI).

    Args:
        app: what is behind the door.
        keys: that are taken.
        config: whether one may come without.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, config: ServerConfig) -> None:
        self._app = app
        self._keys = keys
        self._is_open = not keys.is_on or config.no_auth
        # Where only this machine can ask, and nobody said otherwise, who asks is the operator.
        self._anyone = Caller(is_admin=not keys.is_on and is_local(config))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http":
            try:
                caller = self._caller(scope)
            except AuthenticationError as exc:
                await error_response(exc)(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        if not self._keys.is_on or scope["path"] in OPEN_PATHS or is_asset(scope):
            return self._anyone
        header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        if self._is_open and not header:
            return self._anyone
        return self._keys.caller(header)


def caller_of(request: Request) -> Caller:
    """Return who asks."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


def require_admin(request: Request) -> Caller:
    """Return who asks, if they may change what is served.

    Raises:
        AuthenticationError: they sent no key.
        PermissionDeniedError: their key may not.
    """
    caller = caller_of(request)
    if caller.is_admin:
        return caller
    if caller.id:
        raise PermissionDeniedError(
            f"the key {caller.id!r} may generate, but not administer; use an admin key"
        )
    raise AuthenticationError(
        "this needs an admin key: send the header `Authorization: Bearer KEY`; "
        "MRSS_ADMIN_KEY or `mrss keys create --admin` makes one"
    )


def check_exposure(config: ServerConfig, keys: KeyRing) -> None:
    """Return if a server may be reached where it listens.

    Raises:
        ConfigError: by everybody, without a key, and nobody said that this is meant.
    """
    if is_local(config) or keys.is_on or config.no_auth:
        return
    raise ConfigError(
        f"{config.host} can be reached from other machines and no API keys are set: set "
        "MRSS_API_KEY, or --keys-file (`mrss keys create` makes one), or listen on 127.0.0.1 or "
        "--socket, or say --no-auth",
        param="host",
    )


def _identity(path: Path | None) -> tuple[int, int, int] | None:
    try:
        found = None if path is None else os.stat(path)
    except OSError:
        return None
    return None if found is None else (found.st_ino, found.st_mtime_ns, found.st_size)
