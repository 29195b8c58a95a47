"""An engine process without an engine, for auto-start: serves a FakeBackend.

`FAKE_STARTS` names a file that gets a line with the process id at each start, `FAKE_FAILURE` a
sentence to die with, `FAKE_DRAIN_S` is the time that answers get after a signal (0).
"""

import argparse
import os
import sys
from pathlib import Path

from fakes import HELLO, FakeBackend, Wait

from mrss_provider.config import ServerConfig
from mrss_provider.server.run import run_server


def script(request):
    """Answer "Hello, world"; the prompt "endless" never ends."""
    return [*HELLO, Wait()] if request.prompt == "endless" else HELLO


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path)
    parser.add_argument("--idle-exit-s", type=float)
    flags = parser.parse_args()
    with open(os.environ["FAKE_STARTS"], "a") as starts:
        starts.write(f"{os.getpid()}\n")
    if "FAKE_FAILURE" in os.environ:
        sys.stderr.write(f"a warning\n{os.environ['FAKE_FAILURE']}\n")
        sys.exit(1)
    drain_s = float(os.environ.get("FAKE_DRAIN_S", "0"))
    config = ServerConfig(socket=flags.socket, idle_exit_s=flags.idle_exit_s, drain_s=drain_s)
    run_server(FakeBackend(script), config, model="fake")
