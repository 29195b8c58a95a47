"""Whose saved conversations are, where they lie, how many there may be, and who may write them."""

import asyncio
import threading
from dataclasses import replace

import pytest
import torch
from conversing import DEMO, PROMPT, answer, ask, conversation_config, run

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import Message
from mrss_provider.engine.session import Session
from mrss_provider.engine.session_store import SessionStore
from mrss_provider.errors import (
    ConfigError,
    ConflictError,
    MRSSError,
    NotFoundError,
    PayloadTooLargeError,
    RequestTimeoutError,
    StateFileError,
    StorageError,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return conversation_config(tmp_path_factory.mktemp("tiny"))


def test_a_session_is_nobody_elses(config):
    async def scenario(engine):
        mine = await engine.create_session(ask(PROMPT, seed=1, owner="k1"))
        assert await engine.sessions("k1") == [mine]
        assert await engine.sessions("k2") == []
        for attempt in (
            engine.session(mine.id, "k2"),
            engine.fork_session(mine.id, "k2"),
            engine.export_session(mine.id, "k2"),
            engine.delete_session(mine.id, "k2"),
            engine.open(ask("", session=mine.id, owner="k2")),
            engine.session("../../etc/passwd", "k1"),
        ):
            with pytest.raises(NotFoundError, match="there is no session"):
                await attempt
        await engine.delete_session(mine.id, "k1")
        assert await engine.sessions("k1") == []
        return

    run(config, scenario)


def test_a_session_travels_as_bytes(config, tmp_path):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1, owner="secret-owner"))
        request = ask("", session=created.id, owner="secret-owner", seed=4, temperature=1.0)
        expected = await answer(engine, request)
        data = await engine.export_session(created.id, "secret-owner")
        assert b"secret-owner" not in data
        imported = await engine.import_session(data, "k2")
        assert (imported.owner, imported.num_tokens) == ("k2", created.num_tokens)
        moved = replace(request, session=imported.id, owner="k2")
        assert await answer(engine, moved) == expected
        return data

    data = run(config, scenario)

    async def elsewhere(engine):
        with pytest.raises(StateFileError, match="another model"):
            await engine.import_session(data, "")
        return

    run(DEMO, elsewhere)


def test_bytes_that_are_no_session_are_refused(config):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1))
        data = await engine.export_session(created.id, "")
        loaded = engine._slot.loaded
        read = Session.from_bytes(data, loaded.engine.model_config, torch.float32)
        bad = replace(read.rows[0], wkv=read.rows[0].wkv * float("nan"))
        two = (Message("user", "x"), Message("assistant", "y"), Message("user", "z"))
        told = replace(read, reinjections=(1,), messages=two)
        await engine.import_session(told.to_bytes(loaded.engine.model_config), "")
        harmed = [
            b"",
            data[:100],
            data[:-1],
            data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
            b"\xff" * 64,
            *(
                changed.to_bytes(loaded.engine.model_config)
                for changed in (
                    replace(read, rows=(bad, *read.rows[1:])),
                    replace(read, rows=read.rows[:1]),
                    replace(read, num_read=len(read.tokens)),
                    replace(read, num_read=-1),
                    replace(read, tokens=(*read.tokens[:-1], 10_000_000)),
                    replace(read, seed=1 << 70),
                    replace(read, messages=(Message("nobody", "x"),)),
                    # Of a text, of a chat without the base, and of one with fewer turns.
                    replace(read, reinjections=(1,)),
                    replace(read, reinjections=(1,), messages=two, states=("x", "y", "z")),
                    replace(read, reinjections=(1, 2), messages=two),
                )
            ),
        ]
        for bytes_ in harmed:
            with pytest.raises(StateFileError):
                await engine.import_session(bytes_, "")
        assert len(await engine.sessions("")) == 2
        return

    run(config, scenario)


