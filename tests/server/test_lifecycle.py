"""Starting, draining, leases and idle engines. Time is moved by hand."""

import asyncio
import contextlib
import socket

import pytest
from fakes import FakeBackend, Wait, text
from starlette.testclient import TestClient

from mrss_provider.administration import ModelInfo, ModelOrder
from mrss_provider.config import KEEP_ALIVE_S, ServerConfig
from mrss_provider.errors import (
    ConflictError,
    EngineUnavailableError,
    ModelFileError,
    NotFoundError,
)
from mrss_provider.server.app import create_app
from mrss_provider.server.lifecycle import Lifecycle
from mrss_provider.server.model_swap import load_model, remove_model
from mrss_provider.server.run import Server, listen_on

CHAT = {"model": "tone", "messages": [{"role": "user", "content": "hi"}], "stream": True}


class MovedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock can be moved forward."""

    moved_s = 0.0

    def time(self):
        return super().time() + self.moved_s

    async def move(self, seconds):
        self.moved_s += seconds
        # One turn to see the timers that are due, one to run what they scheduled.
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def run(main):
    with asyncio.Runner(loop_factory=MovedLoop) as runner:
        return runner.run(main())


def recorded(lifecycle):
    ends = []
    lifecycle.on_end = lambda: ends.append(1)
    return ends


def test_an_unused_engine_leaves_after_its_time():
    async def main():
        lifecycle = Lifecycle(idle_exit_s=60)
        ends = recorded(lifecycle)
        loop = asyncio.get_running_loop()
        await loop.move(1000)
        assert not ends, "an engine that still loads is not idle"
        lifecycle.set_ready()
        await loop.move(59)
        assert not ends
        await loop.move(2)
        assert ends

    run(main)


@pytest.mark.parametrize("kind", ["lease", "running"])
def test_leases_and_answers_keep_an_engine(kind):
    async def main():
        lifecycle = Lifecycle(idle_exit_s=60)
        ends = recorded(lifecycle)
        loop = asyncio.get_running_loop()
        lifecycle.set_ready()
        with contextlib.ExitStack() as held:
            for _ in range(2):
                held.enter_context(getattr(lifecycle, kind)())
            await loop.move(1000)
            assert not ends
        await loop.move(59)
        with getattr(lifecycle, kind)():
            await loop.move(2)
        await loop.move(59)
        assert not ends, "the time begins anew after each"
        await loop.move(2)
        assert ends

    run(main)


def test_without_a_limit_an_engine_stays():
    async def main():
        lifecycle = Lifecycle(idle_exit_s=0)
        ends = recorded(lifecycle)
        lifecycle.set_ready()
        await asyncio.get_running_loop().move(10**6)
        assert not ends

    run(main)


def test_draining_waits_for_answers_but_not_for_leases():
    async def main():
        lifecycle = Lifecycle()
        lifecycle.set_ready()
        with lifecycle.lease():
            with lifecycle.running():
                draining = asyncio.create_task(lifecycle.drain(30))
                await asyncio.sleep(0)
                for taken in (lifecycle.running, lifecycle.lease):
                    with pytest.raises(EngineUnavailableError, match="shutting down"), taken():
                        pass
                with pytest.raises(EngineUnavailableError, match="shutting down"):
                    lifecycle.check_ready()
                assert not draining.done()
            assert await draining

    run(main)


def test_draining_does_not_wait_for_ever():
    async def main():
        lifecycle = Lifecycle()
        with lifecycle.running():
            draining = asyncio.create_task(lifecycle.drain(30))
            await asyncio.sleep(0)
            await asyncio.get_running_loop().move(31)
            assert not await draining

    run(main)


class Starting(FakeBackend):
    """A backend that is loaded when the test says so, or never."""

    def __init__(self, failure=None):
        super().__init__()
        self.wait = Wait()
        self.failure = failure

    async def start(self):
        self.wait.reached.set()
        await asyncio.to_thread(self.wait.go.wait)
        if self.failure is not None:
            raise self.failure


def poll(client, path, status):
    """Ask until the answer has `status`: what is awaited happens on the server's loop."""
    while (response := client.get(path)).status_code != status:
        pass
    return response


def test_a_server_is_alive_before_it_is_ready():
    backend = Starting()
    with TestClient(create_app(backend), "http://localhost") as client:
        backend.wait.reached.wait()
        assert client.get("/health").status_code == 200
        starting = client.get("/ready")
        assert starting.status_code == 503
        assert "starting" in starting.json()["error"]["message"]
        # A request waits in the backend, which knows when it is loaded.
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        backend.wait.go.set()
        assert poll(client, "/ready", 200).json() == {"status": "ready"}
    assert backend.closed


@pytest.mark.parametrize(
    ("failure", "status", "words"),
    [
        (ModelFileError("no weights in it"), 400, "no weights in it"),
        (ZeroDivisionError("secret"), 500, "did not start"),
    ],
)
def test_a_failed_start_is_told_and_ends_the_server(failure, status, words):
    backend = Starting(failure)
    backend.wait.go.set()
    lifecycle = Lifecycle()
    ends = recorded(lifecycle)
    with TestClient(create_app(backend, lifecycle=lifecycle), "http://localhost") as client:
        response = poll(client, "/ready", status)
        assert words in response.json()["error"]["message"]
        assert client.post("/v1/chat/completions", json=CHAT).status_code == status
    assert ends
    assert "secret" not in response.text


