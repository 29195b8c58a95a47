"""Rows that are given their states anew on the way: those that a hand would make, in every way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny_model
import torch
from fake_model import VOCAB, FakeModel, fake_state, mixture, request
from hypothesis import given, settings
from hypothesis import strategies as st
from test_snapshots import Outputs, all_ids, fake_engine, ids, run

from mrss_provider.config import EngineConfig
from mrss_provider.engine.continuation import StartPoint
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.prefix_cache import PrefixCache
from mrss_provider.engine.prompt_lookup import find_longest, keys_after, shared_len
from mrss_provider.engine.radix_tree import as_ids
from mrss_provider.engine.reinjection import marks, next_stop, num_passed, stretches
from mrss_provider.engine.request import EngineRequest, ResolvedMixture
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.model import Model, load_model
from mrss_provider.model.state import StatePool, StateSnapshot
from mrss_provider.sampling_params import SamplingParams

A, B = fake_state("amber"), fake_state("blue")
WITH_BOS = fake_state("bos", bos=True)
DELTA = mixture(None, A, B, weights=[0.0, 1.0, 1.0], merge="delta", gate="novelty", cut=0.1)
SINGLE = mixture(None, A, weights=[0.0, 1.0])
SCHEDULED = mixture(None, A, B, weights=[0.0, 0.3, 0.7], gate="schedule:amber=1@0,0@20")
BOS = mixture(None, WITH_BOS, B, weights=[0.2, 0.4, 0.4])
LONG = tuple(1 + (7 * i) % (VOCAB - 2) for i in range(150))
# The last one near the end: the toy model forgets soon.
POINTS = (3, 40, 97, 148)


def by_hand(wanted: EngineRequest, stop: int = len(LONG) - 1) -> EngineRequest:
    """Return the request from where `stop` tokens of its prompt are read, row by row."""
    stop += len(wanted.prompt) - len(LONG)
    model, mixed = FakeModel(), wanted.mixture
    pool = model.new_pool(mixed.rows)
    for row, state in enumerate(mixed.states):
        pool.write(row, state)  # type: ignore[arg-type]
        if state is not None and state.metadata.bos:
            model._read(0, row, pool)
    for position, token in enumerate(wanted.prompt[:stop]):
        if position in wanted.reinjections:
            for row, state in enumerate(mixed.states):
                if state is not None:
                    pool.hidden[row] = pool.hidden[0] + state.vector  # type: ignore[attr-defined]
        for row in range(mixed.rows):
            model._read(token, row, pool)
    rows = tuple(pool.snapshot(row) for row in range(mixed.rows))
    left = tuple(point for point in wanted.reinjections if point >= stop)
    return replace(wanted, reinjections=left, start=StartPoint(rows, stop))


def asked(mixed: ResolvedMixture, points: Sequence[int] = POINTS, n: int = 1) -> EngineRequest:
    wanted = request("x", LONG, mixed, n, max_tokens=12, seed=3, logprobs=True)
    return replace(wanted, reinjections=tuple(points))


def alike(outputs: Outputs, others: Outputs) -> bool:
    """Tell whether the others have these answers, with the same log-probabilities to 1e-4."""
    pairs = [(a, b) for key in outputs for a, b in zip(outputs[key], others[key], strict=True)]
    assert all(output.logprob is not None for pair in pairs for output in pair)
    return all(
        a.token_id == b.token_id and abs((a.logprob or 0.0) - (b.logprob or 0.0)) < 1e-4
        for a, b in pairs
    )


def hand_made(wanted: EngineRequest) -> Outputs:
    return run(fake_engine(cache_bytes=0), by_hand(wanted))


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    "mixed", [DELTA, SINGLE, SCHEDULED, BOS], ids=["delta", "single", "lazy", "bos"]
)
def test_an_answer_is_that_of_rows_made_by_hand(on_device: bool, mixed: ResolvedMixture) -> None:
    wanted = asked(mixed)
    expected = hand_made(wanted)
    assert alike(run(fake_engine(on_device=on_device), wanted), expected)
    never = run(fake_engine(on_device=on_device), replace(wanted, reinjections=()))
    assert not alike(never, expected), "else this shows nothing"


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    points=st.sets(st.integers(1, len(LONG) - 2), max_size=5).map(sorted),
    chunk_len=st.integers(1, 200),
)
def test_it_does_not_matter_where_a_prompt_is_cut(points: list[int], chunk_len: int) -> None:
    wanted = asked(DELTA, points)
    assert alike(run(fake_engine(prefill_chunk_len=chunk_len), wanted), hand_made(wanted))


@pytest.mark.parametrize("stop", [POINTS[-1], POINTS[-2], POINTS[-2] + 1])
def test_rows_taken_up_at_a_point_or_before_it_are_given_their_states_there(stop: int) -> None:
    assert alike(run(fake_engine(), by_hand(asked(DELTA), stop)), hand_made(asked(DELTA)))


def test_all_answers_to_a_prompt_begin_with_the_same_rows() -> None:
    wanted = asked(DELTA, n=3)
    forked = run(fake_engine(prefill_chunk_len=20), wanted)
    whole = run(fake_engine(cache_bytes=0, prefill_chunk_len=200), wanted)
    assert len(forked) == 3
    assert alike(forked, whole)
    assert alike({"x/0": forked["x/0"]}, hand_made(asked(DELTA)))


def test_what_shares_the_batch_is_not_touched() -> None:
    other = request("y", LONG, DELTA, max_tokens=12, seed=4, logprobs=True)
    together = run(fake_engine(), asked(DELTA), other)
    assert alike(run(fake_engine(), other), together)
    assert alike(hand_made(asked(DELTA)), together)


@pytest.mark.parametrize(
    ("on_device", "mixed"), [(False, DELTA), (True, BOS)], ids=["host-delta", "device-bos"]
)
def test_turn_after_turn_is_what_a_fresh_engine_says(
    on_device: bool, mixed: ResolvedMixture
) -> None:
    engine = fake_engine(on_device=on_device)
    prompt, points, known = LONG, POINTS, 0
    for _ in range(3):
        wanted = replace(asked(mixed, points), prompt=prompt)
        got = run(engine, wanted)
        assert alike(got, hand_made(wanted))
        answer = got["x/0"]
        assert answer[0].num_cached == known, "all of the last turn but its last token"
        known = len(prompt) + len(answer) - 1
        points = (*points, len(prompt) + len(answer))
        prompt = (*prompt, *ids(answer), 3, 1)
    assert engine.num_free_rows == 24


def test_no_other_request_gets_the_rows_and_those_before_the_first_point_are_shared() -> None:
    engine = fake_engine()
    late = asked(DELTA, [148])
    plain = replace(late, reinjections=())
    cached = []
    for wanted in (plain, late, plain, asked(DELTA, [130, 148]), asked(DELTA), late, plain):
        got = run(engine, wanted)
        assert alike(got, hand_made(wanted))
        cached.append(got["x/0"][0].num_cached)
    assert cached == [0, 128, 148, 128, 0, 148, 148]


def test_another_rule_or_weight_keeps_the_hit() -> None:
    engine = fake_engine()
    run(engine, asked(DELTA))
    other = mixture(None, A, weights=[0.9, 0.1], merge="geometric")
    got = run(engine, asked(other))
    assert got["x/0"][0].num_cached == 148, "the end of the chunk before the last one"
    assert alike(got, hand_made(asked(other)))


def test_an_answer_whose_states_were_lost_reads_them_again_in_the_same_way() -> None:
    expected = all_ids(run(fake_engine(), asked(DELTA)))["x/0"]
    model = FakeModel()
    engine = fake_engine(model=model, prefill_chunk_len=32)
    engine.add(asked(DELTA))
    engine.add(request("newer", LONG, DELTA, max_tokens=99))
    outputs = []
    while len(outputs) < 5:
        outputs += [output for output in engine.step() if output.request_id == "x"]
    model.fail = torch.OutOfMemoryError("no memory")
    while engine.has_work:
        outputs += [output for output in engine.step() if output.request_id == "x"]
    assert ids(outputs) == expected


def test_positions_count_when_the_token_there_is_read() -> None:
    assert [num_passed((3, 40), length) for length in (3, 4, 40, 41)] == [0, 1, 1, 2]
    assert [next_stop((3, 40), read, 50) for read in (0, 3, 39, 40)] == [3, 40, 40, 50]
    assert [next_stop((3, 40), read, 20) for read in (0, 3)] == [3, 20]
    assert list(stretches((3, 40), 60)) == [(40, 60), (3, 40), (0, 3)]
    assert list(stretches((3, 40), 40)) == [(3, 40), (0, 3)]
    assert list(stretches((), 7)) == [(0, 7)]


def test_marks_are_the_same_for_the_same_positions_alone() -> None:
    one, other = marks((3, 40, 41)), marks((3, 40, 42))
    assert one[0] == ""
    assert one[:3] == other[:3]
    assert len({*one, *other, *marks((34, 0)), *marks((3, 4, 0))}) == 5 + 2 + 2


def test_a_chat_of_thousands_of_turns_is_looked_up_at_once() -> None:
    """Where looking took the square of the turns, these took half a minute of everybody's."""
    turns = range(8, 104_000, 8)
    long = replace(request("x", [3] * 104_000, DELTA), reinjections=tuple(turns))
    read = as_ids(long.prompt)
    cache = PrefixCache(torch.device("cpu"), ram_bytes=1 << 30)
    zeros = torch.zeros(1, 4)
    cache.insert("base", read, StateSnapshot(torch.zeros(1, 1, 4, 4), zeros, zeros))
    started = time.perf_counter()
    keys, stop = find_longest(cache, long, len(read) - 1)
    assert shared_len(cache, long, len(read) - 1) == 0
    assert time.perf_counter() - started < 5
    assert (keys, stop) == (keys_after(long, 8), 8)


