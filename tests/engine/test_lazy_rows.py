"""Rows that sleep change nothing that is sampled, cost nothing, and never keep a slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
import torch
from fake_model import FakeModel, mixture, request
from fake_runs import BANNED, MAX_ROWS, A, B, C, D, Outputs, ids, make_engine, run
from hypothesis import given, settings
from hypothesis import strategies as st

from mrss_provider.config import EngineConfig
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.gates import gate_of
from mrss_provider.engine.lazy_rows import LazyPolicy, make_lazy_rows, needed_rows, only
from mrss_provider.engine.merges import Rows, make_merge
from mrss_provider.engine.philox import uniform
from mrss_provider.engine.request import EngineRequest
from mrss_provider.engine.sampler import sample
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.engine.tail import merge_rows
from mrss_provider.model import load_model
from mrss_provider.sampling_params import SamplingParams

WAKES = "schedule:amber=1@0,1@20,0@21+blue=0@20,1@21"
"""amber speaks up to position 20, blue from 21 on; all else always."""
BLINKS = "schedule:blue=0@0,0@5,1@6,1@7,0@8,0@40,1@41"


def eager_and_lazy(
    arrivals: Mapping[int, Sequence[EngineRequest]], *, on_device: bool, **config: int
) -> tuple[Outputs, Outputs]:
    eager = run(make_engine(FakeModel(), on_device=on_device, lazy=False, **config), arrivals)
    return eager, run(make_engine(FakeModel(), on_device=on_device, **config), arrivals)


RULES = ["linear", "geometric", "product", "power:0.5", "route"]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("gate", [WAKES, BLINKS])
@pytest.mark.parametrize("merge", RULES)
def test_rows_of_weight_0_sleep_and_the_text_is_the_same(
    merge: str, gate: str, on_device: bool
) -> None:
    """Also with two answers, beside requests that come and go, and with penalties."""
    mixed = mixture(A, B, C, weights=[0.4, 0.35, 0.25], merge=merge, gate=gate)
    arrivals = {
        0: [
            request("lazy", [3, 1, 4] * 9, mixed, 2, max_tokens=50, seed=1),
            request("plain", [7], mixture(D), max_tokens=30, seed=2),
        ],
        9: [request("late", [5] * 60, mixed, max_tokens=45, seed=3, frequency_penalty=0.4)],
        25: [request("later", [5, 6], mixture(None, D), max_tokens=20, seed=4)],
    }
    eager, lazy = eager_and_lazy(arrivals, on_device=on_device)
    assert ids(eager) == ids(lazy)


@pytest.mark.parametrize("on_device", [False, True])
def test_the_last_row_of_a_product_keeps_its_exponent(on_device: bool) -> None:
    """One row alone comes back as it is; a product with one strength of 2 is something else."""
    fades = "schedule:amber=0@0+blue=2@0+cyan=0@0"
    mixed = mixture(A, B, C, weights=[1.0, 1.0, 0.5], merge="product", gate=fades)
    arrivals = {0: [request("x", [3, 1, 4], mixed, max_tokens=30, seed=5)]}
    eager, lazy = eager_and_lazy(arrivals, on_device=on_device)
    assert ids(eager) == ids(lazy)


def test_no_row_sleeps_whose_opinion_of_the_answer_is_evidence() -> None:
    mixed = mixture(A, B, C, weights=[0.4, 0.35, 0.25], merge="route", gate="posterior:0.02,true")
    arrivals = {0: [request("x", [3, 1, 4], mixed, max_tokens=20, seed=1)]}
    eager, lazy = eager_and_lazy(arrivals, on_device=False, reprobe_tokens=4)
    assert ids(eager) == ids(lazy)


@pytest.mark.parametrize("merge", ["delta", "contrast"])
def test_an_anchored_rule_keeps_its_base_awake(merge: str) -> None:
    mixed = mixture(None, A, B, weights=[0.0, 1.0, 0.6], merge=merge, gate=WAKES)
    arrivals = {0: [request("x", [3, 1, 4], mixed, max_tokens=40, seed=5)]}
    eager, lazy = eager_and_lazy(arrivals, on_device=False)
    assert ids(eager) == ids(lazy)
    model = FakeModel()
    run(make_engine(model, on_device=False), arrivals)
    assert {len(slots) for what, slots in model.calls if what == "decode"} == {2}


def test_a_row_that_sleeps_is_not_computed_and_catches_up_at_once() -> None:
    model = FakeModel()
    mixed = mixture(A, B, weights=[0.5, 0.5], gate=WAKES)
    run(make_engine(model, on_device=False), {0: [request("x", [1, 2], mixed, max_tokens=30)]})
    decodes = [("decode", [0])] * 20 + [("prefill", [20])] + [("decode", [1])] * 9
    assert model.calls == [("prefill", [2, 2]), *decodes]


def test_the_device_decodes_only_rows_that_are_awake() -> None:
    model = FakeModel()
    mixed = mixture(A, B, C, weights=[0.5, 0.3, 0.2], gate=WAKES)
    engine = make_engine(model, on_device=True)
    run(engine, {0: [request("x", [1, 2], mixed, max_tokens=30)]})
    decodes = [("decode", [0, 2])] * 20 + [("prefill", [20])] + [("decode", [1, 2])] * 9
    assert model.calls == [("prefill", [2, 2, 2]), *decodes]


@pytest.mark.parametrize("on_device", [False, True])
def test_catching_up_is_cut_into_chunks_and_the_others_go_on(on_device: bool) -> None:
    model = FakeModel()
    gate = "schedule:blue=0@0,0@99,1@100+cyan=0@0,0@99,1@100"
    mixed = mixture(A, B, C, weights=[0.5, 0.3, 0.2], gate=gate)
    engine = make_engine(model, on_device=on_device)
    wanted = {
        0: [
            request("lazy", [1, 2], mixed, max_tokens=110, seed=1),
            request("plain", [3], mixture(D), max_tokens=130, seed=2),
        ]
    }
    got = run(engine, wanted)
    pieces = [lengths for what, lengths in model.calls if what == "prefill"][1:]
    # 99 tokens for each of two rows, 32 in a step, in whole blocks.
    assert pieces == [[32], [32], [32], [3, 16], [32], [32], [19]]
    eager = run(make_engine(FakeModel(), on_device=on_device, lazy=False), wanted)
    assert ids(got) == ids(eager)


def decode_with_probes(
    wanted: EngineRequest, probe_len: int, model: FakeModel
) -> tuple[list[int], list[int]]:
    """Decode `route` by hand: the gate chooses at every `probe_len`-th token; ids and choices."""
    mixed, sampling = wanted.mixture, wanted.sampling
    answer: list[int] = []
    choices: list[int] = []
    for position in range(sampling.max_tokens or 0):
        read = [*wanted.prompt, *answer]
        logits = torch.stack([model.logits_after(read, state) for state in mixed.states])  # type: ignore[arg-type]
        logits[:, BANNED] = -torch.inf
        if position % probe_len == 0:
            rows = Rows(logits[None], torch.tensor([mixed.weights]), torch.tensor([0.0]))
            weights = gate_of(mixed).weights(rows, sums_to_one=True)
            choices.append(int(weights[0].argmax()))
        (token,) = sample(
            logits[choices[-1]][None], [sampling], [uniform(sampling.seed or 0, 0, position)]
        )
        answer.append(token)
    return answer, choices


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("gate", ["novelty", "confidence"])
def test_route_keeps_to_a_row_between_probes(gate: str, on_device: bool) -> None:
    mixed = mixture(None, A, B, C, weights=[0.1, 0.3, 0.3, 0.3], merge="route", gate=gate)
    wanted = request("x", [1, 2, 3], mixed, max_tokens=40, seed=9)
    model = FakeModel()
    engine = make_engine(model, on_device=on_device, reprobe_tokens=8)
    beside = request("plain", [3], mixture(D), max_tokens=50, seed=2)
    outputs = run(engine, {0: [wanted], 3: [beside]})
    expected, choices = decode_with_probes(wanted, 8, FakeModel())
    assert ids(outputs)["x", 0] == expected
    assert len(set(choices)) > 1, "a seed that shows nothing"
    alone = [len(slots) for what, slots in model.calls if what == "decode"]
    assert alone.count(1) + alone.count(2) > 30


def test_without_probes_route_computes_every_row_for_a_gate_that_looks_at_them() -> None:
    mixed = mixture(None, A, B, weights=[0.2, 0.4, 0.4], merge="route", gate="novelty")
    model = FakeModel()
    run(make_engine(model, on_device=False), {0: [request("x", [1], mixed, max_tokens=9)]})
    assert {len(slots) for what, slots in model.calls if what == "decode"} == {3}


@pytest.mark.parametrize(
    ("changed", "gate"),
    [
        ({"trace": True}, WAKES),
        ({}, "novelty"),
        ({}, "posterior:0.02,true"),
        ({}, "confidence"),
        ({"cut": 0.1}, WAKES),
    ],
)
def test_what_needs_every_row_keeps_every_row(changed: dict[str, object], gate: str) -> None:
    cut = float(changed.pop("cut", 0.0))  # type: ignore[arg-type]
    mixed = mixture(None, A, B, weights=[0.2, 0.4, 0.4], merge="delta", gate=gate, cut=cut)
    wanted = replace(request("x", [1], mixed), **changed)  # type: ignore[arg-type]
    assert make_lazy_rows(wanted, LazyPolicy(probe_len=9)) is None
    assert make_lazy_rows(wanted, None) is None


shares = st.lists(
    st.sampled_from([0.0, 1e-6, 4e-4, 9e-4, 2e-3, 0.1, 0.5, 1.0]), min_size=2, max_size=6
).filter(any)


@given(shares, st.integers(0, 1 << 30))
def test_what_sleeps_under_linear_moves_the_distribution_by_no_more_than_its_weight(
    values: list[float], seed: int
) -> None:
    weights = [value / sum(values) for value in values]
    mixed = mixture(*[A] * len(weights), weights=weights)
    rows = needed_rows(mixed, 1e-3)
    assert rows == tuple(k for k, w in enumerate(weights) if w >= 1e-3)
    logits = 6 * torch.randn(len(weights), 50, generator=torch.Generator().manual_seed(seed))
    whole = merge_rows(logits.clone(), [(range(len(weights)), mixed)]).softmax(-1)
    awake = merge_rows(logits.clone(), [(rows, only(mixed, rows))]).softmax(-1)
    dropped = sum(w for k, w in enumerate(weights) if k not in rows)
    assert float((whole - awake).abs().sum()) / 2 <= dropped + 1e-6


@pytest.mark.parametrize("merge", ["geometric", "product", "power:-1"])
def test_under_other_rules_only_0_is_small_enough(merge: str) -> None:
    mixed = mixture(A, B, C, weights=[0.9999, 1e-4, 0.0], merge=merge)
    assert needed_rows(mixed, 1e-3) == (0, 1)


def test_route_needs_the_first_of_the_loudest() -> None:
    mixed = mixture(A, B, C, weights=[0.2, 0.4, 0.4], merge="route")
    assert needed_rows(mixed, 1e-3) == (1,)
    part = only(mixed, (1,))
    assert (part.names, part.weights, part.rows, part.base_row) == (("blue",), (1.0,), 1, None)
    assert make_merge(part.merge).name == "route"


@pytest.mark.parametrize("version", [7, pytest.param(6, marks=pytest.mark.slow)])
def test_real_rows_that_sleep_and_wake_give_the_same_text(version: int, tmp_path: Path) -> None:
    """And in company, where they catch up in other pieces, the same numbers bit for bit."""
    path = tiny_model.write_checkpoint(tmp_path / "tiny.pth", version)
    model = load_model(path, device="cpu", dtype="fp32", threads=1)
    states = tmp_path / "states"
    states.mkdir()
    for seed, name in enumerate("abc"):
        tiny_model.write_state(states / f"{name}.pth", seed=seed)
    library = StateLibrary(states, model.config)
    gate = "schedule:b=0@0,0@40,1@41+c=0@0,0@9,1@10,1@11,0@12,0@50,1@51"
    sampling = SamplingParams(
        temperature=1.0,
        top_p=1.0,
        max_tokens=60,
        seed=7,
        ignore_eos=True,
        sampling_order="openai",
        logprobs=True,
    )

    def answers(*seeds: int, lazy: str) -> Outputs:
        config = EngineConfig(max_rows=MAX_ROWS, prefill_chunk_len=32, lazy_rows=lazy)  # type: ignore[arg-type]
        mixed = library.resolve(f"a+b+c~linear~{gate}")
        wanted = [
            EngineRequest(str(seed), (5, 6, 7), mixed, replace(sampling, seed=seed), 2)
            for seed in seeds
        ]
        return run(Engine(model, library, config, allowed_ids=range(300)), {0: wanted})

    company = answers(1, 2, 3, lazy="on")
    eager = answers(1, 2, 3, lazy="off")
    assert ids(company) == ids(eager)
    for seed in (1, 2, 3):
        for key, outputs in answers(seed, lazy="on").items():
            assert outputs == company[key]


kinds = st.sampled_from(["linear", "geometric", "route"])
wanted_requests = st.lists(
    st.tuples(
        kinds,
        st.sampled_from([WAKES, BLINKS, "fixed", "novelty"]),
        st.integers(0, 12),
        st.integers(1, 2),
        st.integers(1, 50),
        st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=25, deadline=None)
@given(wanted_requests, st.booleans(), st.integers(0, 30))
def test_whatever_comes_and_goes_nobody_notices_who_sleeps(
    wanted: list[tuple[str, str, int, int, int, bool]], on_device: bool, abort_at: int
) -> None:
    """Same tokens with lazy rows and without, and all slots back, under aborts and early ends."""
    results = []
    for lazy in (False, True):
        engine = make_engine(FakeModel(), on_device=on_device, lazy=lazy)
        outputs: dict[tuple[str, int], list[int | None]] = {}
        for step in range(400):
            for i, (merge, gate, arrives, n, max_tokens, ends) in enumerate(wanted):
                if arrives == step:
                    needs_base = gate == "novelty"
                    states = (None, A, B) if needs_base else (A, B, C)
                    mixed = mixture(*states, weights=[0.4, 0.35, 0.25], merge=merge, gate=gate)
                    options = {"max_tokens": max_tokens, "seed": i, "ignore_eos": not ends}
                    bias = {0: 2.0} if ends else {}
                    engine.add(request(str(i), [2, 3, i], mixed, n, logit_bias=bias, **options))
            if step == abort_at:
                engine.abort("0", 0)
            if step > 12 and not engine.has_work:
                break
            for output in engine.step():
                assert output.error is None
                outputs.setdefault((output.request_id, output.index), []).append(output.token_id)
        assert engine.num_free_rows == MAX_ROWS
        outputs.pop(("0", 0), None)
        results.append(outputs)
    assert results[0] == results[1]
