"""The engine and the proxy that the matrix asks: one process of each, on the bundled model."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml
from fakes import serving

START_S = 120.0
ROWS_S = 20.0
KEY = "sk-conformance"
ENV = {"OMP_NUM_THREADS": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@dataclass(frozen=True)
class Route:
    """A way to the engine.

    Attributes:
        id: `server`, or what stands before the model in LiteLLM's configuration.
        url: of the OpenAI API, with its /v1.
        prefix: what stands before a mixture in a model's name.
        embedding_prefix: the same for embeddings.
        engine_url: of the engine behind all of them.
    """

    id: str
    url: str
    prefix: str
    embedding_prefix: str
    engine_url: str

    def wait_for_no_rows(self) -> None:
        """Ask the engine until nobody holds a row."""
        deadline = time.monotonic() + ROWS_S
        while (held := self._num_rows()) and time.monotonic() < deadline:
            pass
        assert held == 0

    def _num_rows(self) -> int:
        text = httpx.get(f"{self.engine_url}/metrics").text
        found = re.search(r"^mrss_rows_used (\S+)$", text, re.MULTILINE)
        assert found is not None
        return int(float(found[1]))

    def model(self, name: str) -> str:
        """Return the name of a mixture on this route."""
        return self.prefix + name


def routes(engine_url: str, proxy_url: str) -> list[Route]:
    """Return the routes in the order of the table."""
    return [
        Route("server", f"{engine_url}/v1", "", "", engine_url),
        Route("mrss", f"{proxy_url}/v1", "mrss/", "mrss-embedding/", engine_url),
        Route("openai", f"{proxy_url}/v1", "mrss-openai/", "mrss-openai/", engine_url),
    ]


class Process:
    """A server process; `lines` is what it wrote, `url` where it says that it listens.

    Args:
        command: which takes a port that is free.
        listens: a pattern of the line that tells where, when it is ready; the URL is its group.
    """

    def __init__(self, command: list[str], listens: str, **env: str) -> None:
        self.url = ""
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._listens = re.compile(listens)
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **ENV, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(self) -> None:
        """Wait until it is ready."""
        if not self._ready.wait(START_S) or not self.url:
            self.stop()
            raise RuntimeError("it did not start:\n" + "".join(self.lines[-30:]))

    def stop(self) -> None:
        """End it; idempotent."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(5)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)
            if found := self._listens.search(line):
                self.url = found[1]
                self._ready.set()
        self._ready.set()


def free_port() -> int:
    """Return a TCP port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_engine() -> Iterator[str]:
    """Serve the bundled model, in a thread, with a template that thinks and has tools."""
    from mrss_provider.async_engine import AsyncEngine
    from mrss_provider.config import EngineConfig, ServerConfig

    port = free_port()
    engine = AsyncEngine(EngineConfig(template="g1"))
    with serving(engine, ServerConfig(port=port)):
        yield f"http://127.0.0.1:{port}"


def start_proxy(config: Path) -> Process:
    """Start a LiteLLM proxy of one worker."""
    run = [sys.executable, "-c", "from litellm import run_server; run_server()"]
    flags = ["--host", "127.0.0.1", "--port", "0", "--telemetry", "False"]
    # Alone, it tells where it listens after its application has started.
    listens = r"Uvicorn running on (http://\S+)"
    proxy = Process([*run, "--config", str(config), *flags], listens)
    proxy.wait()
    return proxy


def write_config(path: Path, engine_url: str) -> None:
    """Write what `mrss litellm-config` makes of the running engine, with both ways in."""
    command = [sys.executable, "-m", "mrss_provider.cli", "litellm-config"]
    command += ["--api-base", engine_url, "--openai-route", "--out", str(path)]
    subprocess.run(command, check=True, env={**os.environ, **ENV}, capture_output=True)
    assert yaml.safe_load(path.read_text())["model_list"]
