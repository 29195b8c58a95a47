"""Steps in two halves: grammars of answers that are picked on the device, against the host's."""

from __future__ import annotations

import math
import random

import pytest
import torch
from fake_model import VOCAB, FakeModel, mixture, request
from mrss_kernels import reference_tail
from test_constraint import SETS, A, B, Broken, C, Cycle, constrained
from test_device_runner import ALLOWED, CONFIG, device_engine, host_engine, run

from mrss_provider.engine import device_runner
from mrss_provider.engine.device_runner import DeviceRunner
from mrss_provider.engine.engine import Engine
from mrss_provider.errors import InvalidRequestError, OverloadedError

PLAIN = mixture(A)
LINEAR = mixture(A, B, weights=[0.3, 0.7])
DELTA = mixture(None, A, B, C, weights=[0, 1, 1, 0.5], merge="delta", gate="novelty", cut=0.1)
MIXTURES = [
    PLAIN,
    LINEAR,
    DELTA,
    *(
        mixture(None, A, B, weights=[0.2, 0.5, 0.3], merge=merge, gate="confidence")
        for merge in ("geometric", "power", "product", "route")
    ),
]
SAMPLINGS = [
    {"temperature": 0.0, "logprobs": True, "top_logprobs": 3},
    {"temperature": 2.0, "top_k": 3, "repetition_penalty": 1.8},
    {"temperature": 1.0, "top_p": 0.6, "min_p": 0.1, "frequency_penalty": 2.0, "logprobs": True},
    {"temperature": 1.3, "logit_bias": {7: 9.0, 11: -100.0}, "sampling_order": "rwkv"},
]


class Ending(Cycle):
    """One that takes the tokens 34 and 35 for the end where it may end."""

    end_ids = (34, 35)

    def fork(self):
        return Ending(*self.sets, at=self.at)


class Watched(Cycle):
    """One that notes when its masks are found and its tokens known."""

    def __init__(self, events, *sets, at=0):
        super().__init__(*sets, at=at)
        self.events = events

    def fork(self):
        return Watched(self.events, *self.sets, at=self.at)

    def fill_mask(self, words):
        self.events.append(("mask", self.at))
        super().fill_mask(words)

    def advance(self, token_id):
        super().advance(token_id)
        self.events.append(("token", self.at))


def arrivals():
    """Constrained and free answers of every kind that come, overlap and go."""
    coming = {}
    for i, own in enumerate(MIXTURES):
        sampling = SAMPLINGS[i % 4]
        kind = (Cycle, Ending)[i % 2]
        coming[i] = [
            constrained(f"bound {i}", own, kind(*SETS), n=1 + i % 2, seed=i, **sampling),
            request(f"free {i}", [5, i], own, seed=i, max_tokens=5 + i % 3, **sampling),
        ]
    long = request("long", [3, 1, 4, 1, 5, 9, 2, 6] * 9, DELTA, max_tokens=4, seed=9)
    coming[2].append(long)
    return coming


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for key, outputs in got.items():
        wanted = expected[key]
        assert [o.token_id for o in outputs] == [o.token_id for o in wanted], key
        assert [o.finish_reason for o in outputs] == [o.finish_reason for o in wanted]
        for one, other in zip(outputs, wanted, strict=True):
            assert str(one.error) == str(other.error)
            assert [i for i, _ in one.top] == [i for i, _ in other.top]
            if other.logprob is not None:
                assert math.isclose(one.logprob, other.logprob, abs_tol=1e-4)


@pytest.fixture
def no_torch_tail(monkeypatch):
    def not_here(*_):
        raise AssertionError("torch's tail was asked")

    monkeypatch.setattr(device_runner, "run_step", not_here)


@pytest.mark.parametrize("packs_rows", [True, False])
def test_constrained_and_free_answers_are_those_of_the_plain_runner(packs_rows, no_torch_tail):
    model = FakeModel()
    model.packs_rows = packs_rows
    assert_same(run(device_engine(model), arrivals()), run(host_engine(FakeModel()), arrivals()))