def test_sessions_are_bounded_for_each_owner(config):
    async def scenario(engine):
        for owner in ("k1", "k2"):
            for _ in range(2):
                await engine.create_session(ask(PROMPT, seed=1, owner=owner))
            with pytest.raises(StorageError, match="max_sessions"):
                await engine.create_session(ask(PROMPT, seed=1, owner=owner))
        return (await engine.sessions("k1"))[0].num_bytes, await engine.export_session(
            (await engine.sessions("k1"))[0].id, "k1"
        )

    size, data = run(replace(config, max_sessions=2), scenario)

    async def small(engine):
        await engine.create_session(ask(PROMPT, seed=1))
        with pytest.raises(StorageError, match="session_bytes"):
            await engine.create_session(ask(PROMPT, seed=1))
        return

    run(replace(config, session_bytes=size * 3 // 2), small)

    async def tiny(engine):
        with pytest.raises(PayloadTooLargeError):
            await engine.create_session(ask(PROMPT, seed=1))
        with pytest.raises(PayloadTooLargeError):
            await engine.import_session(data, "")
        return

    run(replace(config, session_bytes=size // 2), tiny)


def test_a_folder_that_cannot_be_used_is_told_at_the_start(config, tmp_path):
    (tmp_path / "file").write_text("no folder")
    engine = AsyncEngine(replace(config, sessions_dir=tmp_path / "file/sessions"))
    with pytest.raises(ConfigError, match=r"sessions_dir .* cannot be used"):
        asyncio.run(engine.start())


def test_sessions_in_a_folder_outlive_the_engine(config, tmp_path):
    config = replace(config, sessions_dir=tmp_path / "sessions")
    request = ask("", seed=4, temperature=1.0, owner="k1")

    async def before(engine):
        created = await engine.create_session(ask(PROMPT, seed=1, owner="k1"))
        await answer(engine, replace(request, session=created.id, session_save=True))
        other = await engine.create_session(ask(PROMPT, seed=1, owner="k1"))
        return (
            await engine.sessions("k1"),
            await answer(engine, replace(request, session=created.id)),
            other,
        )

    infos, expected, other = run(config, before)
    folder = config.sessions_dir
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    (folder / f"{other.id}.safetensors").write_bytes(b"harmed")
    (folder / "ses_000000000000000000000000.safetensors").write_bytes(b"")

    async def after(engine):
        assert await engine.sessions("k1") == [info for info in infos if info.id != other.id]
        first = next(info for info in infos if info.id != other.id)
        assert await answer(engine, replace(request, session=first.id)) == expected
        return

    run(config, after)
    assert (folder / f"{other.id}.safetensors").exists(), "what cannot be read is left alone"


def test_only_one_answer_at_a_time_is_saved_to_a_session(config):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1))
        saving = ask("", session=created.id, save=True, seed=1, max_tokens=20)
        stream = await engine.open(saving)
        with pytest.raises(ConflictError, match="under way"):
            await engine.open(saving)
        await answer(engine, replace(saving, session_save=False))
        await stream.aclose()
        assert await engine.session(created.id, "") == created, "a dropped answer is not saved"
        for _ in range(2):
            await answer(engine, saving)
        with pytest.raises(MRSSError):
            await engine.open(replace(saving, model="nobody"))
        await answer(engine, saving)

    run(config, scenario)


async def given_up(engine, request, step, monkeypatch, leave):
    """Let `leave` happen while the thread of `request` is in `step` of the store."""
    begun, may_end = threading.Event(), threading.Event()
    whole = getattr(SessionStore, step)

    def slow(self, *args, **options):
        begun.set()
        assert may_end.wait(10)
        return whole(self, *args, **options)

    monkeypatch.setattr(SessionStore, step, slow)
    asking = asyncio.create_task(answer(engine, request))
    assert await asyncio.to_thread(begun.wait, 10)
    monkeypatch.undo()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await leave()
    may_end.set()


def test_who_gives_up_while_a_session_is_read_does_not_hold_it(config, monkeypatch):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1))
        saving = ask("", session=created.id, save=True, seed=1)

        async def leave():
            await answer(engine, saving)

        await given_up(engine, saving, "get", monkeypatch, leave)

    run(config, scenario)


def test_who_leaves_while_a_session_is_written_holds_it_until_it_is(config, monkeypatch):
    async def scenario(engine):
        created = await engine.create_session(ask(PROMPT, seed=1))
        saving = ask("", session=created.id, save=True, seed=1)

        async def leave():
            with pytest.raises(ConflictError):
                await engine.open(saving)

        await given_up(engine, saving, "put", monkeypatch, leave)
        async with asyncio.timeout(10):
            while (await engine.session(created.id, "")).num_tokens == created.num_tokens:
                await asyncio.sleep(0.01)
        await answer(engine, saving)

    run(config, scenario)


def test_a_session_is_made_within_the_time_that_its_request_has(config):
    async def scenario(engine):
        with pytest.raises(RequestTimeoutError, match="1e-06 s"):
            await engine.create_session(replace(ask(PROMPT), timeout_s=1e-6))
        assert await engine.sessions("") == []

    run(config, scenario)
