"""Auto-start with real processes: one engine for all, back after SIGKILL, gone when idle."""

import asyncio
import os
import signal
import stat
import subprocess
import sys

import psutil
import pytest
from engine_place import ENDLESS, REQUEST, TESTS, ask, own_place, read_on, wait_ended

from mrss_provider import autostart
from mrss_provider.autostart import LocalEngine
from mrss_provider.backend import GenerateRequest
from mrss_provider.client import Client
from mrss_provider.errors import EngineUnavailableError, RequestTimeoutError
from mrss_provider.sampling_params import SamplingParams


@pytest.fixture
def place():
    with own_place() as found:
        yield found


def test_the_first_request_starts_an_engine_and_others_share_it(place):
    async def main():
        first, second = place.engine(), place.engine()
        try:
            answers = await asyncio.gather(*(ask(e) for e in (first, second, first, second)))
            return answers, await first.models()
        finally:
            await first.aclose()
            await second.aclose()

    answers, models = asyncio.run(main())
    assert answers == ["Hello, world"] * 4
    assert [card.id for card in models] == ["base", "knowledge", "tone"]
    assert len(place.pids) == 1
    engine_socket = place.engine().socket
    assert stat.S_IMODE(engine_socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(engine_socket.parent.stat().st_mode) == 0o700
    # A session of its own: Ctrl-C at the terminal is not for it.
    assert os.getsid(place.pids[0]) == place.pids[0]


@pytest.mark.slow
def test_processes_that_race_start_one_engine(place):
    code = (
        "import asyncio, pathlib, sys\n"
        "from engine_place import Place, ask\n"
        "place = Place(pathlib.Path(sys.argv[1]))\n"
        "async def main():\n"
        "    engine = place.engine()\n"
        "    text = await ask(engine)\n"
        "    print(text)\n"
        "    await engine.aclose()\n"
        "asyncio.run(main())\n"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(place.folder)],
            cwd=TESTS,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    assert [worker.communicate()[0] for worker in workers] == ["Hello, world\n"] * 3
    assert len(place.pids) == 1


def test_after_sigkill_the_next_request_is_served(place):
    async def main():
        engine = place.engine()
        stream = await engine.open(ENDLESS)
        first = await anext(stream)
        os.kill(place.pids[0], signal.SIGKILL)
        with pytest.raises(EngineUnavailableError):
            await read_on(stream)
        assert engine.socket.exists(), "a killed engine leaves its socket behind"
        text = await ask(engine)
        # And at once, without a turn of the loop that could have seen the lease break.
        os.kill(place.pids[1], signal.SIGKILL)
        again = await ask(engine)
        await engine.aclose()
        return first.text, text, again

    first, text, again = asyncio.run(main())
    assert first.startswith("Hello")
    assert (text, again) == ("Hello, world", "Hello, world")
    assert len(place.pids) == 3


def test_an_engine_leaves_after_its_last_client(place):
    async def main():
        engine = place.engine(idle_exit_s=0.1)
        await ask(engine)
        await engine.aclose()
        return engine.socket

    path = asyncio.run(main())
    wait_ended(place.pids[0])
    assert not path.exists()


@pytest.mark.slow
def test_a_killed_worker_gives_its_lease_back(place):
    code = (
        "import asyncio, pathlib, sys\n"
        "from engine_place import Place, ask\n"
        "place = Place(pathlib.Path(sys.argv[1]))\n"
        "async def main():\n"
        "    engine = place.engine(idle_exit_s=0.1)\n"
        "    await engine.ensure(60)\n"
        "    print('held', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code, str(place.folder)], cwd=TESTS, stdout=subprocess.PIPE
    )
    with worker:
        assert worker.stdout.readline() == b"held\n"
        (pid,) = place.pids
        assert psutil.pid_exists(pid)
        worker.kill()
    wait_ended(pid)


def test_a_child_that_dies_tells_its_last_words(place):
    async def main():
        engine = place.engine(FAKE_FAILURE="no weights in model.pth")
        with pytest.raises(EngineUnavailableError, match=r"no weights in model\.pth") as caught:
            await engine.open(REQUEST)
        await engine.aclose()
        return str(caught.value), engine.log_path

    message, log_path = asyncio.run(main())
    assert "a warning" not in message
    assert str(log_path) in message


def test_a_start_that_takes_too_long_is_a_timeout(place):
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    request = GenerateRequest("tone", SamplingParams(), prompt="hi", timeout_s=0.3)

    async def main():
        engine = LocalEngine(place.env, command=command)
        started = []
        start = engine._start
        engine._start = lambda: started.append(start()) or started[0]
        with pytest.raises(RequestTimeoutError, match=r"not ready within 0\.3 s"):
            await engine.open(request)
        await engine.aclose()
        started[0].kill()
        started[0].wait(30)

    asyncio.run(main())


class Child:
    """A process that has already ended."""

    returncode = 1

    def poll(self):
        return self.returncode


class Running(Child):
    """A process that runs and never serves."""

    returncode = None


@pytest.mark.parametrize(
    ("before", "between", "num_starts"),
    [
        # Our child lost the socket to another engine, which then died.
        (["absent", "absent"], ["busy", "absent", "absent"], 2),
        # The lock came free because an engine had been started, which then died.
        (["absent", "busy", "absent", "absent"], [], 1),
    ],
)
def test_who_has_the_lock_can_start_again(place, monkeypatch, before, between, num_starts):
    monkeypatch.setattr(autostart, "_POLL_S", 0)
    engine = place.engine()
    statuses = iter([*before, *between])
    started = []

    async def probe():
        return next(statuses, "ready" if len(started) == num_starts else "absent")

    async def take_lease():
        return True

    monkeypatch.setattr(engine, "_probe", probe)
    monkeypatch.setattr(engine, "_take_lease", take_lease)
    monkeypatch.setattr(engine, "_start", lambda: started.append(Child()) or started[-1])
    asyncio.run(engine.ensure(2))
    assert len(started) == num_starts


def test_a_closed_engine_says_so_at_once(place):
    async def main():
        engine = place.engine()
        await engine.aclose()
        for call in (engine.open(REQUEST), engine.models(), engine.ensure(5)):
            with pytest.raises(EngineUnavailableError, match="this LocalEngine was closed"):
                await call

    asyncio.run(main())
    assert not place.starts.exists()


def test_closing_an_engine_ends_who_waits_for_its_start(place, monkeypatch):
    engine = place.engine()

    async def main():
        begun = asyncio.Event()
        monkeypatch.setattr(engine, "_start", lambda: begun.set() or Running())
        waiting = asyncio.create_task(engine.ensure(5))
        await begun.wait()
        await engine.aclose()
        with pytest.raises(EngineUnavailableError, match="this LocalEngine was closed"):
            await waiting

    asyncio.run(main())


@pytest.mark.slow
def test_the_real_engine_starts_answers_and_comes_back(place, tmp_path):
    from tiny_model import write_model_folder, write_state

    model = write_model_folder(tmp_path / "model")
    (tmp_path / "states").mkdir()
    write_state(tmp_path / "states" / "tone.pth")
    env = place.env | {
        "MRSS_MODEL": str(model),
        "MRSS_STATES": str(tmp_path / "states"),
        "MRSS_THREADS": "1",
    }
    request = GenerateRequest(
        "base+tone",
        SamplingParams(seed=1, max_tokens=5, ignore_eos=True),
        prompt="hi",
        timeout_s=90,
    )

    async def main():
        # Long enough for a client on a busy machine to find the engine before it leaves.
        engine = LocalEngine(env, idle_exit_s=5.0)
        texts = [await ask(engine, request)]
        client = Client(engine.address)
        os.kill((await client.version()).pid, signal.SIGKILL)
        texts.append(await ask(engine, request))
        last = (await client.version()).pid
        await engine.aclose()
        return texts, last

    texts, last = asyncio.run(main())
    assert texts[0] == texts[1]
    wait_ended(last)


def test_an_engine_that_only_we_reach_wants_no_key(place):
    async def main():
        engine = place.engine(MRSS_API_KEY="k" * 20, MRSS_KEYS_FILE="/no/such/file")
        stream = await engine.open(REQUEST)
        await stream.aclose()
        await engine.aclose()

    asyncio.run(main())
