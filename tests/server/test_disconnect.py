"""Whoever hangs up ends the answer at once, by a hand-made `receive`."""

import asyncio
import json

import pytest
from fakes import FakeBackend, Wait, text

from mrss_provider.server.app import create_app

CHAT = {"model": "tone", "messages": [{"role": "user", "content": "hi"}]}


async def post_and_hang_up(app, body, when, path="/v1/chat/completions"):
    """Post `body`, hang up once `when()` returns; return what the app sent."""
    sent = []
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await when()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_aborts_the_answer(stream):
    wait = Wait()
    backend = FakeBackend([text("a"), wait, text("b")])
    sent = asyncio.run(
        post_and_hang_up(
            create_app(backend),
            {**CHAT, "stream": stream},
            lambda: asyncio.to_thread(wait.reached.wait),
        )
    )
    assert backend.streams[0].aborted
    assert len(sent) == (2 if stream else 0)
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


def test_hanging_up_aborts_every_prompt():
    waits = {"a": Wait(), "b": Wait()}
    backend = FakeBackend(lambda request: [waits[request.prompt]])

    async def both_wait():
        for wait in waits.values():
            await asyncio.to_thread(wait.reached.wait)

    body = {"model": "tone", "prompt": ["a", "b"], "stream": True}
    app = create_app(backend)
    asyncio.run(post_and_hang_up(app, body, both_wait, "/v1/completions"))
    assert [stream.aborted for stream in backend.streams] == [True, True]


def test_hanging_up_before_admission_cancels_it():
    class Slow(FakeBackend):
        cancelled = False

        async def open(self, request):
            self.opening.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled = True

    async def main():
        backend = Slow()
        backend.opening = asyncio.Event()
        sent = await post_and_hang_up(create_app(backend), CHAT, backend.opening.wait)
        return backend, sent

    backend, sent = asyncio.run(main())
    assert backend.cancelled
    assert sent == []


def test_a_client_that_leaves_within_its_body_is_no_defect():
    backend = FakeBackend()
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }
    asyncio.run(create_app(backend)(scope, receive, send))
    assert backend.requests == []
