"""Files that come in leave the event loop free, and nothing behind."""

import asyncio
import threading

import httpx
import pytest
from admin_client import write_folders

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.config import ServerConfig
from mrss_provider.engine import library_admin
from mrss_provider.server import uploads
from mrss_provider.server.app import create_app

OCTETS = {"content-type": "application/octet-stream"}


@pytest.mark.parametrize("where", ["writing", "reading"])
def test_others_are_answered_while_a_file_is_written_and_read(tmp_path, monkeypatch, where):
    config = write_folders(tmp_path)
    data = (config.states / "more/a.pth").read_bytes()
    module, name = {
        "writing": (uploads, "_append"),
        "reading": (library_admin, "load_tuned_state"),
    }[where]
    original, reached, go = getattr(module, name), threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        reached.set()
        assert go.wait(30)
        return original(*args, **kwargs)

    async def main():
        app = create_app(AsyncEngine(config), ServerConfig())
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            base = "http://127.0.0.1:9000"
            async with httpx.AsyncClient(transport=transport, base_url=base) as client:
                await client.get("/v1/model")
                monkeypatch.setattr(module, name, slow)
                query = "/v1/states?name=sent&format=pth"
                sent = asyncio.create_task(client.post(query, content=data, headers=OCTETS))
                await asyncio.to_thread(reached.wait, 30)
                body = {"model": "tone", "prompt": "Hello", "max_tokens": 2}
                during = await client.post("/v1/completions", json=body)
                assert not sent.done()
                go.set()
                return during.status_code, (await sent).status_code

    assert asyncio.run(asyncio.wait_for(main(), 60)) == (200, 201)


def test_an_upload_that_falls_silent_ends(tmp_path, monkeypatch):
    config = write_folders(tmp_path)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))

    async def silence():
        yield b"x" * 100
        await asyncio.Event().wait()

    async def main():
        app = create_app(AsyncEngine(config), ServerConfig(stall_s=0.05))
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            base = "http://127.0.0.1:9000"
            async with httpx.AsyncClient(transport=transport, base_url=base) as client:
                return await client.post("/v1/states?name=sent", content=silence(), headers=OCTETS)

    response = asyncio.run(asyncio.wait_for(main(), 60))
    assert (response.status_code, "nothing came" in response.json()["detail"]) == (408, True)
    assert list(folder.iterdir()) == []