def test_a_load_that_leaving_cuts_short_is_no_failure():
    async def main():
        lifecycle = Lifecycle()
        ends = recorded(lifecycle)
        await lifecycle.drain(30)
        lifecycle.set_failed(EngineUnavailableError("the engine was closed"))
        assert lifecycle.failure is None
        assert not ends

    run(main)


def test_a_lease_counts_while_its_client_stays():
    async def main():
        lifecycle = Lifecycle()
        app = create_app(FakeBackend([text("x")]), lifecycle=lifecycle)
        held, left = asyncio.Event(), asyncio.Event()

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message.get("body"):
                held.set()

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/lease",
            "raw_path": b"/v1/lease",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
        }
        lease = asyncio.create_task(app(scope, receive, send))
        await held.wait()
        assert lifecycle.num_leases == 1
        left.set()
        await lease
        assert lifecycle.num_leases == 0

    run(main)


def test_a_connection_rests_longer_than_clients_keep_it(tmp_path):
    """Else it closes while a request is on its way, which fails."""
    config = ServerConfig(socket=tmp_path / "s")

    async def ask(reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (line[15:] for line in head.splitlines() if line.startswith(b"content-length"))
        await reader.readexactly(int(length))
        return head.split()[1]

    async def main():
        server = Server(FakeBackend(), config, *listen_on(config))
        serving = asyncio.create_task(server.run_to_end())
        connection = await asyncio.open_unix_connection(str(config.socket))
        assert await ask(*connection) == b"200"
        await asyncio.get_running_loop().move(KEEP_ALIVE_S - 1)
        assert await ask(*connection) == b"200"
        connection[1].close()
        server.end()
        await serving

    run(main)


def test_what_is_written_does_not_wait_for_an_acknowledgement():
    """It would for 40 ms in every answer but a connection's first."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    async def main():
        accepted = asyncio.get_running_loop().create_future()
        (listener,) = listen_on(ServerConfig(port=port))
        server = await asyncio.start_server(
            lambda _, writer: accepted.set_result(writer), sock=listener.socket
        )
        _, theirs = await asyncio.open_connection("127.0.0.1", port)
        ours = await accepted
        option = (socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert ours.get_extra_info("socket").getsockopt(*option)
        for writer in (theirs, ours):
            writer.close()
            await writer.wait_closed()
        server.close()
        await server.wait_closed()

    run(main)


@pytest.mark.parametrize("change", ["load", "remove"])
def test_who_may_not_change_the_model_now_is_told_at_once(change):
    class Busy:
        """Another change is under way, and never ends."""

        async def load_model(self, order, on_taken):
            raise ConflictError("wait for it")

        async def remove_model(self, drain_s, on_taken):
            raise ConflictError("wait for it")

        async def model(self):
            await asyncio.Event().wait()

    async def main():
        lifecycle = Lifecycle()
        asked = (
            load_model(Busy(), lifecycle, ModelOrder("second"))
            if change == "load"
            else remove_model(Busy(), lifecycle, 0.0)
        )
        asking = asyncio.create_task(asked)
        # A turn to ask, and one to be told.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert asking.done()
        with pytest.raises(ConflictError):
            await asking
        # Whether a model is ready is for the change that is under way to say.
        with pytest.raises(EngineUnavailableError):
            lifecycle.check_ready()

    run(main)


@pytest.mark.parametrize("is_good", [True, False])
def test_a_server_is_ready_until_its_model_is_really_taken_away(is_good):
    class Slow:
        """Each stage of a load ends when the test says so."""

        def __init__(self):
            self.checked, self.loaded = asyncio.Event(), asyncio.Event()

        async def load_model(self, order, on_taken):
            await self.checked.wait()
            if not is_good:
                raise NotFoundError("there is no such file")
            on_taken()
            await self.loaded.wait()
            return ModelInfo("second", "second", "second", "")

    async def main():
        lifecycle, admin = Lifecycle(), Slow()
        lifecycle.set_ready()
        loading = asyncio.create_task(load_model(admin, lifecycle, ModelOrder("second")))
        await asyncio.sleep(0)
        lifecycle.check_ready()
        admin.checked.set()
        if is_good:
            await asyncio.sleep(0)
            with pytest.raises(EngineUnavailableError, match="is being loaded"):
                lifecycle.check_ready()
            admin.loaded.set()
            await loading
        else:
            with pytest.raises(NotFoundError):
                await loading
        lifecycle.check_ready()

    run(main)


@pytest.mark.parametrize("change", ["load", "remove"])
def test_a_change_that_leaves_no_model_promises_none(change):
    class Empty:
        """A load into nothing fails late; who asks for a removal leaves in its midst."""

        async def load_model(self, order, on_taken):
            on_taken()
            raise ModelFileError("half a model")

        async def remove_model(self, drain_s, on_taken):
            on_taken()
            raise asyncio.CancelledError

        async def model(self):
            raise EngineUnavailableError("no model is loaded")

    async def main():
        lifecycle, admin = Lifecycle(), Empty()
        lifecycle.set_ready()
        changes = {
            "load": lambda: load_model(admin, lifecycle, ModelOrder("half")),
            "remove": lambda: remove_model(admin, lifecycle, 0.0),
        }
        with pytest.raises((ModelFileError, asyncio.CancelledError)):
            await changes[change]()
        with pytest.raises(EngineUnavailableError, match="no model is loaded"):
            lifecycle.check_ready()

    run(main)
