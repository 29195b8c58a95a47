"""Engines as processes: one of our own with a fake backend, and those that auto-start made."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import psutil
from scripted_engine import WAIT_S

from mrss_provider.client import Client

ENGINE = """
import sys
from pathlib import Path
from fakes import FakeBackend
from mrss_provider.config import ServerConfig
from mrss_provider.server.run import run_server
print("starting", flush=True)
run_server(FakeBackend(), ServerConfig(socket=Path(sys.argv[1])))
"""


def start_engine(path):
    """Start an engine process of our own, return it once it answers."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", ENGINE, str(path)], env=env)

    async def answers():
        client = Client(f"unix://{path}")
        async with asyncio.timeout(WAIT_S * 3):
            while await client.probe() != "ready":
                await asyncio.sleep(0.02)
        await client.aclose()

    asyncio.run(answers())
    return process


def own_engines(folder):
    """Return the engine processes whose socket is in `folder`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "mrss_provider.server" in command and str(folder) in " ".join(command):
            found.append(process)
    return found
