"""Servers as processes of their own, which a test may kill."""

import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from ports import free_port

from mrss_provider.config import BUNDLED_STATES


class Process:
    """A server as a process, once it has written what it writes when it is ready."""

    def __init__(self, command, ready, env=None):
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        lines = []
        for line in self._process.stdout:
            lines.append(line)
            if ready in line:
                break
        else:
            self.end()
            pytest.fail("it did not start:\n" + "".join(lines[-40:]))
        # Nobody reads on, and a full pipe would hold it.
        self._reader = threading.Thread(target=self._process.stdout.read, daemon=True)
        self._reader.start()

    def end(self, number=signal.SIGKILL):
        self._process.send_signal(number)
        self._process.wait(30)
        if hasattr(self, "_reader"):
            self._reader.join(5)
        self._process.stdout.close()


class Served:
    """`mrss serve` as a process, with the bundled model and a copy of its states."""

    def __init__(self, folder, env=None):
        self.feedback = folder / "feedback.jsonl"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self._env = env
        self._states = folder / "states"
        shutil.copytree(BUNDLED_STATES, self._states)
        self._process = None

    def start(self):
        command = [sys.executable, "-m", "mrss_provider.cli", "serve", "--port", str(self.port)]
        command += ["--states", str(self._states), "--feedback", str(self.feedback)]
        self._process = Process(command, f"playground: {self.url}", self._env)

    def kill(self):
        if self._process is not None:
            self._process.end()
            self._process = None
