"""Whatever happens to requests: a state that is kept is the one that its tokens lead to."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from fake_model import VOCAB, FakeModel, FakeState, fake_state, mixture, request
from mrss_kernels import reference_tail
from test_constraint import Cycle, constrained
from torch import Tensor

from mrss_provider.config import EngineConfig
from mrss_provider.engine.continuation import Capture
from mrss_provider.engine.device_runner import DeviceRunner
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.prefix_cache import PrefixCache
from mrss_provider.engine.radix_tree import Ids
from mrss_provider.engine.request import EngineRequest
from mrss_provider.model import StateSnapshot

STATES = {name: fake_state(name) for name in ("amber", "blue")}
A, B = STATES.values()
LINEAR = mixture(A, B, weights=[0.3, 0.7])
DELTA = mixture(None, A, B, weights=[0, 1, 1], merge="delta", gate="novelty", cut=0.1)
SCHEDULED = mixture(A, B, weights=[0.3, 0.7], gate="schedule:amber=1@0,0@4")
CONFIG = EngineConfig(max_rows=16, prefill_chunk_len=32, prefill_alone_len=32, max_context_len=999)
WORDS = [list(range(1, 30))] * 60
NO_MEMORY = torch.OutOfMemoryError("no memory")


class Faults:
    """Raises a failure in calls of the model and of the tail, counted together."""

    def __init__(self, failure: Exception, calls: set[int]) -> None:
        self.failure, self.calls, self.count = failure, calls, 0

    def pass_by(self) -> None:
        self.count += 1
        if self.count in self.calls:
            raise self.failure


def make_engine(*, on_device: bool, faults: Faults | None = None) -> Engine:
    class Model(FakeModel):
        def _called(self, what: str, numbers: list[int]) -> None:
            super()._called(what, numbers)
            if faults is not None:
                faults.pass_by()

    def tail(logits: object, inputs: object, outputs: object, **_: object) -> None:
        if faults is not None:
            faults.pass_by()
        reference_tail.tail(logits, inputs, outputs)  # type: ignore[arg-type]

    model = Model()
    banned = torch.tensor([VOCAB - 1])
    # As a GPU has it, where no row sleeps.
    config = replace(CONFIG, lazy_rows="off" if on_device else "on")
    runner = DeviceRunner(model, config, banned, tail=tail) if on_device else None  # type: ignore[arg-type]
    return Engine(model, None, config, allowed_ids=range(VOCAB - 1), runner=runner)  # type: ignore[arg-type]


def after(tokens: list[int], state: FakeState | None) -> Tensor:
    """Return what a row is that has begun as `state` and read `tokens`."""
    model = FakeModel()
    pool = model.new_pool(1)
    pool.write(0, state)
    for token in tokens:
        model._read(token, 0, pool)
    return pool.hidden[0]


def check_captured(wanted: EngineRequest) -> None:
    assert wanted.capture is not None
    assert wanted.capture.ended.done()
    for state in wanted.capture.states:
        tokens = [*wanted.prompt, *wanted.capture.answer[: state.num_read]]
        for row, begun in zip(state.rows, wanted.mixture.states, strict=True):
            assert torch.equal(row.wkv, after(tokens, begun))  # type: ignore[arg-type]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Compare each state that comes to a cache with one that has read its tokens, and no others."""
    keys: list[str] = []
    insert = PrefixCache.insert

    def checked(self: PrefixCache, key: str, tokens: Ids, row: StateSnapshot) -> None:
        assert torch.equal(row.wkv, after(tokens.tolist(), STATES.get(key))), (key, len(tokens))
        keys.append(key)
        insert(self, key, tokens, row)

    monkeypatch.setattr(PrefixCache, "insert", checked)
    yield keys
    assert keys


def prompt_of(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(1, VOCAB - 2) for _ in range(length)]


def play(engine: Engine, coming: dict[int, list[EngineRequest]], aborts: dict[int, str]) -> None:
    for step in range(400):
        for new in coming.get(step, ()):
            engine.add(new)
        if step in aborts:
            engine.abort(aborts[step])
        engine.step()
    assert not engine.has_work
    assert engine.num_free_rows == CONFIG.max_rows


@pytest.mark.parametrize("call", range(1, 14))
def test_what_a_step_without_memory_leaves_is_filed_under_what_was_read(
    kept: list[str], call: int
) -> None:
    draw = random.Random(1)
    engine = make_engine(on_device=True, faults=Faults(NO_MEMORY, {call}))
    new = [constrained(f"{i}", LINEAR, Cycle(*WORDS), seed=i, max_tokens=6) for i in range(3)]
    new = [replace(each, prompt=tuple(prompt_of(draw, 40))) for each in new]
    play(engine, {0: new}, {})


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("failure", [NO_MEMORY, RuntimeError("boom")], ids=["memory", "other"])
def test_states_of_requests_that_come_go_and_fail_are_filed_under_what_was_read(
    kept: list[str], on_device: bool, failure: Exception
) -> None:
    for seed in range(6):
        draw = random.Random(seed)
        coming: dict[int, list[EngineRequest]] = {}
        aborts: dict[int, str] = {}
        for i in range(draw.randrange(3, 9)):
            own, step = draw.choice((LINEAR, DELTA, SCHEDULED)), draw.randrange(20)
            options = {"seed": i, "max_tokens": draw.randrange(1, 20)}
            if draw.random() < 0.5:
                new = constrained(f"{i}", own, Cycle(*WORDS), n=draw.randrange(1, 3), **options)
            else:
                new = request(f"{i}", (1,), own, draw.randrange(1, 3), **options)
            new = replace(
                new,
                prompt=tuple(prompt_of(draw, draw.choice((3, 31, 40, 90)))),
                pauses=frozenset(range(1, 6)),
                capture=Capture() if new.n == 1 and draw.random() < 0.3 else None,
            )
            coming.setdefault(step, []).append(new)
            if draw.random() < 0.3:
                aborts[step + draw.randrange(8)] = new.id
        faults = Faults(failure, {draw.randrange(1, 60) for _ in range(3)})
        play(make_engine(on_device=on_device, faults=faults), coming, aborts)
        for new in itertools.chain.from_iterable(coming.values()):
            if new.capture is not None:
                check_captured(new)


def test_copies_beside_the_cache_are_given_back_when_memory_is_short(kept: list[str]) -> None:
    engine = make_engine(on_device=False)
    keeper = engine._keeper
    wanted = request("x", prompt_of(random.Random(1), 40), LINEAR, max_tokens=60)
    engine.add(replace(wanted, pauses=frozenset(range(1, VOCAB))))
    while not keeper._num_copied_bytes:
        engine.step()
    keeper.shed()
    assert keeper._num_copied_bytes == 0
    assert not any(progress.copies for progress in keeper._progress.values())
    for _ in range(9):
        engine.step()
    assert keeper._num_copied_bytes > 0
    engine.abort("x")
    assert keeper._num_copied_bytes == 0


def test_all_that_is_on_the_device_is_given_back_when_memory_is_short(
    kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(on_device=False)
    keeper = engine._keeper
    engine.add(request("x", prompt_of(random.Random(1), 40), LINEAR, max_tokens=9))
    engine.step()
    assert any(progress.near for progress in keeper._progress.values())
    shed: list[object] = []
    monkeypatch.setattr(keeper.cache, "shed", lambda: shed.append(keeper.cache))
    keeper.shed()
    assert shed == [keeper.cache]
    assert not any(progress.near for progress in keeper._progress.values())
    while engine.has_work:
        engine.step()
