"""Another model in the place of the loaded one. Oracle: an engine that has loaded only that one."""

import asyncio
import gc
import threading
import weakref
from dataclasses import replace

import pytest
from test_async_engine_on_tiny_model import ask, texts_of
from tiny_model import write_checkpoint, write_model_folder, write_state

from mrss_provider.administration import Administers, Defaults, ModelOrder
from mrss_provider.async_engine import AsyncEngine
from mrss_provider.async_engine import admin as admin_module
from mrss_provider.async_engine.loading import load
from mrss_provider.config import EngineConfig
from mrss_provider.errors import (
    ConfigError,
    ConflictError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelFileError,
    NotFoundError,
    UnknownNameError,
)

REQUEST = ask("knowledge+tone")
LONG = ask("knowledge+tone", max_tokens=120)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swap")
    models = folder / "models"
    (folder / "states").mkdir()
    models.mkdir()
    for seed, name in enumerate(("knowledge", "tone")):
        write_state(folder / "states" / f"{name}.pth", seed=seed)
    first = write_model_folder(models / "first")
    write_model_folder(models / "second", seed=7)
    (models / "broken.pth").write_bytes(b"no model")
    (models / "away").symlink_to(folder / "states")
    (models / "away.pth").symlink_to(folder / "elsewhere.pth")
    write_checkpoint(folder / "elsewhere.pth")
    (models / "linked").mkdir()
    (models / "linked/model.pth").symlink_to(folder / "elsewhere.pth")
    return EngineConfig(
        model=first,
        states=folder / "states",
        models=models,
        device="cpu",
        dtype="fp32",
        threads=1,
        max_rows=8,
        max_context_len=200,
    )


def run(config, main, **options):
    async def with_engine():
        async with AsyncEngine(config, **options) as engine:
            return await asyncio.wait_for(main(engine), 60)

    return asyncio.run(with_engine())


@pytest.fixture(scope="module")
def texts(config):
    """The answer of each model."""
    found = {}
    for name in ("first", "second"):
        one = replace(config, model=config.models / name)
        found[name] = run(one, lambda engine: texts_of(engine, REQUEST))
    assert found["first"] != found["second"]
    return found


def test_an_engine_can_be_administered(config):
    assert isinstance(AsyncEngine(config), Administers)


def test_the_running_answer_ends_and_who_comes_meanwhile_gets_the_new_model(config, texts):
    alone = run(config, lambda engine: texts_of(engine, LONG))

    async def main(engine):
        stream = await engine.open(LONG)
        taken = asyncio.Event()
        swap = asyncio.create_task(engine.admin.load_model(ModelOrder("second"), taken.set))
        await taken.wait()
        waiting = asyncio.create_task(texts_of(engine, REQUEST))
        text = "".join([delta.text async for delta in stream])
        info = await swap
        return text, await waiting, info, await texts_of(engine, REQUEST)

    text, waited, info, after = run(config, main)
    assert [text] == alone[0]
    assert waited == after == texts["second"]
    assert info.file == "second"


def test_an_answer_goes_on_with_states_that_are_removed(config):
    alone = run(config, lambda engine: texts_of(engine, LONG))

    async def main(engine):
        stream = await engine.open(LONG)
        await engine.admin.remove_all_states()
        with pytest.raises(UnknownNameError):
            await engine.open(LONG)
        return "".join([delta.text async for delta in stream])

    assert [run(config, main)] == alone[0]


@pytest.mark.slow
def test_what_outlasts_the_drain_ends_with_a_clear_error(config, texts):
    async def main(engine):
        stream = await engine.open(LONG)
        await engine.admin.load_model(ModelOrder("second", drain_s=0))
        with pytest.raises(EngineUnavailableError, match=r"replaced before .*ask again"):
            async for _ in stream:
                pass
        return await texts_of(engine, REQUEST)

    assert run(config, main) == texts["second"]


