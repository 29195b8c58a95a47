"""Traced and given answers through the engine, on both of its runners."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_model import VOCAB, FakeModel, fake_state, mixture, request
from mrss_kernels import reference_tail

from mrss_provider.config import EngineConfig
from mrss_provider.engine.device_runner import DeviceRunner
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.request import EngineRequest, TokenOutput
from mrss_provider.errors import InvalidRequestError

A, B, C = (fake_state(name) for name in ("amber", "blue", "cyan"))
CONFIG = EngineConfig(max_rows=16, prefill_chunk_len=16, prefill_alone_len=32, max_context_len=999)
LINEAR = mixture(A, B, weights=[0.3, 0.7])
DELTA = mixture(None, A, B, C, weights=[0, 1, 1, 0.5], merge="delta", gate="novelty", cut=0.1)
ASKED = [
    request("linear", [9, 2, 6], LINEAR, seed=3, top_p=0.8),
    request("delta", [3, 5, 8, 9], DELTA, n=2, seed=4, frequency_penalty=0.5),
    request("one", [1, 5], mixture(A), seed=2),
]
GIVEN = (5, 5, 30, 2, 17)


def plain_tail(logits: torch.Tensor, inputs: Any, outputs: Any, **_: Any) -> None:
    reference_tail.tail(logits, inputs, outputs)


def host_engine() -> Engine:
    return Engine(FakeModel(), None, CONFIG, allowed_ids=range(VOCAB - 1))  # type: ignore[arg-type]


def device_engine() -> Engine:
    model = FakeModel()
    runner = DeviceRunner(model, CONFIG, torch.tensor([VOCAB - 1]), tail=plain_tail)  # type: ignore[arg-type]
    return Engine(model, None, CONFIG, allowed_ids=range(VOCAB - 1), runner=runner)  # type: ignore[arg-type]


ENGINES = pytest.mark.parametrize("make_engine", [host_engine, device_engine])


def run(engine: Engine, *asked: EngineRequest) -> dict[tuple[str, int], list[TokenOutput]]:
    for wanted in asked:
        engine.add(wanted)
    outputs: dict[tuple[str, int], list[TokenOutput]] = {}
    for _ in range(200):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
    raise AssertionError("the engine does not come to an end")


def given(wanted: EngineRequest, ids: tuple[int, ...] = GIVEN, **changes: Any) -> EngineRequest:
    sampling = replace(wanted.sampling, max_tokens=len(ids), **changes)
    return replace(wanted, forced=ids, sampling=sampling, n=1)


@ENGINES
def test_a_trace_changes_no_token_and_is_there_for_each(make_engine: Any) -> None:
    plain = run(make_engine(), *ASKED)
    traced = run(make_engine(), *(replace(wanted, trace=True) for wanted in ASKED))
    assert plain.keys() == traced.keys()
    for key, outputs in traced.items():
        assert [o.token_id for o in outputs] == [o.token_id for o in plain[key]]
        assert [o.trace.token_id for o in outputs if o.trace] == [o.token_id for o in outputs]
        assert all(o.trace is None for o in plain[key])


@ENGINES
def test_neighbours_of_a_traced_answer_get_their_usual_tokens(make_engine: Any) -> None:
    alone = run(make_engine(), *ASKED)
    beside = run(make_engine(), replace(ASKED[0], trace=True), *ASKED[1:])
    assert [[o.token_id for o in outputs] for outputs in beside.values()] == [
        [o.token_id for o in outputs] for outputs in alone.values()
    ]
    traced = {key[0] for key, outputs in beside.items() for o in outputs if o.trace}
    assert traced == {"linear"}


def test_the_trace_is_of_the_merge_that_logprobs_tell_of() -> None:
    sampling = replace(ASKED[1].sampling, logprobs=True)
    outputs = run(host_engine(), replace(ASKED[1], trace=True, sampling=sampling))
    for output in outputs["delta", 1]:
        assert output.trace is not None
        assert output.trace.merged_log_prob == output.logprob
        assert output.trace.names == ("base", "amber", "blue", "cyan")


@ENGINES
def test_given_tokens_take_the_place_of_drawn_ones(make_engine: Any) -> None:
    outputs = run(make_engine(), *(given(wanted) for wanted in ASKED))
    for own in outputs.values():
        assert tuple(o.token_id for o in own) == GIVEN
        assert [o.finish_reason for o in own] == [None, None, None, None, "stop"]


def test_rows_read_the_given_tokens_and_score_them_as_if_drawn() -> None:
    """A given answer that was drawn before gets the same numbers, to the bit."""
    wanted = replace(ASKED[0], trace=True, sampling=replace(ASKED[0].sampling, logprobs=True))
    drawn = run(host_engine(), wanted)["linear", 0]
    ids = tuple(o.token_id for o in drawn if o.token_id is not None)
    read = run(host_engine(), given(wanted, ids))["linear", 0]
    assert [o.trace for o in read] == [o.trace for o in drawn]
    assert [o.logprob for o in read] == [o.logprob for o in drawn]


def test_end_of_text_inside_a_given_answer_does_not_end_it() -> None:
    wanted = given(ASKED[0], (4, 0, 6), ignore_eos=False)
    assert [o.token_id for o in run(host_engine(), wanted)["linear", 0]] == [4, 0, 6]


@pytest.mark.parametrize("banned", [{30: -100.0}, {}])
def test_a_given_token_that_cannot_be_drawn_is_refused(banned: dict[int, float]) -> None:
    ids = GIVEN if banned else (5, VOCAB - 1)
    with pytest.raises(InvalidRequestError, match="may be drawn"):
        host_engine().check(given(ASKED[0], ids, logit_bias=banned))
