"""Draining over HTTP: what runs ends, what is new is sent away with a word."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fakes import FakeBackend, Wait, serving, text

from mrss_provider.config import ServerConfig

CHAT = {"model": "tone", "messages": [{"role": "user", "content": "hi"}]}


def client_of(config) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(config.socket))
    return httpx.Client(transport=transport, base_url="http://engine", timeout=30)


def refused(client) -> httpx.Response:
    """Ask until the server, which is told to leave on its own loop, sends us away."""
    while (response := client.post("/v1/chat/completions", json=CHAT)).status_code == 200:
        pass
    return response


@pytest.mark.parametrize("stream", [False, True])
def test_what_runs_ends_and_what_is_new_is_sent_away(tmp_path, stream):
    config = ServerConfig(socket=tmp_path / "s")
    wait = Wait()
    scripts = iter([[text("be"), wait, text("fore")]])
    backend = FakeBackend(lambda request: next(scripts, [text("x")]))
    with serving(backend, config) as end, client_of(config) as client, ThreadPoolExecutor() as pool:
        running = pool.submit(client.post, "/v1/chat/completions", json={**CHAT, "stream": stream})
        assert wait.reached.wait(10)
        end(30.0)
        response = refused(client)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
        assert response.headers["retry-after"] == "1"
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        wait.go.set()
        answer = running.result(timeout=30)
    assert answer.status_code == 200
    assert "fore" in answer.text
    assert answer.text.endswith("data: [DONE]\n\n") == stream
    assert backend.closed


def test_what_does_not_end_in_time_ends_with_an_error(tmp_path):
    config = ServerConfig(socket=tmp_path / "s")
    wait = Wait()
    backend = FakeBackend([text("be"), wait, text("fore")])
    asked = {**CHAT, "stream": True}
    with (
        serving(backend, config) as end,
        client_of(config) as client,
        client.stream("POST", "/v1/chat/completions", json=asked) as answer,
    ):
        assert wait.reached.wait(10)
        end(0.1)
        body = answer.read().decode()
    assert '"code":"engine_unavailable"' in body
    assert "[DONE]" not in body