# A real model.


@dataclass(frozen=True)
class Tiny:
    model: Model
    library: StateLibrary

    def engine(self, **config: object) -> Engine:
        values = {"max_rows": 8, "prefill_chunk_len": 32, "lazy_rows": "off"} | config
        config_ = EngineConfig(**values)  # type: ignore[arg-type]
        return Engine(self.model, self.library, config_, allowed_ids=range(300))

    def request(self, name: str, **sampling: object) -> EngineRequest:
        values = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 6, "seed": 7}
        values |= {"ignore_eos": True, "sampling_order": "openai", "logprobs": True} | sampling
        params = SamplingParams(top_logprobs=20, **values)  # type: ignore[arg-type]
        mixed = self.library.resolve(name)
        return EngineRequest("x", PROMPT, mixed, params, reinjections=POINTS)

    def by_hand(self, wanted: EngineRequest) -> EngineRequest:
        """Return the request with its rows made by the model alone, piece by piece."""
        states = wanted.mixture.states
        pool = self.model.new_pool(len(states))
        for row, state in enumerate(states):
            pool.write(row, state)
        bounds = (0, *POINTS, len(PROMPT) - 1)
        for start, stop in itertools.pairwise(bounds):
            for row, state in enumerate(states):
                if start and state is not None:
                    pool.wkv[:, row] = pool.wkv[:, 0] + state.wkv
            for row in range(len(states)):
                piece = torch.tensor(PROMPT[start:stop])
                self.model.prefill(piece, [0, stop - start], torch.tensor([row]), pool)
        rows = tuple(pool.snapshot(row) for row in range(len(states)))
        return replace(wanted, reinjections=(), start=StartPoint(rows, len(PROMPT) - 1))


