"""One LiteLLM proxy, two workers, for the session; an engine of ours with a scripted backend."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import openai
import pytest
import yaml
from scripted_engine import EngineThread, ScriptedBackend

ROOT = Path(__file__).parent.parent.parent
START_S = 90.0
NUM_WORKERS = 2


class Proxy:
    """A `litellm` process that runs `config`; `lines` is what it wrote."""

    def __init__(self, config, num_workers, env):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.lines = []
        self._failed = False
        self._num_started = threading.Semaphore(0)
        command = [
            str(Path(sys.executable).parent / "litellm"),
            *("--config", str(config), "--host", "127.0.0.1", "--port", str(port)),
            *("--num_workers", str(num_workers)),
        ]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            cwd=config.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        for _ in range(num_workers):
            if not self._num_started.acquire(timeout=START_S) or self._failed:
                self.stop()
                pytest.fail("the proxy did not start:\n" + "".join(self.lines[-40:]))

    def client(self, cls=openai.OpenAI, **kwargs):
        return cls(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, **kwargs)

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._reader.join(5)
        self.process.stdout.close()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if "Application startup complete" in line:
                self._num_started.release()
            elif "Application startup failed" in line:
                self._failed = True
                self._num_started.release()


def shipped_config():
    """Return proxy_config.yaml with its second backend turned on."""
    text = (ROOT / "proxy_config.yaml").read_text()
    commented = re.search(
        r"(?m)(^  # (?:- model_name: other|  litellm_params:|    \w+:).*\n)+", text
    )
    assert commented, "the second backend's block is gone"
    return yaml.safe_load(text.replace(commented[0], re.sub("(?m)^  # ", "  ", commented[0])))


@pytest.fixture(scope="session")
def folder():
    # A Unix socket's path has some 100 characters at most, and pytest's own folders are deep.
    with tempfile.TemporaryDirectory(prefix="mrss") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def backend():
    return ScriptedBackend()


@pytest.fixture(scope="session")
def engine(folder, backend):
    engine = EngineThread(folder / "engine.sock", backend)
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def proxy(folder, engine):
    config = shipped_config()
    config["model_list"].append(
        {
            "model_name": "killable",
            "litellm_params": {
                "model": "mrss/base",
                "api_base": f"unix://{folder / 'killable.sock'}",
                "num_retries": 0,
            },
        }
    )
    config["litellm_settings"] |= {
        "cache": True,
        "cache_params": {"type": "local", "mode": "default_off"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    env = {
        "MRSS_SOCKET": str(folder / "engine.sock"),
        "OTHER_API_BASE": "http://127.0.0.1:1/v1",
        "OTHER_API_KEY": "unused",
    }
    proxy = Proxy(path, NUM_WORKERS, env)
    yield proxy
    proxy.stop()


@pytest.fixture(scope="session")
def client(proxy):
    return proxy.client()
