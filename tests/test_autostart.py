"""Auto-start with real processes: one engine for all, back after SIGKILL, gone when idle."""

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from mrss_provider import autostart
from mrss_provider.autostart import LocalEngine, engine_address, socket_path
from mrss_provider.backend import GenerateRequest
from mrss_provider.client import Client
from mrss_provider.config import ServerConfig
from mrss_provider.errors import ConfigError, EngineUnavailableError, RequestTimeoutError
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.server.run import Listener

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


@pytest.fixture
def place():
    # pytest's own folders are too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="mrss"))
    found = Place(folder)
    yield found
    found.end()
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
        "import asyncio, sys, test_autostart as t\n"
        "place = t.Place(t.Path(sys.argv[1]))\n"
        "async def main():\n"
        "    engine = place.engine()\n"
        "    text = await t.ask(engine)\n"
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
        "import asyncio, sys, test_autostart as t\n"
        "place = t.Place(t.Path(sys.argv[1]))\n"
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


def test_sigterm_ends_an_engine_with_status_0(place):
    path = place.folder / "s"
    flags = ["--socket", str(path), "--idle-exit-s", "0"]
    process = subprocess.Popen([*COMMAND, *flags], env=place.env)

    async def main():
        client = Client(f"unix://{path}")
        while await client.probe() != "ready":
            assert process.poll() is None
        stream = await client.open(ENDLESS)
        await anext(stream)
        process.terminate()
        with pytest.raises(EngineUnavailableError, match="engine was closed"):
            await read_on(stream)

    with process:
        asyncio.run(main())
        assert process.wait(30) == 0
    assert not path.exists()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_an_engine_at_once(place, sig):
    path = place.folder / "s"
    flags = ["--socket", str(path), "--idle-exit-s", "0"]
    process = subprocess.Popen([*COMMAND, *flags], env=place.env | {"FAKE_DRAIN_S": "1000"})

    async def main():
        client = Client(f"unix://{path}")
        while await client.probe() != "ready":
            assert process.poll() is None
        stream = await client.open(ENDLESS)
        await anext(stream)
        process.send_signal(sig)
        while await client.probe() != "busy":
            assert process.poll() is None
        process.send_signal(sig)
        with pytest.raises(EngineUnavailableError, match="broke off"):
            await read_on(stream)

    try:
        asyncio.run(main())
        assert process.wait(30) == 128 + sig
    finally:
        process.kill()
        process.wait()
    assert not path.exists()


def test_no_other_server_looks_at_a_socket_between_its_bind_and_its_listen(place, monkeypatch):
    path = place.folder / "s"
    looked = []

    class Watched(socket.socket):
        def listen(self, *backlog):
            # Now it looks like a dead server's, which another server would remove.
            with open(f"{path}.lock") as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            looked.append(path.exists())
            super().listen(*backlog)

    monkeypatch.setattr("mrss_provider.server.run.socket.socket", Watched)
    with contextlib.closing(Listener(ServerConfig(socket=path))):
        assert looked == [True]
        with pytest.raises(ConfigError, match="a server listens on"):
            Listener(ServerConfig(socket=path))
    assert not path.exists()


