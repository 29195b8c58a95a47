"""The I/O thread: one loop, work from anywhere, a clean end, a child of its own after a fork."""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from mrss_provider.errors import EngineUnavailableError
from mrss_provider.provider.io_thread import IOThread


@pytest.fixture(params=["uvloop", "asyncio"])
def io(request, monkeypatch):
    if request.param == "asyncio":
        # As where uvloop is not installed.
        monkeypatch.setitem(sys.modules, "uvloop", None)
    io = IOThread()
    yield io
    io.stop()


def test_work_runs_on_one_thread_whoever_sends_it(io):
    async def where():
        return threading.current_thread(), asyncio.get_running_loop()

    found = {io.run(where()) for _ in range(3)}
    senders = [threading.Thread(target=lambda: found.add(io.run(where()))) for _ in range(3)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    ((thread, loop),) = found
    assert thread is not threading.current_thread()
    assert thread.daemon
    assert loop is io.loop


def test_errors_come_back_to_the_sender(io):
    async def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        io.run(fail())


def test_cancelling_the_future_cancels_the_work(io):
    started, ended = threading.Event(), threading.Event()

    async def work():
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    future = io.submit(work())
    assert started.wait(5)
    future.cancel()
    assert ended.wait(5)


def test_stop_ends_the_work_then_calls_back_then_ends_the_thread(io):
    order = []
    started = threading.Event()

    async def work():
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            order.append("work")

    async def close():
        order.append("close")

    io.at_stop(close)
    io.submit(work())
    assert started.wait(5)
    io.stop()
    io.stop()
    assert order == ["work", "close"]
    # Nobody is there: this is no error.
    io.call_soon(order.append, "late")
    assert order == ["work", "close"]


FORK = """
import os, sys
from fakes import FakeBackend
import litellm
from mrss_provider import handler, register

register(FakeBackend())
ask = lambda: litellm.completion("mrss/base", messages=[{"role": "user", "content": "Hi"}])
assert ask().choices[0].message.content == "Hello, world"
child = os.fork()
if child == 0:
    # The parent's thread is not here; a child that relied on it would wait forever.
    os._exit(0 if ask().choices[0].message.content == "Hello, world" else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert ask().choices[0].message.content == "Hello, world"
sys.exit(status)
"""


@pytest.mark.slow
def test_forked_child_answers_on_a_thread_of_its_own():
    tests = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", FORK], cwd=tests, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_what_is_submitted_while_it_stops_ends(io):
    started = threading.Event()

    async def endless():
        started.set()
        await asyncio.Event().wait()

    late = []

    async def at_stop():
        # As another thread does that met the thread before it was stopped.
        late.append(await asyncio.to_thread(io.submit, endless()))
        await asyncio.to_thread(started.wait, 5)

    io.at_stop(at_stop)
    io.run(asyncio.sleep(0))
    io.stop()
    with pytest.raises(CancelledError):
        late[0].result(1)


def test_what_is_submitted_after_it_has_stopped_is_refused(io):
    io.run(asyncio.sleep(0))
    io.stop()
    with pytest.raises(EngineUnavailableError, match="the provider was closed"):
        io.run(asyncio.sleep(0))