def test_the_model_is_launched_before_its_masks_are_looked_for():
    events = []

    class Model(FakeModel):
        def _called(self, what, numbers):
            events.append((what, len(numbers)))

    engine = device_engine(Model())
    engine.add(constrained("x", PLAIN, Watched(events, [5], [6], [7], [8])))
    while engine.has_work:
        engine.step()
    assert events[:9] == [
        ("prefill", 1),
        ("mask", 0),
        ("decode", 1),
        ("token", 1),
        ("mask", 1),
        ("decode", 1),
        ("token", 2),
        ("mask", 2),
        ("decode", 1),
    ]


def test_a_steady_decode_uploads_masks_alone(monkeypatch):
    engine = device_engine(FakeModel())
    engine.add(constrained("x", LINEAR, Cycle(*[[5, 6]] * 30), max_tokens=30))
    engine.add(request("free", [1], LINEAR, max_tokens=30))
    for _ in range(3):
        engine.step()
    uploads = []
    monkeypatch.setattr(engine._runner._layout, "_upload", lambda: uploads.append(1))
    for _ in range(10):
        engine.step()
    assert not uploads


def test_a_grammar_that_leaves_nothing_ends_its_answer_alone(no_torch_tail):
    """Bans of all that is left, and a grammar that becomes too much work; each with its error."""
    bans = {2: -100.0, 11: -100.0}

    def requests():
        return {
            0: [
                constrained("none", LINEAR, Cycle(*SETS), logit_bias=bans),
                constrained("broken", PLAIN, Broken([5], [6])),
                constrained("some", LINEAR, Cycle(*SETS), n=2),
                request("free", [1], DELTA, max_tokens=6),
            ]
        }

    got = run(device_engine(FakeModel()), requests())
    assert_same(got, run(host_engine(FakeModel()), requests()))
    for name, tokens in (("none", 1), ("broken", 1)):
        *before, last = got[name, 0]
        assert isinstance(last.error, InvalidRequestError)
        assert len(before) == tokens
    assert all(o.error is None for o in got["free", 0])


def test_an_abort_between_the_halves_of_a_step_harms_nobody():
    engine = device_engine(FakeModel())
    engine.add(constrained("gone", LINEAR, Cycle(*[[5, 6]] * 20), max_tokens=20))
    engine.add(constrained("kept", DELTA, Cycle(*SETS), seed=2))
    engine.add(request("free", [2], DELTA, max_tokens=9, seed=2))
    seen = {}
    for step in range(100):
        if step == 3:
            engine.abort("gone")
        for output in engine.step():
            assert step < 3 or output.request_id != "gone"
            seen.setdefault(output.request_id, []).append(output.token_id)
    alone = run(
        host_engine(FakeModel()),
        {
            0: [
                constrained("kept", DELTA, Cycle(*SETS), seed=2),
                request("free", [2], DELTA, max_tokens=9, seed=2),
            ]
        },
    )
    for name in ("kept", "free"):
        assert seen[name] == [o.token_id for o in alone[name, 0]]
    assert engine.num_free_rows == CONFIG.max_rows


def failing_engine(failure, call):
    """Return an engine whose tail raises `failure` once, in its call number `call`."""
    calls = []

    def tail(logits, inputs, outputs, **_):
        calls.append(1)
        if len(calls) == call:
            raise failure
        reference_tail.tail(logits, inputs, outputs)

    model = FakeModel()
    runner = DeviceRunner(model, CONFIG, torch.tensor([VOCAB - 1]), tail=tail)
    return Engine(model, None, CONFIG, allowed_ids=ALLOWED, runner=runner)


# With the ninth no other step has been launched when it fails.
@pytest.mark.parametrize("call", [1, 2, 3, 9])
def test_a_second_half_that_fails_ends_its_answers_and_not_the_engine(call):
    engine = failing_engine(RuntimeError("boom"), call)
    outputs = run(engine, {0: [constrained("x", LINEAR, Cycle(*[[5, 6]] * 9), max_tokens=9)]})
    assert [o.token_id is None for o in outputs["x", 0]] == [False] * (call - 1) + [True]
    assert "boom" in str(outputs["x", 0][-1].error)
    later = {0: arrivals()[0]}
    assert_same(run(engine, later), run(host_engine(FakeModel()), later))


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("count", [2, 4])
def test_a_second_half_without_memory_costs_the_newer_half_of_the_answers(call, count):
    def everybody():
        return {
            0: [
                constrained(f"{age}", own, Cycle(*SETS[:2], [20], *SETS[3:]), seed=4)
                for age, own in enumerate((LINEAR, PLAIN, LINEAR, PLAIN)[:count])
            ]
        }

    calm = run(host_engine(FakeModel()), everybody())
    shaken = run(failing_engine(torch.OutOfMemoryError("no memory"), call), everybody())
    for age in range(count):
        got, wanted = shaken[f"{age}", 0], calm[f"{age}", 0]
        if age < count // 2:
            assert [o.token_id for o in got] == [o.token_id for o in wanted]
        else:
            assert isinstance(got[-1].error, OverloadedError)


