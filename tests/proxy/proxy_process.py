"""A `litellm` process and its configuration: the shipped one, and what tests need beside it."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest
import yaml

from mrss_provider.config import KEEP_ALIVE_S

ROOT = Path(__file__).parent.parent.parent
LITELLM = Path(sys.executable).parent / "litellm"
QUICK_START = Path(__file__).parent / "quick_start"
START_S = 90.0
NUM_WORKERS = 2


class Proxy:
    """A `litellm` process; `lines` is what it wrote, `url` where it says that it listens."""

    def __init__(self, config, env, num_workers=NUM_WORKERS):
        self.url = None
        self.lines = []
        self._has_failed = False
        self._started = threading.Semaphore(0)
        self._has_ended = threading.Event()
        command = [
            str(LITELLM),
            # A port that was free now may be another's when LiteLLM has been imported.
            *("--config", str(config), "--host", "127.0.0.1", "--port", "0"),
            *("--num_workers", str(num_workers), "--telemetry", "False"),
            # A worker that imports LiteLLM on a busy machine takes longer than uvicorn's 5 s.
            *("--timeout_worker_healthcheck", "60"),
            *("--keepalive_timeout", str(KEEP_ALIVE_S)),
        ]
        paths = filter(None, (str(QUICK_START), os.environ.get("PYTHONPATH")))
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        # A worker that is alone says that it has started before it listens.
        for _ in range(num_workers + 1):
            if not self._started.acquire(timeout=START_S) or self._has_failed:
                self.stop()
                pytest.fail("the proxy did not start:\n" + "".join(self.lines[-40:]))

    def client(self, cls=openai.OpenAI):
        return cls(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60.0)

    def stop(self):
        self.process.terminate()
        # Python takes 2 s to leave after LiteLLM's last word.
        self._has_ended.wait(10)
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        self.process.stdout.close()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            self._has_failed |= "Application startup failed" in line
            listens = re.search(r"Uvicorn running on (http://\S+)", line)
            if listens:
                self.url = listens[1]
            if listens or "Application startup " in line:
                self._started.release()
            if re.search(rf"(Finished|Stopping)\D+\[{self.process.pid}\]", line):
                self._has_ended.set()
        # A proxy that has ended starts no more.
        self._has_failed = True
        self._started.release()
        self._has_ended.set()


def shipped_config():
    """Return proxy_config.yaml with its second backend turned on, as its comment tells."""
    text = (ROOT / "proxy_config.yaml").read_text()
    block = re.search(r"(?m)(^  # (- model_name: other|  litellm_params:|    \w+:).*\n)+", text)
    assert block, "the second backend's block is gone"
    assert block[0].count("\n") == 5
    return yaml.safe_load(text.replace(block[0], re.sub("(?m)^  # ", "  ", block[0])))


def proxy_config(folder):
    """Return the shipped configuration, before the scripted engine, and what else tests need."""
    config = shipped_config()
    for entry in config["model_list"]:
        if entry["litellm_params"]["model"].startswith("mrss/"):
            entry["litellm_params"]["api_base"] = f"unix://{folder}/scripted.sock"
        elif entry["model_name"] == "other":
            entry["litellm_params"]["model"] = "openai/tone"
    killable = {"model": "mrss/base", "api_base": f"unix://{folder}/killable.sock"}
    preset = {
        "model": "mrss/tone",
        "api_base": f"unix://{folder}/scripted.sock",
        "temperature": 0.5,
        "extra_body": {"top_k": 3, "min_p": 0.25},
    }
    config["model_list"] += [
        {"model_name": "preset", "litellm_params": preset},
        {"model_name": "auto/*", "litellm_params": {"model": "mrss/*"}},
        {"model_name": "killable", "litellm_params": killable},
    ]
    # Only requests that ask for it are cached.
    config["litellm_settings"] |= {
        "cache": True,
        "cache_params": {"type": "local", "mode": "default_off"},
    }
    return config