PROMPT = tuple(5 + (7 * i) % 280 for i in range(150))


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


@pytest.mark.parametrize("name", ["a+b", "base+offset~linear~fixed"])
def test_a_real_models_answer_is_that_of_rows_made_by_hand(tiny: Tiny, name: str) -> None:
    wanted = tiny.request(name)
    engine = tiny.engine()
    expected = run(tiny.engine(), tiny.by_hand(wanted))["x/0"]
    fresh = run(engine, wanted)["x/0"]
    hit = run(engine, wanted)["x/0"]
    assert (fresh[0].num_cached, hit[0].num_cached) == (0, 148)
    assert ids(fresh) == ids(hit) == ids(expected)
    first = [torch.tensor([v for _, v in got[0].top]) for got in (expected, fresh, hit)]
    for values in first[1:]:
        assert (values - first[0]).norm() <= 1e-5 * first[0].norm()


def test_files_serve_the_next_engine(tiny: Tiny, tmp_path: Path) -> None:
    wanted = tiny.request("a+b")
    engine = tiny.engine(cache_dir=tmp_path)
    expected = ids(run(engine, wanted)["x/0"])
    engine.close()
    again = tiny.engine(cache_dir=tmp_path)
    again._keeper.cache.wait_for_files()
    again.load_cached(wanted)
    got = run(again, wanted)["x/0"]
    assert got[0].num_cached == 148
    assert ids(got) == expected
    again.close()


def test_a_state_is_given_for_what_it_has_beyond_the_models_own(tiny: Tiny) -> None:
    state = tiny.library.get("a")
    zeros = torch.zeros(tiny.model.config.num_layers, tiny.model.config.hidden_size)
    base = StateSnapshot(torch.full_like(state.wkv, 0.25), zeros, zeros)
    cpu = torch.device("cpu")
    pool = StatePool(tiny.model.config, 3, device=cpu, base=base)
    pool.shift_att[:, 1] = 5.0
    pool.reinject(1, 0, state)
    torch.testing.assert_close(pool.wkv[:, 1], state.wkv)
    assert bool((pool.shift_att[:, 1] == 5.0).all())
    assert bool((pool.wkv[:, [0, 2]] == 0.25).all())
