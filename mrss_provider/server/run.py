"""run_server: one uvicorn in this process, until a signal or until nobody needs it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn

from mrss_provider.backend import Backend
from mrss_provider.config import KEEP_ALIVE_S, ServerConfig
from mrss_provider.errors import ConfigError
from mrss_provider.server import process
from mrss_provider.server.app import create_app
from mrss_provider.server.auth import KeyRing, check_exposure
from mrss_provider.server.hosts import address_of
from mrss_provider.server.lifecycle import Lifecycle
from mrss_provider.server.stalls import KnowsConnection

logger = logging.getLogger(__name__)

# After the drain nothing should be left; what is hangs.
_CLOSE_S = 5
_BACKLOG = 2048
# What the kernel keeps for a client that reads slowly; megabytes if it is left alone, and then long
# silences between two writes, during which nobody can tell such a client from one that is gone.
_SEND_BUFFER_BYTES = 256 << 10


def run_server(
    backend: Backend,
    config: ServerConfig,
    *,
    model: str = "",
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serve `backend`; return after SIGTERM, SIGINT, or when an idle engine leaves.

    Args:
        backend: where answers come from.
        config: limits and the address.
        model: what `/version` calls the loaded model.
        on_ready: called on the event loop whenever a model is ready.

    Raises:
        ConfigError: the address cannot be bound, or others could reach it without a key.
        MRSSError: the backend could not be started.
    """
    keys = KeyRing.of(config)
    check_exposure(config, keys)
    listeners = listen_on(config)
    process.share_interpreter()

    async def serve() -> None:
        if config.keys_file is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, keys.reload)
        logger.info("listening on %s", address_of(config))
        server = Server(backend, config, *listeners, model=model, keys=keys)
        server.lifecycle.on_ready.append(process.settle)
        if on_ready is not None:
            server.lifecycle.on_ready.append(on_ready)
        await server.run_to_end()

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve())
    finally:
        for listener in listeners:
            listener.close()


class Server(uvicorn.Server):
    """uvicorn, which drains on the first signal and ends the process at once on the second.

    Made on the event loop that it runs on.
    """

    def __init__(
        self,
        backend: Backend,
        config: ServerConfig,
        *listeners: Listener,
        model: str = "",
        keys: KeyRing | None = None,
    ) -> None:
        self.lifecycle = Lifecycle(config.idle_exit_s)
        self.lifecycle.on_end = self.end
        app = create_app(backend, config, lifecycle=self.lifecycle, model=model, keys=keys)
        super().__init__(
            uvicorn.Config(
                KnowsConnection(app),
                log_config=None,
                # Its INFO announces an address of its own invention.
                log_level="warning",
                access_log=False,
                server_header=False,
                date_header=False,
                lifespan="on",
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=_CLOSE_S,
            )
        )
        self._loop = asyncio.get_running_loop()
        self._backend = backend
        self._listeners = listeners
        self._drain_s = config.drain_s
        self._ending: asyncio.Task[None] | None = None
        self._was_told = False

    async def run_to_end(self) -> None:
        """Serve until `end`, a signal, or an idle engine's time has come.

        Raises:
            MRSSError: the backend could not be started, or was lost.
        """
        await self.serve(sockets=[listener.socket for listener in self._listeners])
        if self.lifecycle.failure is not None:
            raise self.lifecycle.failure

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM and SIGINT."""
        if self._was_told:
            # Here and not on the loop: whatever hangs, this does not wait for it.
            self._unlink()
            os._exit(128 + sig)
        self._was_told = True
        self._loop.call_soon_threadsafe(self._on_signal, sig)

    def end(self, drain_s: float = 0.0) -> None:
        """Stop taking requests, wait `drain_s` seconds for the running ones, leave."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(drain_s))

    def _on_signal(self, sig: int) -> None:
        logger.info("%s: leaving", signal.Signals(sig).name)
        self.end(self._drain_s)

    async def _end(self, drain_s: float) -> None:
        await self.lifecycle.drain(drain_s)
        # Ends the streams that are left, each with an error its client can tell from an end.
        await self._backend.aclose()
        self._unlink()
        self.lifecycle.stopping.set()
        self.should_exit = True

    def _unlink(self) -> None:
        for listener in self._listeners:
            listener.unlink()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's where it is installed, as LiteLLM's proxy does: a chunk costs less."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def listen_on(config: ServerConfig) -> list[Listener]:
    """Bind every address of a configuration.

    Raises:
        ConfigError: one cannot be had; then none is bound.
    """
    listeners = [Listener(config)]
    if config.loopback_port:
        beside = replace(
            config, socket=None, host="127.0.0.1", port=config.loopback_port, loopback_port=0
        )
        try:
            listeners.append(Listener(beside))
        except BaseException:
            listeners[0].close()
            raise
    return listeners


class Listener:
    """A bound, listening socket. A Unix one has mode 0600, and `unlink` removes its file.

    Raises:
        ConfigError: the address is taken or cannot be had.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._path = config.socket
        self._inode = 0
        try:
            if self._path is None:
                self.socket = _bind_tcp(config)
            else:
                with _locked(self._path):
                    self.socket = _bind_unix(self._path)
                    self._inode = os.stat(self._path).st_ino
        except OSError as exc:
            raise ConfigError(
                f"cannot listen on {address_of(config)} ({exc.strerror or exc}); stop what does, "
                "or choose another address"
            ) from exc

    def unlink(self) -> None:
        """Remove the file, unless another server's has taken its place; idempotent.

        Done while we still listen: the bound socket keeps its inode's number from being reused.
        """
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == self._inode:
                    self._path.unlink()
        # Last: a signal's handler may do all of this in between.
        self._path = None

    def close(self) -> None:
        """Unlink and close; idempotent."""
        self.unlink()
        self.socket.close()


def _bind_tcp(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # By the protocol's number asyncio knows the connections that must not wait for their peer's
    # acknowledgement, some 40 ms, with what is written in parts.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Every connection takes it over.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listener.bind((config.host, config.port))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time replace the socket at `path`.

    Between `bind` and `listen` a socket looks like a dead server's. The lock is a file beside
    it, which stays: removing it would let two processes lock two files of one name.
    """
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _bind_unix(path: Path) -> socket.socket:
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Nobody can connect before `listen`, so the mode is set in time.
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a dead server.

    Raises:
        ConfigError: the file is no socket.
        OSError: somebody listens on it.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ConfigError(f"{path} exists and is no socket; choose another path")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
        raise OSError(f"a server listens on {path}")