def test_more_tokens_for_the_end_than_the_kernels_take_are_torchs():
    class Many(Ending):
        end_ids = tuple(range(23, 32))

        def fork(self):
            return Many(*self.sets, at=self.at)

    def requests():
        return {0: [constrained("x", LINEAR, Many(*SETS)), request("free", [1], LINEAR)]}

    assert_same(
        run(device_engine(FakeModel()), requests()), run(host_engine(FakeModel()), requests())
    )


def random_arrivals(seed):
    """Return arrivals and aborts by step, of constrained and free answers at random."""
    draw = random.Random(seed)
    coming, aborts = {}, {}
    for i in range(draw.randrange(3, 12)):
        own, step = draw.choice(MIXTURES), draw.randrange(25)
        options = draw.choice(SAMPLINGS) | {"seed": i, "max_tokens": draw.randrange(1, 12)}
        if draw.random() < 0.6:
            first = draw.choice((0, 1, 1))
            sets = [
                sorted(draw.sample(range(first, VOCAB - 2), draw.randrange(1, 6)))
                for _ in range(draw.randrange(1, 9))
            ]
            kind = draw.choice((Cycle, Ending, Broken))
            new = constrained(f"bound {i}", own, kind(*sets), n=draw.randrange(1, 3), **options)
        else:
            prompt = [draw.randrange(1, VOCAB - 2) for _ in range(draw.choice((1, 3, 40)))]
            new = request(f"free {i}", prompt, own, ignore_eos=draw.random() < 0.5, **options)
        coming.setdefault(step, []).append(new)
        if draw.random() < 0.15:
            aborts[step + draw.randrange(6)] = new.id
    return coming, aborts


def play(engine, coming, aborts):
    outputs, gone = {}, set()
    for step in range(400):
        for new in coming.get(step, ()):
            engine.add(new)
        if step in aborts:
            engine.abort(aborts[step])
            gone.add(aborts[step])
        for output in engine.step():
            assert output.request_id not in gone
            told = (output.token_id, output.finish_reason, str(output.error))
            outputs.setdefault((output.request_id, output.index), []).append(told)
    assert not engine.has_work
    assert engine.num_free_rows == CONFIG.max_rows
    return outputs, gone


@pytest.mark.slow
def test_random_comings_and_goings_change_no_answer():
    """What was aborted has the same beginning: a runner a step ahead tells it a step later."""
    for seed in range(60):
        got, gone = play(device_engine(FakeModel()), *random_arrivals(seed))
        expected, _ = play(host_engine(FakeModel()), *random_arrivals(seed))
        for key in got.keys() | expected.keys():
            one, other = got.get(key, []), expected.get(key, [])
            if key[0] in gone:
                other = other[: len(one)]
            assert one == other, (seed, key)


@pytest.mark.slow
@pytest.mark.parametrize("failure", [RuntimeError("boom"), torch.OutOfMemoryError("no memory")])
def test_steps_that_fail_at_random_change_no_token_and_end_an_answer_once(failure):
    for seed in range(40):
        engine = failing_engine(failure, call=1 + random.Random(seed).randrange(30))
        got, gone = play(engine, *random_arrivals(seed))
        expected, _ = play(host_engine(FakeModel()), *random_arrivals(seed))
        for key, outputs in got.items():
            tokens = [told for told in outputs if told[2] == "None"]
            assert tokens == expected[key][: len(tokens)], (seed, key)
            assert len(outputs) - len(tokens) <= 1
            if len(outputs) == len(tokens) and key[0] not in gone:
                assert tokens == expected[key], (seed, key)