@pytest.mark.slow
def test_a_second_server_on_a_socket_says_so_and_leaves_it_alone(place):
    path = place.folder / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        flags = ["--socket", str(path), "--port", "1"]
        second = subprocess.run(
            [sys.executable, "-m", "mrss_provider.server", *flags],
            env=place.env,
            capture_output=True,
            text=True,
            check=False,
        )
    assert second.returncode == 1
    last = second.stderr.strip().splitlines()[-1]
    assert last.startswith(f"cannot listen on unix://{path} (a server listens on")
    assert path.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(
            ["--port", "x"], "MRSS_PORT must be an integer, got 'x'", marks=pytest.mark.slow
        ),
        (["--dtype", "x"], "dtype must"),
    ],
)
@pytest.mark.slow
def test_a_bad_flag_is_one_sentence_and_status_1(flags, words):
    run = subprocess.run(
        [sys.executable, "-m", "mrss_provider.server", *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert words in run.stderr.strip().splitlines()[-1]
    assert "Traceback" not in run.stderr


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


def test_each_configuration_has_its_own_socket(place):
    paths = {
        socket_path(place.env),
        socket_path(place.env | {"MRSS_MODEL": "/m"}),
        socket_path(place.env | {"MRSS_STATES": "/s"}),
        socket_path(place.env | {"MRSS_DTYPE": "fp32"}),
    }
    assert len(paths) == 4
    assert socket_path(place.env) in paths
    assert socket_path(place.env | {"MRSS_PORT": "1", "OTHER": "x"}) in paths


def test_a_relative_model_is_another_one_in_another_folder(place, tmp_path, monkeypatch):
    env = place.env | {"MRSS_MODEL": "m"}
    here = socket_path(env)
    monkeypatch.chdir(tmp_path)
    assert socket_path(env) != here


def test_a_relative_tokenizer_is_another_one_in_another_folder(place, tmp_path, monkeypatch):
    env = place.env | {"MRSS_TOKENIZER": "vocab.txt"}
    here = socket_path(env)
    monkeypatch.chdir(tmp_path)
    assert socket_path(env) != here
    assert socket_path(place.env | {"MRSS_TOKENIZER": str(tmp_path / "vocab.txt")}) == (
        socket_path(env)
    )


@pytest.mark.parametrize("kind", ["missing", "file", "relative", "unreadable"])
def test_a_runtime_folder_that_cannot_be_used_gives_way_to_the_next(place, monkeypatch, kind):
    runtime = place.folder / "x"
    monkeypatch.chdir(place.folder)
    if kind in ("relative", "unreadable"):
        runtime.mkdir(mode=0o700)
    if kind == "file":
        runtime.touch()
    elif kind == "relative":
        runtime = Path("x")
    elif kind == "unreadable":
        # Not by the mode, which does not stop a superuser.
        make = Path.mkdir

        def mkdir(self, *args, **kwargs):
            if self.parent == runtime:
                raise PermissionError(13, "Permission denied")
            make(self, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(tempfile, "tempdir", str(place.folder))
    env = place.env | {"XDG_RUNTIME_DIR": str(runtime)}
    assert socket_path(env).parent == place.folder / f"mrss-{os.getuid()}"


def test_the_last_reason_is_told_when_no_folder_can_be_used(place, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(autostart, "_make_private", refuse)
    with pytest.raises(ConfigError, match=r"\(/tmp/mrss-\d+: Permission denied\); set MRSS_SOCKET"):
        socket_path(place.env)


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


def test_a_path_that_is_too_long_gives_way_to_a_shorter_one(place):
    long = place.folder / ("x" * 90)
    long.mkdir()
    path = socket_path(place.env | {"XDG_RUNTIME_DIR": str(long)})
    assert not path.is_relative_to(long)
    assert len(os.fsencode(path)) < 104


def test_a_folder_that_others_can_write_to_is_refused(place):
    (place.folder / "mrss").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        socket_path(place.env)


def test_a_link_in_the_folders_place_is_refused(place):
    (place.folder / "elsewhere").mkdir(mode=0o700)
    (place.folder / "mrss").symlink_to(place.folder / "elsewhere")
    with pytest.raises(ConfigError, match="mode 0700"):
        socket_path(place.env)


@pytest.mark.parametrize(
    ("api_base", "env", "expected"),
    [
        ("http://a:1", {"MRSS_SOCKET": "/s"}, "http://a:1"),
        (None, {"MRSS_SOCKET": "/s"}, "unix:///s"),
        ("", {"MRSS_SOCKET": "unix:///s"}, "unix:///s"),
        (None, {"MRSS_SOCKET": "http://b:2"}, "http://b:2"),
        (None, {"MRSS_SOCKET": ""}, None),
        (None, {}, None),
    ],
)
def test_an_address_that_was_given_wins(api_base, env, expected):
    assert engine_address(api_base, env) == expected


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
