"""The state cache on a CUDA device: tiers of memory, flags in time, and the same answers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mrss_provider.config import BUNDLED_STATES, DEMO_MODEL, EngineConfig
from mrss_provider.engine.continuation import Capture, StartPoint
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.prefix_cache import PrefixCache
from mrss_provider.engine.radix_tree import as_ids
from mrss_provider.engine.request import EngineRequest, TokenOutput, resolve_sampling
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.model import Model, StateSnapshot, load_model
from mrss_provider.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu

CONFIG = EngineConfig(max_rows=16, prefill_chunk_len=64, prefill_alone_len=64, prepare_rows=0)
ROW_BYTES = 4 * (1024 + 32 + 32)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(DEMO_MODEL, device="cuda", dtype="fp16")


@pytest.fixture(scope="module")
def library(model: Model) -> StateLibrary:
    return StateLibrary(BUNDLED_STATES, model.config, model_name="demo")


def make_engine(model: Model, library: StateLibrary, **config: object) -> Engine:
    allowed = range(model.config.vocab_size)
    return Engine(model, library, replace(CONFIG, **config), allowed_ids=allowed)  # type: ignore[arg-type]


def prompt_of(length: int, seed: int = 1) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(1, 1000) for _ in range(length))


def ask(
    library: StateLibrary, mixture: str, prompt: tuple[int, ...], **sampling: object
) -> EngineRequest:
    values = {"max_tokens": 24, "ignore_eos": True, "top_p": 1.0, "temperature": 0.0, "seed": 1}
    params = SamplingParams(**(values | sampling))  # type: ignore[arg-type]
    resolved = library.resolve(mixture)
    return EngineRequest("x", prompt, resolved, resolve_sampling(params, resolved))


def run(engine: Engine, wanted: EngineRequest) -> list[TokenOutput]:
    engine.add(wanted)
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs += engine.step()
    assert all(output.error is None for output in outputs)
    assert engine.num_free_rows == CONFIG.max_rows
    torch.cuda.synchronize()
    return outputs


def ids(outputs: list[TokenOutput]) -> list[int | None]:
    return [output.token_id for output in outputs]


def row(value: float) -> StateSnapshot:
    parts = [torch.full(shape, value, device="cuda") for shape in ((1, 1, 32, 32), (1, 32))]
    return StateSnapshot(parts[0], parts[1], parts[1].clone())


def test_rows_move_from_the_device_to_ram_and_back() -> None:
    size = ROW_BYTES + 4
    cache = PrefixCache(torch.device("cuda"), ram_bytes=3 * size, device_bytes=2 * size)
    for i in range(5):
        cache.insert("base", as_ids([i]), row(float(i)))
    stats = cache.stats()
    assert (stats.num_entries, stats.device_bytes, stats.ram_bytes) == (5, 2 * size, 3 * size)
    gone = []
    for i in (0, 4, 1, 2, 3, 0):
        restored = cache.restore(["base"], as_ids([i]), 1)
        assert cache.stats().device_bytes <= 2 * size
        assert cache.stats().ram_bytes <= 3 * size
        if restored is None:
            gone.append(i)
            continue
        (found,) = restored.rows
        assert found.wkv.is_cuda
        assert float(found.wkv.min()) == float(found.shift_ffn.max()) == i
    # What came back to the device stays in RAM, so others had to go, those used longest ago.
    assert gone == [1, 0]
    cache.shed()
    assert cache.stats().device_bytes == 0


@pytest.mark.parametrize("tiers", ["device", "ram"])
@pytest.mark.parametrize("mixture", ["base", "knowledge+tone", "knowledge+tone~linear~fixed"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_hits_say_what_a_fresh_prefill_says(
    model: Model, library: StateLibrary, tiers: str, mixture: str, temperature: float
) -> None:
    engine = make_engine(model, library, cache_device_bytes=None if tiers == "device" else 0)
    wanted = ask(library, mixture, prompt_of(300), temperature=temperature)
    fresh = run(engine, wanted)
    hit = run(engine, wanted)
    assert (fresh[0].num_cached, hit[0].num_cached) == (0, 256)
    assert ids(hit) == ids(fresh)
    stats = engine.stats().cache
    assert stats is not None
    assert (stats.device_bytes > 0) == (tiers == "device")


def test_an_answer_is_found_by_the_next_turn(model: Model, library: StateLibrary) -> None:
    engine = make_engine(model, library)
    prompt = prompt_of(200)
    answer = run(engine, ask(library, "knowledge+tone", prompt, max_tokens=40))
    following = (*prompt, *(token or 0 for token in ids(answer)), *prompt_of(30, seed=2))
    got = run(engine, ask(library, "knowledge+tone", following))
    assert got[0].num_cached >= len(prompt) + 39


@pytest.mark.parametrize("from_host", [False, True], ids=["device", "host"])
def test_an_answer_goes_on_bit_for_bit(
    model: Model, library: StateLibrary, from_host: bool
) -> None:
    whole = ask(library, "knowledge+tone", prompt_of(100), max_tokens=40, temperature=1.0)
    engine = make_engine(model, library, cache_bytes=0, cache_device_bytes=0)
    expected = ids(run(engine, whole))
    capture = Capture()
    first = replace(whole, sampling=replace(whole.sampling, max_tokens=15), capture=capture)
    begun = ids(run(engine, first))
    assert begun == expected[:15]
    state = capture.states[-1]
    assert state.num_read == 14
    rows = state.rows
    if from_host:
        rows = engine.at_hand([row.to_host() for row in rows])
        assert all(row.wkv.is_pinned() for row in rows)
    start = StartPoint(rows, 100, tuple(token or 0 for token in begun), capture.evidence)
    assert ids(run(engine, replace(whole, start=start))) == expected[15:]


def test_rows_that_are_not_finite_are_not_kept(model: Model, library: StateLibrary) -> None:
    engine = make_engine(model, library)
    keeper, pool = engine._keeper, engine._runner.pool
    wanted = ask(library, "base", prompt_of(64), max_tokens=1)
    run(engine, wanted)
    before = keeper.cache.stats().num_entries
    pool.wkv[:, 0].fill_(torch.nan)
    total, arrived = keeper._total([pool.snapshot(0)])
    assert arrived is not None
    arrived.synchronize()
    assert not total.isfinite()
    assert keeper.cache.stats().num_entries == before


def test_files_serve_the_next_engine(model: Model, library: StateLibrary, tmp_path: Path) -> None:
    wanted = ask(library, "knowledge+tone", prompt_of(300))
    engine = make_engine(model, library, cache_dir=tmp_path)
    expected = ids(run(engine, wanted))
    engine.close()
    again = make_engine(model, library, cache_dir=tmp_path)
    again._keeper.cache.wait_for_files()
    again.load_cached(wanted)
    got = run(again, wanted)
    assert (got[0].num_cached, ids(got)) == (256, expected)
    again.close()


def same_bits(one: StateSnapshot, other: StateSnapshot) -> bool:
    parts = ("wkv", "shift_att", "shift_ffn")
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)


def copied(snapshot: StateSnapshot) -> StateSnapshot:
    return StateSnapshot(
        snapshot.wkv.clone(), snapshot.shift_att.clone(), snapshot.shift_ffn.clone()
    )


def small_tiers(model: Model, device_rows: int, ram_rows: int) -> dict[str, int]:
    """Settings with room for so many states of short prompts, and little more."""
    row_bytes = model.new_pool(1).snapshot(0).num_bytes
    # Blocks of pinned memory are powers of two.
    return {
        "cache_device_bytes": int((device_rows + 0.5) * row_bytes),
        "cache_bytes": int((ram_rows + 0.5) * 2 * row_bytes),
    }


def test_states_come_back_from_ram_bit_for_bit_while_others_decode(
    model: Model, library: StateLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, library, **small_tiers(model, 4, 200))
    cache = engine._keeper.cache
    # Of two that read the same prompt at a time, either may be what is kept.
    kept: dict[tuple[str, bytes], list[StateSnapshot]] = {}
    insert = PrefixCache.insert

    def watched(self: PrefixCache, key: str, tokens: object, snapshot: StateSnapshot) -> None:
        kept.setdefault((key, as_ids(tokens).tobytes()), []).append(copied(snapshot))  # type: ignore[arg-type]
        insert(self, key, tokens, snapshot)  # type: ignore[arg-type]

    monkeypatch.setattr(PrefixCache, "insert", watched)
    for number in range(4):
        whole = ask(library, "base", prompt_of(40, seed=number), max_tokens=400)
        engine.add(replace(whole, id=f"long{number}"))
    num_added, draw = 0, random.Random(5)
    running: set[str] = set()
    while engine.has_work:
        while num_added < 40 and len(running) < 2:
            # Every third one begins with a prompt that was read before, perhaps from RAM.
            seed = (
                draw.randrange(100, 100 + max(1, num_added)) if num_added % 3 else 100 + num_added
            )
            short = ask(library, "knowledge+tone", prompt_of(100, seed=seed), max_tokens=5)
            engine.add(replace(short, id=f"short{num_added}"))
            running.add(f"short{num_added}")
            num_added += 1
        for output in engine.step():
            assert output.error is None
            if output.finish_reason is not None:
                running.discard(output.request_id)
    torch.cuda.synchronize()
    engine._keeper.settle()
    stats = cache.stats()
    assert stats.hits > 0
    assert stats.ram_bytes > 10 * stats.device_bytes / 4, "most have left the device"
    found = 0
    for (key, tokens), expected in kept.items():
        ids_ = as_ids(list(memoryview(tokens).cast("i")))
        restored = cache.restore([key], ids_, len(ids_))
        if restored is not None and restored.length == len(ids_):
            found += 1
            assert any(same_bits(restored.rows[0], one) for one in expected)
            assert cache.stats().device_bytes <= engine._config.cache_device_bytes  # type: ignore[operator]
    assert found == len(kept)


def test_what_leaves_the_device_is_not_overwritten_before_it_has_been_copied() -> None:
    size = 4 * (2048 * 2048 + 2 * 2048)
    cache = PrefixCache(torch.device("cuda"), ram_bytes=40 * 2 * size, device_bytes=size + 64)

    def large(value: float) -> StateSnapshot:
        shape, shift = (1, 1, 2048, 2048), (1, 2048)
        parts = [torch.full(shape, value, device="cuda"), torch.full(shift, value, device="cuda")]
        return StateSnapshot(parts[0], parts[1], parts[1].clone())

    for i in range(20):
        # Its memory is that of one which has just been dropped, if that is free already.
        cache.insert("base", as_ids([i]), large(float(i)))
    for i in range(20):
        restored = cache.restore(["base"], as_ids([i]), 1)
        assert restored is not None
        (found,) = restored.rows
        for part in (found.wkv, found.shift_att, found.shift_ffn):
            assert float(part.min()) == float(part.max()) == i


def test_no_pinned_memory_is_taken_while_states_leave_and_all_of_it_is_given_back(
    model: Model, library: StateLibrary
) -> None:
    def num_pinned() -> int:
        return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])

    engine = make_engine(model, library, **small_tiers(model, 2, 10))
    run(engine, ask(library, "base", prompt_of(40), max_tokens=4))
    before = num_pinned()
    for seed in range(20):
        run(engine, ask(library, "base", prompt_of(40, seed=seed), max_tokens=4))
    stats = engine.stats().cache
    assert stats is not None
    assert stats.ram_bytes > 0
    # What is received and summed is a few bytes each.
    assert num_pinned() - before < 1 << 16
    row_bytes = model.new_pool(1).snapshot(0).num_bytes
    engine.close()
    assert num_pinned() < before - 9 * row_bytes
