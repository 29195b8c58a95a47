"""Answers that begin in the state cache are those of a fresh engine; nothing wrong is ever kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny_model
import torch
from fake_model import VOCAB, FakeModel, fake_state, mixture, request
from mrss_kernels import reference_tail
from torch import Tensor

from mrss_provider.config import EngineConfig
from mrss_provider.engine.continuation import Capture, StartPoint
from mrss_provider.engine.device_runner import DeviceRunner
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.request import EngineRequest, ResolvedMixture, TokenOutput
from mrss_provider.engine.snapshots import MIN_KEPT_LEN
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.model import Model, TunedState, load_model
from mrss_provider.sampling_params import SamplingParams

A, B, C = (fake_state(name) for name in ("amber", "blue", "cyan"))
WITH_BOS = fake_state("bos", bos=True)
LINEAR = mixture(A, B, weights=[0.3, 0.7])
SCHEDULED = mixture(A, B, weights=[0.3, 0.7], gate="schedule:amber=1@0,0@20")
DELTA = mixture(None, A, B, C, weights=[0, 1, 1, 0.5], merge="delta", gate="novelty", cut=0.1)
LONG = tuple(1 + (7 * i) % (VOCAB - 2) for i in range(150))

Outputs = dict[str, list[TokenOutput]]


def plain_tail(logits: Tensor, inputs: object, outputs: object, **_: object) -> None:
    reference_tail.tail(logits, inputs, outputs)  # type: ignore[arg-type]


def fake_engine(
    *, on_device: bool = False, model: FakeModel | None = None, **config: int
) -> Engine:
    model = model or FakeModel()
    values = {"max_rows": 24, "prefill_chunk_len": 32, "max_context_len": 999} | config
    values |= {"prefill_alone_len": values["prefill_chunk_len"]}
    config_ = EngineConfig(**values)  # type: ignore[arg-type]
    banned = torch.tensor([VOCAB - 1])
    runner = DeviceRunner(model, config_, banned, tail=plain_tail) if on_device else None  # type: ignore[arg-type]
    return Engine(model, None, config_, allowed_ids=range(VOCAB - 1), runner=runner)  # type: ignore[arg-type]


def run(engine: Engine, *wanted: EngineRequest) -> Outputs:
    for new in wanted:
        engine.add(new)
    outputs: Outputs = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(f"{output.request_id}/{output.index}", []).append(output)
    return outputs


def ids(outputs: list[TokenOutput]) -> list[int]:
    assert all(output.error is None for output in outputs)
    return [output.token_id or 0 for output in outputs]


def all_ids(outputs: Outputs) -> dict[str, list[int]]:
    return {key: ids(value) for key, value in outputs.items()}


# A toy model, whose rows are the same bits however a prompt is cut: no answer may differ at all.


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    "mixed",
    [mixture(None), LINEAR, SCHEDULED, DELTA, mixture(WITH_BOS, C, weights=[0.5, 0.5])],
    ids=["base", "linear", "schedule", "delta", "bos"],
)
def test_turn_after_turn_is_what_a_fresh_engine_says(
    on_device: bool, mixed: ResolvedMixture
) -> None:
    engine = fake_engine(on_device=on_device)
    prompt, known = LONG, 0
    for turn in range(3):
        wanted = request("x", prompt, mixed, max_tokens=40, temperature=1.0, seed=turn)
        got = run(engine, wanted)["x/0"]
        assert ids(got) == all_ids(run(fake_engine(cache_bytes=0), wanted))["x/0"]
        assert got[0].num_cached == known, "all of the last turn but its last token"
        answer = ids(got)
        known = len(prompt) + len(answer) - 1
        if mixed is SCHEDULED:
            # Rows slept: the prompt's end is the newest that all rows have read.
            known = len(prompt)
        prompt = (*prompt, *answer, 3, 1, 4)
    assert engine.num_free_rows == 24


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_the_same_prompt_begins_at_a_block_near_its_end(on_device: bool) -> None:
    engine = fake_engine(on_device=on_device)
    first = request("x", LONG, DELTA, 3, max_tokens=5, temperature=1.0, seed=1)
    expected = all_ids(run(engine, first))
    again = run(engine, first)
    assert all_ids(again) == expected
    assert {output.num_cached for outputs in again.values() for output in outputs} == {128}


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_what_prompts_have_in_common_is_read_twice_and_not_again(on_device: bool) -> None:
    engine = fake_engine(on_device=on_device, prefill_chunk_len=512)
    cached = []
    for last in range(4):
        wanted = request("x", (*LONG[:140], *range(last + 1, last + 30)), DELTA, max_tokens=9)
        got = run(engine, wanted)["x/0"]
        assert ids(got) == all_ids(run(fake_engine(cache_bytes=0), wanted))["x/0"]
        cached.append(got[0].num_cached)
    assert cached == [0, 0, 128, 128]


def test_mixtures_share_the_rows_of_single_states() -> None:
    engine = fake_engine()
    for name, mixed in (("a", mixture(A)), ("b", mixture(B))):
        run(engine, request(name, LONG, mixed, max_tokens=2))
    got = run(engine, request("x", LONG, LINEAR, max_tokens=9))["x/0"]
    assert got[0].num_cached == 128
    assert ids(got) == all_ids(run(fake_engine(), request("x", LONG, LINEAR, max_tokens=9)))["x/0"]
    assert run(engine, request("y", LONG, DELTA))["y/0"][0].num_cached == 0, "cyan has read nothing"


def test_another_gate_rule_or_weight_keeps_the_hit() -> None:
    engine = fake_engine()
    run(engine, request("x", LONG, LINEAR, max_tokens=2))
    for other in (
        mixture(A, B, weights=[0.9, 0.1], merge="geometric"),
        mixture(A, B, weights=[0.5, 0.5], gate="confidence:1"),
    ):
        assert run(engine, request("x", LONG, other, max_tokens=2))["x/0"][0].num_cached == 128


def test_a_row_with_a_token_of_its_own_is_another_one_than_without() -> None:
    engine = fake_engine()
    mixed = mixture(WITH_BOS)
    run(engine, request("x", LONG, mixed, max_tokens=2))
    begun = request("y", (0, *LONG), mixed, max_tokens=2)
    assert run(engine, begun)["y/0"][0].num_cached == 0
    assert run(engine, begun)["y/0"][0].num_cached == 128


def test_evidence_is_always_read() -> None:
    gate = "posterior"
    mixed = mixture(A, B, weights=[0.5, 0.5], gate=gate)
    engine = fake_engine()
    plain = request("x", LONG, mixed, max_tokens=12, temperature=1.0)
    wanted = replace(plain, evidence=(range(70, 75), range(120, 140)))
    fresh = all_ids(run(fake_engine(), wanted))["x/0"]
    assert ids(run(engine, wanted)["x/0"]) == fresh
    for _ in range(2):
        got = run(engine, wanted)["x/0"]
        assert ids(got) == fresh
        assert got[0].num_cached <= 69
    from_the_start = replace(plain, evidence=(range(3),))
    assert run(engine, from_the_start)["x/0"][0].num_cached == 0


def test_short_requests_and_those_without_a_cache_are_not_kept() -> None:
    engine = fake_engine()
    run(engine, request("x", LONG[: MIN_KEPT_LEN - 9], LINEAR, max_tokens=8))
    assert engine._keeper.cache.stats().num_entries == 0
    off = fake_engine(cache_bytes=0)
    run(off, request("x", LONG, LINEAR, max_tokens=80))
    assert off._keeper.cache.stats().num_entries == 0


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_nothing_is_kept_of_rows_that_became_nan(on_device: bool) -> None:
    model = FakeModel()
    model.poison = LONG[100]
    prompt = tuple(token for token in LONG[:100] if token != model.poison) + LONG[100:]
    engine = fake_engine(on_device=on_device, model=model)
    (output,) = run(engine, request("x", prompt, LINEAR))["x/0"]
    assert output.error is not None
    model.poison = None
    got = run(engine, request("y", prompt, LINEAR))["y/0"]
    assert got[0].num_cached < prompt.index(LONG[100])
    assert ids(got) == all_ids(run(fake_engine(), request("y", prompt, LINEAR)))["y/0"]


@pytest.mark.parametrize("lacking", ["snapshot", "its sum"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        # Of pinned memory, and of a CPU's.
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["device", "pinned", "host"],
)
def test_no_memory_for_a_snapshot_or_its_sum_ends_no_request(
    monkeypatch: pytest.MonkeyPatch, lacking: str, error: RuntimeError
) -> None:
    wanted = request("x", LONG, LINEAR, max_tokens=40)
    expected = all_ids(run(fake_engine(), wanted))
    engine = fake_engine()

    def lack(_: object) -> None:
        raise error

    if lacking == "snapshot":
        monkeypatch.setattr(engine._runner.pool, "snapshot", lack)
    else:
        monkeypatch.setattr(engine._keeper, "_total", lack)
    assert all_ids(run(engine, wanted)) == expected
    assert engine._keeper.cache.stats().num_entries == 0


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_an_answer_that_is_dropped_at_a_pause_is_found_up_to_there(on_device: bool) -> None:
    engine = fake_engine(on_device=on_device)
    wanted = request("x", LONG, LINEAR, max_tokens=60, temperature=1.0)
    expected = all_ids(run(fake_engine(cache_bytes=0), wanted))["x/0"]
    at = 11
    pause = expected[at]
    engine.add(replace(wanted, pauses=frozenset({pause})))
    seen = 0
    while seen < at + 4:
        seen += len(engine.step())
    engine.abort("x")
    while engine.has_work:
        engine.step()
    assert engine.num_free_rows == 24
    following = (*LONG, *expected[: at + 1], 38, 37, 36, 35)
    got = run(engine, request("y", following, LINEAR))["y/0"]
    assert len(LONG) + at <= got[0].num_cached <= len(LONG) + at + 1
    fresh = run(fake_engine(cache_bytes=0), request("y", following, LINEAR))["y/0"]
    assert ids(got) == ids(fresh)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_requests_dropped_at_any_moment_leave_the_others_as_they_are(on_device: bool) -> None:
    engine = fake_engine(on_device=on_device, max_rows=4)
    wanted = request("x", LONG, LINEAR, max_tokens=20, temperature=1.0)
    expected = all_ids(run(fake_engine(cache_bytes=0), wanted))["x/0"]
    for steps in range(12):
        engine.add(replace(wanted, id="dropped", n=2))
        for _ in range(steps):
            engine.step()
        engine.abort("dropped")
        assert all_ids(run(engine, wanted))["x/0"] == expected
        assert engine.num_free_rows == 4


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("mixed", [LINEAR, SCHEDULED, DELTA], ids=["linear", "schedule", "delta"])
def test_an_answer_taken_up_again_goes_on_as_if_nobody_had_stopped(
    on_device: bool, mixed: ResolvedMixture
) -> None:
    sampling = {"temperature": 1.0, "top_k": 9, "presence_penalty": 0.7, "penalty_decay": 0.9}
    whole = request("x", LONG, mixed, max_tokens=40, seed=3, **sampling)
    expected = all_ids(run(fake_engine(on_device=on_device, lazy_rows="off"), whole))["x/0"]  # type: ignore[arg-type]
    engine = fake_engine(on_device=on_device, lazy_rows="off")  # type: ignore[arg-type]
    capture = Capture()
    first = replace(whole, sampling=replace(whole.sampling, max_tokens=15), capture=capture)
    assert all_ids(run(engine, first))["x/0"] == expected[:15]
    assert capture.ended.done()
    state = capture.states[-1]
    assert state.num_read == 14
    start = StartPoint(state.rows, len(LONG), tuple(expected[:15]), capture.evidence)
    got = run(engine, replace(whole, start=start))["x/0"]
    assert ids(got) == expected[15:]
    assert engine.num_free_rows == 24


# A real model.


@dataclass(frozen=True)
class Tiny:
    model: Model
    library: StateLibrary

    def engine(self, **config: object) -> Engine:
        values = {"max_rows": 24, "prefill_chunk_len": 32, "lazy_rows": "off"} | config
        config_ = EngineConfig(**values)  # type: ignore[arg-type]
        return Engine(self.model, self.library, config_, allowed_ids=range(300))

    def request(self, name: str, prompt: tuple[int, ...], **sampling: object) -> EngineRequest:
        values = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 10, "seed": 7}
        values |= {"ignore_eos": True, "sampling_order": "openai", "logprobs": True} | sampling
        params = SamplingParams(top_logprobs=20, **values)  # type: ignore[arg-type]
        return EngineRequest("x", prompt, self.library.resolve(name), params)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(7, id="rwkv7"),
        pytest.param(6, id="rwkv6", marks=pytest.mark.slow),
    ],
)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    path = tiny_model.write_checkpoint(folder / "tiny.pth", request.param)
    model = load_model(path, device="cpu", dtype="fp32", threads=1)
    states = folder / "states"
    states.mkdir()
    for seed, name in enumerate("ab"):
        tiny_model.write_state(states / f"{name}.pth", seed=seed)
    tiny_model.write_state(states / "offset.pth", seed=9, offset=True)
    return Tiny(model, StateLibrary(states, model.config))


PROMPT = tuple(5 + (7 * i) % 280 for i in range(150))


def told(outputs: list[TokenOutput]) -> list[tuple[object, ...]]:
    return [(output.token_id, output.logprob, output.top) for output in outputs]


@pytest.mark.parametrize("name", ["base", "a+b", "offset", "a+offset~linear"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_hit_at_a_whole_block_is_the_fresh_prefill_bit_for_bit(
    tiny: Tiny, name: str, temperature: float
) -> None:
    wanted = tiny.request(name, PROMPT, temperature=temperature)
    engine = tiny.engine()
    fresh = run(engine, wanted)["x/0"]
    hit = run(engine, wanted)["x/0"]
    assert (fresh[0].num_cached, hit[0].num_cached) == (0, 128)
    assert told(hit) == told(fresh)


@pytest.mark.parametrize("name", ["base", "a+b", "offset"])
def test_a_hit_after_an_answer_is_within_1e_5_of_the_fresh_prefill(tiny: Tiny, name: str) -> None:
    engine = tiny.engine()
    answer = ids(run(engine, tiny.request(name, PROMPT, max_tokens=43))["x/0"])
    following = (*PROMPT, *answer, *PROMPT[:9])
    wanted = tiny.request(name, following, temperature=0.0)
    hit = run(engine, wanted)["x/0"]
    fresh = run(tiny.engine(), wanted)["x/0"]
    assert hit[0].num_cached == len(PROMPT) + 42
    assert ids(hit) == ids(fresh)
    values = [torch.tensor([v for _, v in outputs[0].top]) for outputs in (hit, fresh)]
    assert (values[0] - values[1]).norm() <= 1e-5 * values[1].norm()


def test_states_on_disk_serve_the_next_engine(tiny: Tiny, tmp_path: Path) -> None:
    engine = tiny.engine(cache_dir=tmp_path)
    wanted = tiny.request("a+b", PROMPT)
    expected = told(run(engine, wanted)["x/0"])
    engine.close()
    again = tiny.engine(cache_dir=tmp_path)
    again._keeper.cache.wait_for_files()
    again.load_cached(wanted)
    got = run(again, wanted)["x/0"]
    assert got[0].num_cached == 128
    assert told(got) == expected
    again.close()


def test_states_on_disk_serve_no_other_model_that_shares_a_weight(
    tiny: Tiny, tmp_path: Path
) -> None:
    """A checkpoint trained further, from which the first layer's key weight was left out."""
    engine = tiny.engine(cache_dir=tmp_path)
    wanted = tiny.request("base", PROMPT)
    run(engine, wanted)
    engine.close()
    tensors = tiny_model.checkpoint(tiny.model.config.version)
    tensors["blocks.1.ffn.value.weight"] *= 1.01
    torch.save(tensors, tmp_path / "further.pth")
    model = load_model(tmp_path / "further.pth", device="cpu", dtype="fp32", threads=1)
    assert model.config.fingerprint == tiny.model.config.fingerprint
    other = replace(tiny, model=model).engine(cache_dir=tmp_path)
    other._keeper.cache.wait_for_files()
    other.load_cached(wanted)
    assert run(other, wanted)["x/0"][0].num_cached == 0
    other.close()


def test_the_memory_of_the_cache_is_bounded_whatever_comes(tiny: Tiny) -> None:
    row = tiny.model.new_pool(1).snapshot(0).num_bytes
    engine = tiny.engine(cache_bytes=9 * row)
    for first in range(5):
        run(engine, tiny.request("a+b", (first + 1, *PROMPT), max_tokens=40))
        assert 0 < engine._keeper.cache.stats().ram_bytes <= 9 * row


def test_a_state_of_other_content_is_another_one_whatever_its_name(tiny: Tiny) -> None:
    engine = tiny.engine()
    wanted = tiny.request("a", PROMPT)
    run(engine, wanted)
    (state,) = wanted.mixture.states
    assert isinstance(state, TunedState)
    renamed = replace(wanted, mixture=replace(wanted.mixture, states=(replace(state, name="z"),)))
    assert run(engine, renamed)["x/0"][0].num_cached == 128
    changed = replace(state, wkv=state.wkv + 1)
    other = replace(wanted, mixture=replace(wanted.mixture, states=(changed,)))
    assert run(engine, other)["x/0"][0].num_cached == 0
