"""A real engine with a tiny model behind a real server, watched from inside while it is asked."""

from __future__ import annotations

import contextlib
import json
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from admin_client import write_folders
from fakes import serving

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.config import EngineConfig, ServerConfig
from mrss_provider.engine.engine import Engine

MAX_ROWS = 8
BODY = {"model": "knowledge+tone", "prompt": "Hello", "max_tokens": 24, "seed": 1}
BODY |= {"ignore_eos": True}


class Served:
    """What a test may ask and look at."""

    def __init__(self, backend: AsyncEngine, socket: Path) -> None:
        self.backend = backend
        self.socket = socket
        transport = httpx.HTTPTransport(uds=str(socket))
        self.http = httpx.Client(transport=transport, base_url="http://localhost", timeout=60)

    @property
    def engine(self) -> Engine:
        loaded = self.backend._slot.loaded
        assert loaded is not None
        return loaded.engine

    def post(self, **changes: object) -> httpx.Response:
        return self.http.post("/v1/completions", json={**BODY, **changes})

    def text(self, **changes: object) -> str:
        response = self.post(**changes)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def streamed(self, begun: threading.Event | None = None, **changes: object) -> tuple[str, dict]:
        """Read a stream to its end; return its text, and the error that ended it or nothing."""
        text, error = "", {}
        body = {**BODY, **changes, "stream": True}
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    if begun is not None:
                        begun.set()
                    event = json.loads(line[6:])
                    error = event.get("error", error)
                    text += "".join(choice["text"] for choice in event.get("choices", ()))
        return text, error

    def wait_idle(self) -> None:
        """Wait until nobody holds a row: whoever has left has left nothing."""
        deadline = time.monotonic() + 20
        while self.engine.num_free_rows < MAX_ROWS or self.engine.num_waiting:
            assert time.monotonic() < deadline, self.engine.stats()
            time.sleep(0.005)


@contextlib.contextmanager
def served(folder: Path, config: EngineConfig | None = None, **options: object) -> Iterator[Served]:
    """Serve the engine of `config`, or a new one with its files in `folder`."""
    backend = AsyncEngine(config or write_folders(folder))
    server = ServerConfig(socket=folder / "s", **options)  # type: ignore[arg-type]
    with serving(backend, server):
        found = Served(backend, folder / "s")
        with found.http:
            assert found.post().status_code == 200
            yield found


@contextlib.contextmanager
def full_disk(num_bytes: int = 1) -> Iterator[None]:
    """Let the kernel refuse to write any file beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
