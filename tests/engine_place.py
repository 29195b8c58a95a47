"""A runtime folder in which engines with a fake backend are started, and all of them ended."""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import psutil

from mrss_provider.autostart import LocalEngine
from mrss_provider.backend import GenerateRequest
from mrss_provider.sampling_params import SamplingParams

TESTS = Path(__file__).parent
COMMAND = [sys.executable, str(TESTS / "fake_engine_process.py")]
REQUEST = GenerateRequest("tone", SamplingParams(), prompt="hi", timeout_s=60.0)
ENDLESS = GenerateRequest("tone", SamplingParams(), prompt="endless", timeout_s=60.0)


class Place:
    """A runtime folder of its own, and whoever was started for it."""

    def __init__(self, folder):
        self.folder = folder
        self.starts = folder / "starts"
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(TESTS),
            "XDG_RUNTIME_DIR": str(folder),
            "FAKE_STARTS": str(self.starts),
        }

    def engine(self, idle_exit_s=30.0, **env) -> LocalEngine:
        return LocalEngine(self.env | env, command=COMMAND, idle_exit_s=idle_exit_s)

    @property
    def pids(self):
        return [int(line) for line in self.starts.read_text().split()]

    def end(self):
        for pid in self.pids if self.starts.exists() else []:
            try:
                process = psutil.Process(pid)
                process.kill()
                process.wait(30)
            except psutil.NoSuchProcess:
                continue


@contextlib.contextmanager
def own_place():
    """Yield a new place; at the end nothing that was started for it runs."""
    # pytest's own folders are too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="mrss"))
    place = Place(folder)
    try:
        yield place
    finally:
        place.end()
        shutil.rmtree(folder)


async def ask(engine, request=REQUEST):
    stream = await engine.open(request)
    try:
        return "".join([delta.text async for delta in stream])
    finally:
        await stream.aclose()


async def read_on(stream):
    async for _ in stream:
        pass


def wait_ended(pid):
    """Wait until the process is gone; it may be gone already."""
    if psutil.pid_exists(pid):
        try:
            psutil.Process(pid).wait(30)
        except psutil.NoSuchProcess:
            return
