"""LocalEngine: a `Backend` that starts one engine for this user, host and configuration.

A file lock lets one process start it, however many ask; each of them holds a lease, a connection
that the kernel closes when the process ends, and the engine leaves some time after the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from mrss_provider.backend import Embeddings, EmbedRequest, GenerateRequest, ModelCard
from mrss_provider.client import DEFAULT_TIMEOUT_S, Client, EngineStatus
from mrss_provider.client_stream import ClientStream
from mrss_provider.config import EngineConfig
from mrss_provider.errors import (
    ConfigError,
    EngineUnavailableError,
    MRSSError,
    RequestTimeoutError,
)
from mrss_provider.http1 import Connection
from mrss_provider.openai_schema import PROTOCOL, check_protocol

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_Timed = TypeVar("_Timed", GenerateRequest, EmbedRequest)

IDLE_EXIT_S = 60.0
ENGINE_COMMAND = (sys.executable, "-m", "mrss_provider.server")

# The shortest limit among the systems we run on is 104 bytes, its end included.
_MAX_SOCKET_BYTES = 103
_POLL_S = 0.05
# Only we reach its socket: it needs no keys, and would refuse our other programs without them.
_NOT_FOR_ENGINE = {"MRSS_SOCKET", "MRSS_API_KEY", "MRSS_ADMIN_KEY", "MRSS_KEYS_FILE"}


def engine_address(api_base: str | None = None, env: Mapping[str, str] | None = None) -> str | None:
    """Return the address that was given: `api_base`, else `MRSS_SOCKET`; None is auto-start."""
    if api_base:
        return api_base
    socket = (os.environ if env is None else env).get("MRSS_SOCKET")
    if not socket:
        return None
    return socket if "://" in socket else f"unix://{Path(socket).absolute()}"


def socket_path(env: Mapping[str, str] | None = None) -> Path:
    """Return the socket of the engine that `env` describes; another configuration, another path.

    Raises:
        ConfigError: a malformed `MRSS_*` variable, or no folder that is ours alone.
    """
    env = os.environ if env is None else env
    config = EngineConfig.from_env(env=env)
    digest = hashlib.sha256(f"{PROTOCOL} {_absolute(config)}".encode()).hexdigest()
    name = f"engine-{digest[:12]}.sock"
    reason = ""
    for parent, folder in _runtime_folders(env):
        path = parent / folder / name
        if not path.is_absolute():
            reason = f"{parent} is not absolute"
        elif len(os.fsencode(path)) > _MAX_SOCKET_BYTES:
            reason = f"{path} has more than {_MAX_SOCKET_BYTES} bytes"
        else:
            try:
                _make_private(path.parent)
            except OSError as exc:
                reason = f"{path.parent}: {exc.strerror or exc}"
            else:
                return path
    raise ConfigError(
        f"no folder can hold the engine's socket ({reason}); set MRSS_SOCKET to a path of at most "
        f"{_MAX_SOCKET_BYTES} bytes and start `mrss serve` with it"
    )


def _absolute(config: EngineConfig) -> EngineConfig:
    """Return `config` with every path from the root, as other working folders would write it."""
    paths: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path):
            paths[field.name] = value.absolute()
    return replace(config, **paths)


class LocalEngine:
    """A `Backend`: the engine of this user on this host, started when it is not there.

    Belongs to the event loop that first uses it.

    Args:
        env: describes the engine (`MRSS_*`) and is its environment; the process's when None.
        command: starts it; `--socket PATH` and `--idle-exit-s SECONDS` are added.
        idle_exit_s: how long it stays without clients; `MRSS_IDLE_EXIT_S` of `env` wins.
    """

    def __init__(
        self,
        env: Mapping[str, str] | None = None,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        idle_exit_s: float = IDLE_EXIT_S,
    ) -> None:
        self._env = dict(os.environ if env is None else env)
        self._command = list(command)
        self._idle_exit_s = self._env.get("MRSS_IDLE_EXIT_S") or f"{idle_exit_s:g}"
        self.socket = socket_path(self._env)
        self.log_path = self.socket.with_suffix(".log")
        self._client = Client(f"unix://{self.socket}")
        self._lease: Connection | None = None
        self._starting = asyncio.Lock()
        self._is_closed = False

    @property
    def address(self) -> str:
        """The engine's address, whether it runs or not."""
        return self._client.address

    async def open(self, request: GenerateRequest) -> ClientStream:
        """Admit a request, starting the engine first if need be.

        Raises:
            MRSSError: as `Backend.open`.
        """
        return await self._ask(self._client.open, request)

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Embed texts, starting the engine first if need be.

        Raises:
            MRSSError: as `Embeds.embed`.
        """
        return await self._ask(self._client.embed, request)

    async def _ask(self, ask: Callable[[_Timed], Awaitable[_T]], request: _Timed) -> _T:
        deadline = time.monotonic() + (request.timeout_s or DEFAULT_TIMEOUT_S)
        await self.ensure(request.timeout_s or DEFAULT_TIMEOUT_S)
        try:
            return await ask(_with_deadline(request, deadline))
        except EngineUnavailableError as exc:
            # It died or left since we last heard of it; nothing was admitted, so ask the next.
            logger.info("the engine is gone (%s), looking for another", exc)
            self._drop_lease()
        await self.ensure(deadline - time.monotonic())
        return await ask(_with_deadline(request, deadline))

    async def models(self) -> list[ModelCard]:
        """Return the names that are served, starting the engine first if need be.

        Raises:
            MRSSError: as `Backend.models`.
        """
        await self.ensure(DEFAULT_TIMEOUT_S)
        return await self._client.models()

    async def aclose(self) -> None:
        """Give the lease back; open streams end with `EngineUnavailableError`, as later calls."""
        self._is_closed = True
        self._drop_lease()
        await self._client.aclose()

    async def ensure(self, timeout_s: float) -> None:
        """Return once a ready engine is there and a lease on it is held.

        Raises:
            EngineUnavailableError: it cannot be started (tells its last words), or `aclose` was
                called.
            RequestTimeoutError: it was not ready in time.
        """
        self._check_open()
        if self._lease is not None and self._lease.is_open:
            return
        try:
            async with asyncio.timeout(timeout_s), self._starting:
                self._drop_lease()
                await self._find_or_start()
        except TimeoutError as exc:
            raise RequestTimeoutError(
                f"the engine was not ready within {timeout_s:.3g} s; its log is {self.log_path}"
            ) from exc

    async def _find_or_start(self) -> None:
        child: subprocess.Popen[bytes] | None = None
        has_lock = False
        with contextlib.ExitStack() as held:
            while True:
                status = await self._probe()
                if status == "ready" and await self._take_lease():
                    return
                has_exited = child is not None and child.poll() is not None
                if child is not None and has_exited:
                    if status == "absent":
                        raise self._died(child)
                    # Another engine was faster to the socket.
                    child = None
                elif child is None and status == "absent":
                    # A lock is its open file's: taken anew it would shut out ourselves.
                    has_lock = has_lock or self._take_lock(held)
                    # Whoever held the lock before may have started an engine in between.
                    if has_lock and await self._probe() == "absent":
                        child = self._start()
                await asyncio.sleep(_POLL_S)

    async def _probe(self) -> EngineStatus:
        try:
            status = await self._client.probe()
        except MRSSError as exc:
            self._check_open()
            raise EngineUnavailableError(f"the engine could not be started: {exc}") from exc
        self._check_open()
        return status

    async def _take_lease(self) -> bool:
        try:
            version = await self._client.version()
            self._lease = await self._client.lease()
        except EngineUnavailableError:
            # It left just now.
            return False
        try:
            # `aclose` may have come while we asked.
            self._check_open()
            check_protocol(version.protocol)
        except EngineUnavailableError:
            self._drop_lease()
            raise
        return True

    def _take_lock(self, held: contextlib.ExitStack) -> bool:
        """Take the file lock if it is free; the kernel frees it if this process dies."""
        path = self.socket.with_suffix(".lock")
        lock = open(path, "wb")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        held.enter_context(lock)
        return True

    def _start(self) -> subprocess.Popen[bytes]:
        env = {name: value for name, value in self._env.items() if name not in _NOT_FOR_ENGINE}
        flags = ["--socket", str(self.socket), "--idle-exit-s", self._idle_exit_s]
        with open(self.log_path, "wb") as log:
            child = subprocess.Popen(
                [*self._command, *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                # Ctrl-C is for the program in the foreground; the engine may serve others.
                start_new_session=True,
            )
        logger.info("started an engine, process %d, log %s", child.pid, self.log_path)
        # Reaps it whenever it ends.
        threading.Thread(target=child.wait, name="mrss-engine-wait", daemon=True).start()
        return child

    def _died(self, child: subprocess.Popen[bytes]) -> EngineUnavailableError:
        lines = self.log_path.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else f"status {child.returncode}, no words"
        return EngineUnavailableError(
            f"the engine could not be started: {last} (its log is {self.log_path})"
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineUnavailableError("this LocalEngine was closed; make another one")

    def _drop_lease(self) -> None:
        if self._lease is not None:
            self._lease.close()
            self._lease = None


def _with_deadline(request: _Timed, deadline: float) -> _Timed:
    if request.timeout_s is None:
        return request
    # What the start took is gone; a moment must be left for a sentence from the engine.
    return replace(request, timeout_s=max(deadline - time.monotonic(), 0.001))


def _runtime_folders(env: Mapping[str, str]) -> list[tuple[Path, str]]:
    folders = [
        (Path(tempfile.gettempdir()), f"mrss-{os.getuid()}"),
        (Path("/tmp"), f"mrss-{os.getuid()}"),
    ]
    runtime = env.get("XDG_RUNTIME_DIR")
    return [(Path(runtime), "mrss"), *folders] if runtime else folders


def _make_private(folder: Path) -> None:
    """Make `folder` with mode 0700; refuse one that somebody else could put files into.

    Raises:
        ConfigError: as said.
        OSError: it cannot be made or looked at.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    is_ours = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode)
    if not is_ours or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"{folder} must be a folder of yours with mode 0700; remove it or set XDG_RUNTIME_DIR"
        )
