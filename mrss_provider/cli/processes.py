"""Child processes of a command: started quietly, shown once they matter, ended for certain."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from mrss_provider.cli.output import CommandError

_KEPT_LINES = 40
_PR_SET_PDEATHSIG = 1


class Child:
    """A process in its own session, so that a Ctrl-C reaches it only through us.

    What it prints is kept; after `show` it goes to stderr.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.name = name
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._is_shown = False
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )
        self._reader = threading.Thread(target=self._read, name=f"read-{name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def check_alive(self) -> None:
        """Do nothing while the process runs.

        Raises:
            CommandError: it has ended; what it printed last is shown on stderr.
        """
        if self._process.poll() is None:
            return
        self._reader.join(1.0)
        self.show()
        raise CommandError(f"{self.name} ended with status {self._process.returncode}, see above")

    def show(self) -> None:
        """Write what was printed last, and from now on everything, to stderr."""
        with self._lock:
            self._is_shown = True
            for line in self._lines:
                sys.stderr.write(line)
            self._lines.clear()
            sys.stderr.flush()

    def discard(self) -> None:
        """Forget what was printed so far and show what follows."""
        with self._lock:
            self._lines.clear()
            self._is_shown = True

    def stop(self, wait_s: float) -> None:
        """Ask the process to end, then end it and its children; return when it is gone.

        What it says meanwhile is not shown.
        """
        self._is_shown = False
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(wait_s)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._reader.join(1.0)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self._take(line)

    def _take(self, line: str) -> None:
        with self._lock:
            if self._is_shown:
                sys.stderr.write(line)
                sys.stderr.flush()
            else:
                self._lines.append(line)


def check_port_free(host: str, port: int) -> None:
    """Do nothing if `host:port` can be listened on.

    Raises:
        CommandError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise CommandError(
                f"port {port} on {host} cannot be used ({exc.strerror}); choose another one: "
                f"`make run PORT={port + 1}`, or `mrss proxy --port {port + 1}`"
            ) from exc


def free_port_from(port: int) -> int:
    """Return `port` if it is free on 127.0.0.1, else one that the system chooses."""
    for wanted in (port, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted))
            except (OSError, OverflowError):
                continue
            return int(probe.getsockname()[1])
    return 0


def _end_with_parent() -> Callable[[], None] | None:
    """Return what makes a child end when its parent is killed (Linux); None elsewhere."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def set_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return set_signal
