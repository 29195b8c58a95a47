"""The runner that stays a step ahead, on a CPU with a plain tail, against the plain runner."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from fake_model import VOCAB, FakeModel, fake_state, mixture, request
from mrss_kernels import reference_tail
from torch import Tensor

from mrss_provider import mixture as names
from mrss_provider.config import EngineConfig
from mrss_provider.engine import merges
from mrss_provider.engine.device_runner import DeviceRunner
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.merges.linear import Linear
from mrss_provider.engine.request import EngineRequest, TokenOutput
from mrss_provider.model.cuda_graphs import row_bucket

A, B, C = (fake_state(name) for name in ("amber", "blue", "cyan"))
WITH_BOS = fake_state("bos", bos=True)
ALLOWED = range(VOCAB - 1)
CONFIG = EngineConfig(max_rows=16, prefill_chunk_len=16, prefill_alone_len=32, max_context_len=999)

PLAIN = mixture(None)
LINEAR = mixture(A, B, weights=[0.3, 0.7])
DELTA = mixture(None, A, B, C, weights=[0, 1, 1, 0.5], merge="delta", gate="novelty", cut=0.1)
GEOMETRIC = mixture(WITH_BOS, C, weights=[0.5, 0.5], merge="geometric")

Outputs = dict[tuple[str, int], list[TokenOutput]]


def plain_tail(logits: Tensor, inputs: Any, outputs: Any, **_: Any) -> None:
    reference_tail.tail(logits, inputs, outputs)


def device_engine(model: FakeModel) -> Engine:
    banned = torch.tensor([VOCAB - 1])
    runner = DeviceRunner(model, CONFIG, banned, tail=plain_tail)  # type: ignore[arg-type]
    return Engine(model, None, CONFIG, allowed_ids=ALLOWED, runner=runner)  # type: ignore[arg-type]


def host_engine(model: FakeModel) -> Engine:
    return Engine(model, None, CONFIG, allowed_ids=ALLOWED)  # type: ignore[arg-type]


def run(engine: Engine, arrivals: Mapping[int, Iterable[EngineRequest]]) -> Outputs:
    """Run to the end; `arrivals[step]` come before that step."""
    outputs: Outputs = {}
    for step in range(500):
        for new in arrivals.get(step, ()):
            engine.add(new)
        if not engine.has_work and step > max(arrivals):
            assert engine.num_free_rows == CONFIG.max_rows
            return outputs
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
    raise AssertionError("the engine does not come to an end")


def assert_same(got: Outputs, expected: Outputs) -> None:
    assert got.keys() == expected.keys()
    for key, outputs in got.items():
        wanted = expected[key]
        assert [o.token_id for o in outputs] == [o.token_id for o in wanted], key
        assert [o.finish_reason for o in outputs] == [o.finish_reason for o in wanted]
        for one, other in zip(outputs, wanted, strict=True):
            assert (one.logprob is None) == (other.logprob is None)
            if one.logprob is not None and other.logprob is not None:
                assert math.isclose(one.logprob, other.logprob, abs_tol=1e-4)
            assert [i for i, _ in one.top] == [i for i, _ in other.top]


def arrivals() -> dict[int, list[EngineRequest]]:
    """Requests of every kind that come, overlap and go."""
    long = [3, 1, 4, 1, 5, 9, 2, 6] * 9
    return {
        0: [
            request("plain", [1, 2, 3], PLAIN, max_tokens=12, temperature=1.0, seed=1),
            request("linear", [4, 5], LINEAR, max_tokens=9, temperature=0.8, top_p=0.9, seed=2),
        ],
        2: [
            request("long", long, DELTA, max_tokens=8, temperature=1.0, top_k=5, seed=3),
            request(
                "penalties",
                [1, 2, 1, 2],
                LINEAR,
                2,
                max_tokens=14,
                temperature=1.0,
                repetition_penalty=1.3,
                presence_penalty=0.5,
                frequency_penalty=0.4,
                penalty_decay=0.9,
                seed=4,
            ),
        ],
        5: [
            request(
                "bias", [7], GEOMETRIC, max_tokens=9, temperature=1.0, seed=5,
                logit_bias={3: 4.0, 4: -100.0, 5: -1.5},
            ),
            request(
                "top", [8], DELTA, max_tokens=7, temperature=0.0, logprobs=True, top_logprobs=4,
                seed=6,
            ),
        ],
        6: [request("stops", [9], PLAIN, max_tokens=60, temperature=1.5, seed=7, ignore_eos=False)],
    }  # fmt: skip


@pytest.mark.parametrize("packs_rows", [True, False])
def test_every_request_gets_what_the_plain_runner_gives_it(packs_rows: bool) -> None:
    model = FakeModel()
    model.packs_rows = packs_rows
    assert_same(run(device_engine(model), arrivals()), run(host_engine(FakeModel()), arrivals()))


def test_decoding_rows_and_prompts_share_one_pass() -> None:
    model = FakeModel()
    engine = device_engine(model)
    engine.add(request("a", [1], LINEAR, max_tokens=9))
    engine.step()
    engine.add(request("b", [1] * 40, PLAIN, max_tokens=9))
    model.calls.clear()
    engine.step()
    assert model.calls == [("prefill", [1, 1, 16])]


def test_answers_that_begin_beside_others_are_all_picked_and_each_step_as_one_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts: list[object] = []
    picked: list[tuple[int, int]] = []

    def tail(logits: Tensor, inputs: Any, outputs: Any, *, num_groups: int, **_: Any) -> None:
        picked.append((num_groups, int((inputs.column("num_rows") > 0).sum())))
        reference_tail.tail(logits, inputs, outputs)

    def run_part(part: Any, count: int) -> None:
        key, step = part(count)
        parts.append(key)
        step()

    banned = torch.tensor([VOCAB - 1])
    runner = DeviceRunner(FakeModel(), CONFIG, banned, tail=tail)  # type: ignore[arg-type]
    monkeypatch.setattr(runner, "_run", run_part)
    engine = Engine(FakeModel(), None, CONFIG, allowed_ids=ALLOWED, runner=runner)  # type: ignore[arg-type]
    engine.add(request("runs", [1, 2], PLAIN, max_tokens=12))
    engine.step()
    # Five answers share the one row that has read their prompt.
    engine.add(request("five", [3, 1, 4] * 11, PLAIN, 5, max_tokens=2))
    while engine.has_work:
        engine.step()
    assert max(live for _, live in picked) == 6
    assert all(live <= num_groups for num_groups, live in picked)
    # All but the first step, which nobody waited for, can be replayed whole or by its second half.
    assert len(parts) == len(picked) - 1


def test_the_tail_of_an_answer_alone_is_as_wide_as_one_request_however_many_rows_it_has() -> None:
    widths: list[int] = []

    def tail(logits: Tensor, inputs: Any, outputs: Any, *, num_groups: int, **_: Any) -> None:
        widths.append(num_groups)
        reference_tail.tail(logits, inputs, outputs)

    def requests() -> dict[int, list[EngineRequest]]:
        asked = [("mixture", DELTA, 12, 1), ("other", LINEAR, 3, 2)]
        return {
            4 * i: [request(name, [1, 2 + i], of, max_tokens=n, temperature=1.0, seed=seed)]
            for i, (name, of, n, seed) in enumerate(asked)
        }

    banned = torch.tensor([VOCAB - 1])
    runner = DeviceRunner(FakeModel(), CONFIG, banned, tail=tail)  # type: ignore[arg-type]
    engine = Engine(FakeModel(), None, CONFIG, allowed_ids=ALLOWED, runner=runner)  # type: ignore[arg-type]
    assert_same(run(engine, requests()), run(host_engine(FakeModel()), requests()))
    alone = [width == 1 for width in widths]
    # Four rows, then six of two answers, then four again; one step more than tokens is launched.
    assert alone == [True] * 4 + [False] * 3 + [True] * (len(alone) - 7)
    assert len(alone) >= 12
    assert min(width for width in widths if width > 1) >= 4


def test_a_prepared_runner_captures_nothing_more_where_a_prompt_is_read_beside_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared: set[Any] = set()
    met: list[Any] = []

    def prepare(key: Any, step: Any) -> None:
        prepared.add(key)
        step()

    def run_part(part: Any, count: int) -> None:
        key, step = part(count)
        met.append(key)
        step()

    runner = DeviceRunner(FakeModel(), CONFIG, torch.tensor([VOCAB - 1]), tail=plain_tail)  # type: ignore[arg-type]
    monkeypatch.setattr(runner._graphs, "prepare", prepare)
    # Where nobody has a row, each of them is another one's.
    runner._layout.slots[:4] = torch.arange(4)
    runner.prepare(4)
    monkeypatch.setattr(runner, "_run", run_part)
    engine = Engine(FakeModel(), None, CONFIG, allowed_ids=ALLOWED, runner=runner)  # type: ignore[arg-type]
    for step, name in enumerate("abcd"):
        engine.add(request(name, [1 + step] * 20, PLAIN, max_tokens=12, top_p=0.5))
        engine.step()
        engine.step()
    while engine.has_work:
        engine.step()
    assert {key[0] for key in met} == {"step", "picking"}
    assert set(met) <= prepared


def test_halves_that_are_padded_to_a_bucket_and_replayed_pick_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = DeviceRunner(FakeModel(), CONFIG, torch.tensor([VOCAB - 1]), tail=plain_tail)  # type: ignore[arg-type]
    captured: dict[Any, Any] = {}
    run_part, leave = runner._run, runner._leave

    def replay(part: Any, count: int) -> None:
        key, step = part(count)
        if key[0] != "picking":
            # The toy model has no padding rows.
            run_part(part, count)
            return
        key, step = part(row_bucket(count))
        captured.setdefault(key, step)()

    def leave_alone(hidden: Tensor) -> None:
        if runner._hidden is not None:
            runner._hidden.fill_(math.nan)
        leave(hidden)

    monkeypatch.setattr(runner, "_run", replay)
    monkeypatch.setattr(runner, "_leave", leave_alone)
    monkeypatch.setattr(runner._graphs, "clear", captured.clear)
    engine = Engine(FakeModel(), None, CONFIG, allowed_ids=ALLOWED, runner=runner)  # type: ignore[arg-type]
    assert_same(run(engine, arrivals()), run(host_engine(FakeModel()), arrivals()))
    assert captured


def test_a_steady_decode_uploads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = device_engine(FakeModel())
    for name in "ab":
        engine.add(request(name, [1], LINEAR, max_tokens=30))
    engine.step()
    layout = engine._runner._layout  # type: ignore[attr-defined]
    uploads = []
    monkeypatch.setattr(layout, "_upload", lambda: uploads.append(1))
    for _ in range(10):
        engine.step()
    assert not uploads


def test_a_step_is_launched_before_the_one_before_is_looked_at() -> None:
    model = FakeModel()
    engine = device_engine(model)
    engine.add(request("a", [1], PLAIN, max_tokens=3))
    counts = []
    while engine.has_work:
        outputs = engine.step()
        counts.append((len(model.calls), len(outputs)))
    assert counts == [(1, 0), (2, 1), (3, 1), (3, 1)]


def test_a_rule_without_a_kernel_is_picked_by_torch_and_its_neighbours_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Loudest(Linear):
        name = "loudest"

        def merge(self, rows: merges.Rows, weights: Tensor) -> Tensor:
            return rows.logits.amax(1)

    monkeypatch.setitem(names.MERGES, "loudest", ())
    monkeypatch.setitem(merges.MERGE_RULES, "loudest", Loudest)
    loudest = mixture(A, B, weights=[0.5, 0.5], merge="loudest")
    later = arrivals() | {
        4: [request("loudest", [2, 2], loudest, max_tokens=5, temperature=1.0, seed=9)]
    }
    assert_same(run(device_engine(FakeModel()), later), run(host_engine(FakeModel()), later))


def test_numbers_that_are_not_finite_end_their_request_alone() -> None:
    model = FakeModel()
    model.poison = 11
    outputs = run(
        device_engine(model),
        {
            0: [
                request("bad", [11], PLAIN, max_tokens=5, seed=1),
                request("good", [1], LINEAR, max_tokens=5, seed=1, logit_bias={11: -100.0}),
            ]
        },
    )
    assert [o.token_id for o in outputs["bad", 0]] == [None]
    assert "not finite" in str(outputs["bad", 0][0].error)
    assert len(outputs["good", 0]) == 5


def test_a_step_that_fails_ends_its_requests_and_not_the_engine() -> None:
    model = FakeModel()
    engine = device_engine(model)
    engine.add(request("a", [1], PLAIN, max_tokens=9))
    engine.step()
    model.fail = RuntimeError("out of memory")
    outputs = engine.step()
    assert any(o.error is not None and "out of memory" in str(o.error) for o in outputs)
    model.fail = None
    again = run(engine, {0: [request("b", [1], LINEAR, max_tokens=4)]})
    assert len(again["b", 0]) == 4


def test_an_abort_gives_no_more_outputs_and_its_neighbours_the_same() -> None:
    engine = device_engine(FakeModel())
    engine.add(request("a", [1], LINEAR, max_tokens=20, seed=1))
    engine.add(request("b", [2], DELTA, max_tokens=12, seed=2))
    seen: list[TokenOutput] = []
    for _ in range(4):
        seen += engine.step()
    engine.abort("a")
    while engine.has_work:
        outputs = engine.step()
        assert all(o.request_id == "b" for o in outputs)
        seen += outputs
    alone = run(host_engine(FakeModel()), {0: [request("b", [2], DELTA, max_tokens=12, seed=2)]})
    assert [o.token_id for o in seen if o.request_id == "b"] == [o.token_id for o in alone["b", 0]]


def test_a_step_that_fails_leaves_the_tokens_of_those_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    engine = device_engine(FakeModel())
    engine.add(request("a", [1], PLAIN, max_tokens=2, seed=1))
    outputs = engine.step() + engine.step()
    monkeypatch.setattr(engine._runner, "_likeliest", fail)
    for n in range(3):
        engine.add(request(f"failing {n}", [5 + n], PLAIN, seed=9 + n))
        outputs += engine.step()
    while engine.has_work:
        outputs += engine.step()
    alone = run(host_engine(FakeModel()), {0: [request("a", [1], PLAIN, max_tokens=2, seed=1)]})
    got = [o.token_id for o in outputs if o.request_id == "a"]
    assert got == [o.token_id for o in alone["a", 0]]


def test_graphs_are_dropped_when_pools_grew_in_a_step_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    engine = device_engine(FakeModel())
    runner = engine._runner
    dropped = []
    monkeypatch.setattr(runner._graphs, "clear", lambda: dropped.append(1))  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setattr(runner._layout, "_write_counts", fail)  # type: ignore[attr-defined]
        engine.add(request("fails", [1], PLAIN, presence_penalty=0.5))
        assert engine.step()[0].error is not None
    for name in "ab":
        run(engine, {0: [request(name, [1], PLAIN, presence_penalty=0.5)]})
    assert dropped == [1]


def test_a_token_beyond_the_end_of_an_answer_is_not_counted() -> None:
    engine = device_engine(FakeModel())
    wanted = request("a", [1], PLAIN, max_tokens=60, ignore_eos=False, logit_bias={0: 3.0})
    outputs = run(engine, {0: [wanted]})["a", 0]
    assert outputs[-1].finish_reason == "stop"
    assert engine.stats().num_sampled_tokens == len(outputs)


def test_a_top_p_that_fp32_cannot_hold_leaves_the_likeliest_token() -> None:
    wanted = {0: [request("a", [1], PLAIN, top_p=1e-46)]}
    assert_same(run(device_engine(FakeModel()), wanted), run(host_engine(FakeModel()), wanted))
