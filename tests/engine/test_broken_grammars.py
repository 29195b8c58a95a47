"""A defect in one answer's grammar ends that answer; the others are what they would have been."""

from __future__ import annotations

import numpy as np
import pytest
from fake_model import FakeModel, fake_state, mixture, request
from numpy.typing import NDArray
from test_constraint import Cycle, constrained
from test_device_runner import CONFIG, device_engine, host_engine, run

from mrss_provider.engine.engine import Engine

LINEAR = mixture(fake_state("amber"), fake_state("blue"), weights=[0.3, 0.7])
SETS = [[5, 6, 7]] * 6


class Defective(Cycle):
    """A grammar that nests deeper than the interpreter, at the third token."""

    def __init__(self, where: str, at: int = 0) -> None:
        super().__init__(*SETS, at=at)
        self.where = where

    def fork(self) -> Defective:
        if self.where == "fork":
            raise RecursionError("too deep")
        return Defective(self.where, self.at)

    def fill_mask(self, words: NDArray[np.uint32]) -> None:
        if self.where == "mask" and self.at == 2:
            raise RecursionError("too deep")
        super().fill_mask(words)

    def fill_masks(self, together, masks):  # type: ignore[no-untyped-def]
        for one, words in zip(together, masks, strict=True):
            one.fill_mask(words)
        return [None] * len(together)

    def advance(self, token_id: int) -> None:
        if self.where == "token" and self.at == 2:
            raise RecursionError("too deep")
        super().advance(token_id)


@pytest.fixture(params=[host_engine, device_engine], ids=["host", "device"])
def engine(request: pytest.FixtureRequest) -> Engine:
    made: Engine = request.param(FakeModel())
    return made


# Four and more masks are found together.
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(("where", "num_tokens"), [("mask", 2), ("token", 3)])
def test_a_defect_while_an_answer_runs(
    engine: Engine, where: str, num_tokens: int, count: int
) -> None:
    sound = constrained("sound", LINEAR, Cycle(*SETS), seed=3)
    free = request("free", [1, 2], LINEAR, seed=4)
    expected = run(host_engine(FakeModel()), {0: [sound, free]})
    broken = [constrained(f"{i}", LINEAR, Defective(where), seed=i) for i in range(count)]
    got = run(engine, {0: [*broken, sound, free]})
    for name in ("sound", "free"):
        tokens = [output.token_id for output in got[name, 0]]
        assert tokens == [output.token_id for output in expected[name, 0]]
    for i in range(count):
        *told, last = got[f"{i}", 0]
        assert [output.error for output in told] == [None] * num_tokens
        assert "the grammar failed: RecursionError: too deep" in str(last.error)


def test_a_defect_before_an_answer_begins_keeps_no_rows(engine: Engine) -> None:
    with pytest.raises(RecursionError):
        engine.add(constrained("x", LINEAR, Defective("fork")))
    assert engine.num_free_rows == CONFIG.max_rows
    assert not engine.has_work


def test_a_defect_of_one_that_has_waited_for_its_rows_ends_no_other(engine: Engine) -> None:
    num_rows = CONFIG.max_rows // LINEAR.rows
    running = [request(f"{i}", [1, 2], LINEAR, seed=i, max_tokens=6 + i) for i in range(num_rows)]
    last = request("last", [3, 4], LINEAR, seed=9, max_tokens=6)
    expected = run(host_engine(FakeModel()), {0: [*running, last]})
    got = run(engine, {0: [*running, constrained("x", LINEAR, Defective("fork"), n=2), last]})
    for i in range(2):
        (only,) = got.pop(("x", i))
        assert "could not begin: RecursionError: too deep" in str(only.error)
    assert got.keys() == expected.keys()
    for name, outputs in got.items():
        tokens = [output.token_id for output in outputs]
        assert tokens == [output.token_id for output in expected[name]]
    assert engine.num_free_rows == CONFIG.max_rows


def test_a_defect_of_one_that_waited_is_told_where_nothing_else_runs(engine: Engine) -> None:
    num_rows = CONFIG.max_rows // LINEAR.rows
    engine.add(request("wide", [1, 2], LINEAR, num_rows, max_tokens=6))
    engine.add(constrained("x", LINEAR, Defective("fork")))
    engine.abort("wide")
    assert engine.has_work
    told = engine.step()
    assert [output.request_id for output in told if output.error is not None] == ["x"]
    assert not engine.step()
    assert not engine.has_work
