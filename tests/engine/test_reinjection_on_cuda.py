"""Rows that are given their states anew on a CUDA device: as made by hand, in graphs and beside."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from test_snapshots_on_cuda import ask, ids, make_engine, prompt_of, run
from test_snapshots_on_cuda import library as library
from test_snapshots_on_cuda import model as model

from mrss_provider.engine.continuation import StartPoint
from mrss_provider.engine.request import EngineRequest, TokenOutput
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.model import Model

pytestmark = pytest.mark.gpu

POINTS = (5, 100, 161, 230)


def asked(library: StateLibrary) -> EngineRequest:
    wanted = ask(library, "knowledge+tone", prompt_of(260), logprobs=True, max_tokens=1)
    return replace(wanted, reinjections=POINTS)


def logprob(outputs: list[TokenOutput]) -> float:
    """Return that of the first token, which is the likeliest one."""
    assert outputs[0].logprob is not None
    return outputs[0].logprob


def near(value: float) -> object:
    # The same sums in another order, in 16 bits.
    return pytest.approx(value, abs=3e-2)


@torch.inference_mode()
def by_hand(wanted: EngineRequest, model: Model) -> EngineRequest:
    """Return the request with its rows made by the model alone, piece by piece."""
    states = wanted.mixture.states
    pool = model.new_pool(len(states))
    for row, state in enumerate(states):
        pool.write(row, state)
    for start, stop in itertools.pairwise((0, *POINTS, len(wanted.prompt) - 1)):
        for row, state in enumerate(states):
            if start and state is not None:
                pool.wkv[:, row] = pool.wkv[:, 0] + state.wkv.to(model.device)
        for row in range(len(states)):
            piece = torch.tensor(wanted.prompt[start:stop], device=model.device)
            slot = torch.tensor([row], device=model.device)
            model.prefill(piece, [0, stop - start], slot, pool)
    rows = tuple(pool.snapshot(row) for row in range(len(states)))
    return replace(wanted, reinjections=(), start=StartPoint(rows, len(wanted.prompt) - 1))


def test_an_answer_is_that_of_rows_made_by_hand_fresh_or_from_the_cache(
    model: Model, library: StateLibrary
) -> None:
    engine = make_engine(model, library)
    hand_made = by_hand(asked(library), model)
    expected = logprob(run(make_engine(model, library, cache_bytes=0), hand_made))
    fresh, hit = run(engine, asked(library)), run(engine, asked(library))
    assert (fresh[0].num_cached, hit[0].num_cached) == (0, POINTS[-1])
    assert logprob(fresh) == near(expected)
    assert logprob(hit) == near(expected)
    never = run(engine, replace(asked(library), reinjections=()))
    assert never[0].num_cached == 0
    assert abs(logprob(never) - expected) > 0.06, "else this shows nothing"


def test_prompts_read_beside_answers_are_given_states_too_and_the_answers_are_not(
    model: Model, library: StateLibrary
) -> None:
    engine = make_engine(model, library, cache_bytes=0)
    prompt = prompt_of(40, 2)
    other = ask(library, "knowledge+tone", prompt, max_tokens=40, logprobs=True)
    alone = run(engine, other)
    expected = logprob(run(engine, asked(library)))
    engine.add(replace(other, id="other"))
    found: dict[str, list[TokenOutput]] = {"x": [], "other": []}
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].append(output)
        if len(found["other"]) == 5 and not found["x"] and engine.num_free_rows == 13:
            engine.add(asked(library))
    assert logprob(found["x"]) == near(expected)
    # Rows beside it change the order of sums: a near tie may fall otherwise, and no more than that.
    pairs = zip(ids(found["other"]), ids(alone), strict=True)
    alike = list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert len(alike) >= 12
    for one, other_one in zip(found["other"][: len(alike)], alone, strict=False):
        assert logprob([one]) == near(logprob([other_one]))
