"""A step that no memory was left for ends the newest of its requests, and nobody else's."""

import itertools
from dataclasses import replace

import pytest
import torch
from fake_model import VOCAB, FakeModel, fake_state, mixture, request
from mrss_kernels import reference_tail
from test_engine import expected_ids, ids, run

from mrss_provider.config import EngineConfig
from mrss_provider.engine.continuation import Capture, StartPoint
from mrss_provider.engine.device_runner import DeviceRunner
from mrss_provider.engine.engine import Engine
from mrss_provider.errors import OverloadedError

A, B, C = (fake_state(name) for name in ("amber", "blue", "cyan"))
LINEAR = mixture(A, B, weights=[0.3, 0.7])
DELTA = mixture(None, A, B, C, weights=[0, 1, 1, 0.5], merge="delta", gate="novelty", cut=0.1)
LAZY = mixture(A, B, C, weights=[0.5, 0.0, 0.5], gate="fixed")
WITH_BOS = mixture(fake_state("bos", bos=True), B)

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


class Halfway(FakeModel):
    """A model whose failing call has already spoilt the states of its rows."""

    def decode(self, token_ids, slots, pool):
        self.spoil(slots, pool)
        return super().decode(token_ids, slots, pool)

    def prefill(self, token_ids, cu_seqlens, slots, pool, **options):
        self.spoil(slots, pool)
        return super().prefill(token_ids, cu_seqlens, slots, pool, **options)

    def spoil(self, slots, pool):
        if self.fail is not None:
            pool.hidden[slots] = torch.nan


@pytest.fixture(params=[False, True], ids=["host", "device"])
def on_device(request):
    return request.param


def make_engine(model, *, on_device, **options):
    config = EngineConfig(
        max_rows=16, prefill_chunk_len=16, prefill_alone_len=16, max_context_len=999, **options
    )
    runner = None
    if on_device:
        banned = torch.tensor([VOCAB - 1])
        runner = DeviceRunner(model, config, banned, tail=plain_tail)
    return Engine(model, None, config, allowed_ids=range(VOCAB - 1), runner=runner)


def plain_tail(logits, inputs, outputs, **_):
    reference_tail.tail(logits, inputs, outputs)


def requests():
    return [
        request("delta", [3, 1, 4, 1, 5] * 6, DELTA, seed=4, max_tokens=9, top_k=12),
        request("two", [9, 2, 6], LINEAR, n=2, seed=3, max_tokens=7, frequency_penalty=1.5),
        request("lazy", [7, 7], LAZY, seed=5, max_tokens=8),
        request("bos", [2, 7, 1, 8] * 5, WITH_BOS, seed=6, max_tokens=6),
        request("newest", [4, 4], LINEAR, seed=8, max_tokens=6),
    ]


def split(outputs, wanted):
    """Return the names of the requests that were shed; the others must be right to the last id."""
    shed = set()
    for each in wanted:
        for index in range(each.n):
            error = outputs[each.id, index][-1].error
            if error is None:
                assert ids(outputs[each.id, index]) == expected_ids(each, index)
            else:
                assert isinstance(error, OverloadedError)
                assert error.status_code == 503
                shed.add(each.id)
    return shed


@pytest.mark.parametrize(
    "step", [0, 3, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 5, 7))]
)
def test_the_older_half_goes_on_as_if_nothing_had_been(step, on_device):
    model = Halfway()
    engine = make_engine(model, on_device=on_device, lazy_rows="on")
    wanted = requests()
    for each in wanted:
        engine.add(each)
    outputs = {}
    for number in itertools.count():
        if not engine.has_work:
            break
        if number == step:
            model.fail = NO_MEMORY
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
    shed = split(outputs, wanted)
    assert model.fail is None, "the test must fail a step"
    assert 1 <= len(shed) <= 3
    assert shed <= {"lazy", "bos", "newest"}
    assert engine.num_free_rows == 16


@pytest.mark.slow
def test_memory_that_stays_short_ends_with_nobody_stuck(on_device):
    model = Halfway()
    engine = make_engine(model, on_device=on_device)
    for each in requests():
        engine.add(each)
    ended = []
    for _ in range(40):
        model.fail = NO_MEMORY
        ended += [output for output in engine.step() if output.error is not None]
        if not engine.has_work:
            break
    assert len(ended) == 6
    assert engine.num_free_rows == 16
    model.fail = None
    again = request("again", [1, 2], LINEAR)
    engine.add(again)
    assert ids(run(engine)["again", 0]) == expected_ids(again)


def test_an_answer_that_is_dropped_while_it_reads_again_leaves_no_slot_behind(on_device):
    model = Halfway()
    engine = make_engine(model, on_device=on_device)
    keep, drop = request("keep", [1] * 40, LINEAR, max_tokens=9), request("drop", [2] * 40, LINEAR)
    others = [request(f"o{i}", [i], LINEAR) for i in range(2)]
    for each in (keep, drop, *others):
        engine.add(each)
    outputs = []
    while not any(output.request_id == "drop" for output in outputs):
        outputs += engine.step()
    model.fail = NO_MEMORY
    while model.fail is not None:
        outputs += engine.step()
    engine.abort("drop")
    while engine.has_work:
        outputs += engine.step()
    assert [o.token_id for o in outputs if o.request_id == "keep"] == expected_ids(keep)
    assert engine.num_free_rows == 16


@pytest.mark.parametrize("step", [2, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 4))])
def test_an_answer_taken_up_again_and_one_begun_in_the_cache_go_on(step, on_device):
    long = tuple(1 + (7 * i) % (VOCAB - 2) for i in range(100))
    whole = request("x", long, DELTA, max_tokens=20, seed=3, temperature=1.0)
    expected = expected_ids(whole)
    model = Halfway()
    engine = make_engine(model, on_device=on_device)
    capture = Capture()
    first = replace(whole, sampling=replace(whole.sampling, max_tokens=8), capture=capture)
    engine.add(first)
    run(engine)
    state = capture.states[-1]
    start = StartPoint(state.rows, len(long), tuple(expected[:8]), capture.evidence)
    engine.add(replace(whole, id="resumed", start=start))
    engine.add(replace(whole, id="cached"))
    for i in range(2):
        engine.add(request(f"newer {i}", [1], LINEAR))
    outputs = {}
    for _ in range(step):
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
    model.fail = NO_MEMORY
    for key, more in run(engine).items():
        outputs.setdefault(key, []).extend(more)
    assert ids(outputs["resumed", 0]) == expected[8:]
    assert ids(outputs["cached", 0]) == expected
    assert outputs["cached", 0][0].num_cached > 0
    assert isinstance(outputs["newer 1", 0][-1].error, OverloadedError)
    assert engine.num_free_rows == 16