@pytest.mark.parametrize(
    ("order", "error"),
    [
        (ModelOrder("broken.pth"), ModelFileError),
        (ModelOrder("absent.pth"), NotFoundError),
        (ModelOrder("../elsewhere.pth"), InvalidRequestError),
        pytest.param(ModelOrder("away/tone.pth"), InvalidRequestError, marks=pytest.mark.slow),
        pytest.param(ModelOrder("away.pth"), InvalidRequestError, marks=pytest.mark.slow),
        (ModelOrder("linked"), InvalidRequestError),
        (ModelOrder("second", dtype="int8"), ConfigError),
        (ModelOrder("second", quantize="fp8"), ConfigError),
        pytest.param(ModelOrder("second", template="none"), ConfigError, marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_loaded_leaves_the_model_at_work(config, order, error):
    async def main(engine):
        stream = await engine.open(LONG)
        before = engine._slot.loaded
        taken = []
        with pytest.raises(error):
            await engine.admin.load_model(order, lambda: taken.append(True))
        assert not taken
        assert engine._slot.loaded is before
        async for _ in stream:
            pass

    run(config, main)


def test_a_load_that_fails_late_brings_the_old_model_back(config, texts):
    def loader(wanted):
        if wanted.model.name == "second":
            raise ModelFileError("no memory for it")
        return load(wanted)

    async def main(engine):
        swap = asyncio.create_task(engine.admin.load_model(ModelOrder("second")))
        while engine._slot.loaded is not None:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(texts_of(engine, REQUEST))
        with pytest.raises(ModelFileError, match="no memory"):
            await swap
        return await waiting

    assert run(config, main, loader=loader) == texts["first"]


@pytest.mark.parametrize("fails", ["while it loads", "when it is loaded"])
def test_of_a_load_that_fails_late_nothing_is_left_when_the_old_model_comes_back(
    config, texts, monkeypatch, fails
):
    refs, alive = [], []

    def loader(wanted):
        if wanted.model.name != "second":
            alive.extend(ref() is not None for ref in refs)
            return load(wanted)
        loaded = load(wanted)
        refs.append(weakref.ref(loaded.engine))
        if fails == "while it loads":
            try:
                raise MemoryError
            except MemoryError as exc:
                raise ModelFileError("no memory for it") from exc
        return loaded

    def finish(order, loaded):
        raise ModelFileError("no memory for it")

    async def main(engine):
        with pytest.raises(ModelFileError, match="no memory"):
            await engine.admin.load_model(ModelOrder("second"))
        return await texts_of(engine, REQUEST)

    monkeypatch.setattr(admin_module, "_finish", finish)
    assert run(config, main, loader=loader) == texts["first"]
    assert alive == [False]


@pytest.mark.parametrize("saves", [False, True])
def test_a_reader_that_has_not_closed_its_answer_does_not_keep_the_old_model(config, texts, saves):
    refs, alive = [], []

    def loader(wanted):
        alive.extend(ref() is not None for ref in refs)
        loaded = load(wanted)
        refs.append(weakref.ref(loaded.engine))
        return loaded

    async def main(engine):
        request = LONG
        if saves:
            made = await engine.create_session(REQUEST)
            request = replace(LONG, session=made.id, session_save=True)
        stream = await engine.open(request)
        await engine.admin.load_model(ModelOrder("second", drain_s=0))
        with pytest.raises(EngineUnavailableError):
            async for _ in stream:
                pass
        await stream.aclose()

    run(config, main, loader=loader)
    assert alive == [False]


@pytest.mark.slow
def test_the_next_model_may_be_quantised_and_the_one_after_it_not(config):
    async def main(engine):
        precisions = []
        for quantize in ("int8", None, "none"):
            await engine.admin.load_model(ModelOrder("second", quantize=quantize))
            precisions.append(engine._slot.loaded.library.model_config.precision)
        return precisions

    assert run(config, main) == ["fp32+int8", "fp32", "fp32"]


@pytest.mark.slow
def test_a_removed_model_can_be_replaced(config, texts):
    async def main(engine):
        await engine.admin.remove_model(1)
        for call in (engine.open(REQUEST), engine.models(), engine.admin.states()):
            with pytest.raises(EngineUnavailableError, match="no model is loaded"):
                await call
        with pytest.raises(ModelFileError):
            await engine.admin.load_model(ModelOrder("broken.pth"))
        with pytest.raises(EngineUnavailableError, match="no model is loaded"):
            await engine.open(REQUEST)
        await engine.admin.load_model(ModelOrder("second"))
        return await texts_of(engine, REQUEST)

    assert run(config, main) == texts["second"]


@pytest.mark.slow
def test_one_change_at_a_time(config):
    async def main(engine):
        stream = await engine.open(LONG)
        swap = asyncio.create_task(engine.admin.load_model(ModelOrder("second")))
        while engine._slot.loaded is not None:
            await asyncio.sleep(0.001)
        with pytest.raises(ConflictError):
            await engine.admin.remove_model(0)
        await stream.aclose()
        await swap

    run(config, main)


@pytest.mark.slow
def test_a_change_goes_on_when_whoever_asked_has_left(config, texts):
    async def main(engine):
        swap = asyncio.create_task(engine.admin.load_model(ModelOrder("second")))
        while engine._slot.loaded is not None:
            await asyncio.sleep(0.001)
        swap.cancel()
        return await texts_of(engine, REQUEST)

    assert run(config, main) == texts["second"]


def test_closing_during_a_change_leaves_no_thread(config):
    async def main():
        engine = AsyncEngine(config)
        await engine.start()
        swap = asyncio.create_task(engine.admin.load_model(ModelOrder("second")))
        while engine._slot.loaded is not None:
            await asyncio.sleep(0.001)
        await engine.aclose()
        with pytest.raises(EngineUnavailableError):
            await swap

    asyncio.run(main())
    for thread in threading.enumerate():
        if thread.name == "mrss-engine":
            thread.join(30)
    assert not [thread for thread in threading.enumerate() if thread.name == "mrss-engine"]


def test_nothing_of_the_old_model_is_kept(config):
    async def main(engine):
        await texts_of(engine, REQUEST)
        old = weakref.ref(engine._slot.loaded.engine)
        await engine.admin.load_model(ModelOrder("second"))
        gc.collect()
        return old()

    assert run(config, main) is None


def test_an_order_says_more_than_a_path(config):
    order = ModelOrder(
        "second",
        display_name="My Model",
        stop=("\n\n",),
        defaults=Defaults(temperature=0.5),
        sampling_order="rwkv",
    )

    async def main(engine):
        info = await engine.admin.load_model(order)
        loaded = engine._slot.loaded
        mixture = loaded.library.resolve("My Model tone")
        asked = ask("My Model tone", messages=None)
        request = await engine._engine_request(asked, loaded, mixture)
        return info, loaded.template.stop, request, await engine.admin.request_ids()

    info, stop, request, ids = run(config, main)
    assert (info.display_name, stop) == ("My Model", ("\n\n",))
    assert (request.mixture.canonical, request.sampling.temperature) == ("tone", 0.5)
    assert request.sampling.sampling_order == "rwkv"
    assert ids == ["My Model", "My Model knowledge", "My Model tone"]


def test_an_order_says_nothing_of_the_next_one(config):
    order = ModelOrder("second", dtype="bf16", quantize="int8", template="g1", stop=("!",))

    async def main(engine):
        started = engine._slot.loaded.template
        await engine.admin.load_model(order)
        there = engine._slot.config
        await engine.admin.load_model(ModelOrder("first"))
        return there, engine._slot.config, started, engine._slot.loaded.template

    there, after, started, template = run(config, main)
    assert (there.dtype, there.quantize, there.template) == ("bf16", "int8", "g1")
    assert after == config
    assert (template.name, template.stop) == (started.name, started.stop)


@pytest.mark.slow
def test_a_model_may_be_replaced_while_the_first_one_loads(config, texts):
    async def main():
        async with asyncio.timeout(60):
            engine = AsyncEngine(config)
            starting = asyncio.create_task(engine.start())
            await asyncio.sleep(0)
            swap = asyncio.create_task(engine.admin.load_model(ModelOrder("second")))
            answer = await texts_of(engine, REQUEST)
            await asyncio.gather(starting, swap, return_exceptions=True)
            answer = await texts_of(engine, REQUEST)
            await engine.aclose()
            return answer

    assert asyncio.run(main()) == texts["second"]
