"""Workers end with whoever needed them: an error does not wait for them, a kill leaves none."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from mrss_provider.evaluate.workers import workers

LONG_S = 30
KILLED = """
import os, signal
from mrss_provider.evaluate.workers import workers
with workers(1) as processes:
    print(processes.submit(os.getpid).result(), flush=True)
    processes.submit(signal.pause).result()
"""


def interrupted():
    """Yield a worker that is at something without end, and press Ctrl-C."""
    with workers(1) as processes:
        yield psutil.Process(processes.submit(os.getpid).result())
        processes.submit(signal.pause)
        raise KeyboardInterrupt


def test_what_they_are_at_is_ended_by_an_error():
    run = interrupted()
    worker = next(run)
    assert worker.is_running()
    with pytest.raises(KeyboardInterrupt):
        next(run)
    assert not worker.is_running()


def test_none_is_left_when_the_process_is_killed():
    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    worker.wait(LONG_S)
